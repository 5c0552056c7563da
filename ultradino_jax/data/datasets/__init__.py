"""Labelled data sets: readers, tensorflow-datasets builders and splits."""
