"""Weight files in: other projects' names and shapes to ours."""
