"""Evaluation: tasks, scorers, the runner, and the original's entry points. `llava eval` is eval/harness/main.py."""
