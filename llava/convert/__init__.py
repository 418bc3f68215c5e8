"""Convert checkpoints between layouts, describe what a folder holds, and let other programs read our layout."""
