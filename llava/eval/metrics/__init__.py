"""Scorers: texts in, figures out. Nothing here reads files or knows a task's layout."""
