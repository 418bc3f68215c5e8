"""Many answers at once: requests in, results or streams of text out."""
