"""Vision experts (arXiv 2512.04810, 2505.24541) as a plug-in: MLPs in the vision tower that each image is routed to."""
