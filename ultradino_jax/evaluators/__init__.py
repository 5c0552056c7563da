"""Classification and segmentation as in the paper, and what both share."""
