"""The checks of `llava doctor` and `llava selftest`."""
