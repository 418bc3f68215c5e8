"""Servers and their programs, and the original's command line."""
