"""The web page: its parts, and its requests to servers."""
