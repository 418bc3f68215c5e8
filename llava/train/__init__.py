"""Training: command-line arguments, data, the trainer and the programs that start it."""
