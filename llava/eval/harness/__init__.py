"""Runs of benchmarks: ask a model, score its answers, report and compare."""
