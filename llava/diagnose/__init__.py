"""Looking inside: `llava trace`, `llava doctor` and `llava selftest`."""
