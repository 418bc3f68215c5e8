"""Checkpoints from one layout into another, with a proof; what a folder holds; how other programs read ours."""
