"""Probes and fine-tuning on labelled images."""
