"""The folder of a training run: weights, checkpoints, and the record by which a run is resumed."""
