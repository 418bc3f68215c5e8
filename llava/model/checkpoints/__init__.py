"""Checkpoint folders: what they hold, and their tensors."""
