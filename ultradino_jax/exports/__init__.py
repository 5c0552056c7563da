"""Models out: files that other libraries read."""
