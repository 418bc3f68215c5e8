"""Checkpoint folders: what they hold, and reading it into a model."""
