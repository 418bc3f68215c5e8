"""Command-line programs and what they share."""
