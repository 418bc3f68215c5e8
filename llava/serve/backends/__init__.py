"""What answers behind a server."""
