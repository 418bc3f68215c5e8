"""The plugin by which vLLM reads checkpoints in the original layout."""
