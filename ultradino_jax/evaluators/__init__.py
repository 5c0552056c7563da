"""Frozen-feature and fine-tuning evaluations."""
