"""The built-in phantom: drawn fetal planes with labels, patients and masks."""
