"""Training data on disk: formats, index, samples, validation."""
