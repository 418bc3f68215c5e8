"""HTTP servers: application, middleware, limits, streams, metrics."""
