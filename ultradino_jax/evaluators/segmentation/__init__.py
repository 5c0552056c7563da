"""Segmentation networks on images with masks."""
