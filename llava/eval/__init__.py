"""Evaluation: benchmarks, their metrics, the runs of `llava eval`, and the original's programs."""
