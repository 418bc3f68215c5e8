"""Running benchmarks: asking, scoring, reporting."""
