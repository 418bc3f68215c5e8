"""The parts of `llava trace`."""
