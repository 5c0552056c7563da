"""One decoder per file type."""
