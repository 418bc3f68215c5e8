"""HTTP: the application around routes, limits, streams."""
