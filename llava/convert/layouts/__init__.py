"""Checkpoint layouts that `llava convert` writes."""
