"""Vision experts (arXiv 2512.04810, 2505.24541) as a plug-in: further MLPs in the vision tower, an image at a time."""
