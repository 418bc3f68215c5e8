"""Metrics of benchmarks: from answers and references to figures, without files, models or torch."""
