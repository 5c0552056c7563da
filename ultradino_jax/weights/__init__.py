"""Files in: what a backbone is, and one door to every file that holds one."""
