"""A small visual question answering task on real handwritten digits.

Scenes are 32x32 pictures of a 2x2 grid of digits in four colours; the digits come from scikit-learn's
``load_digits`` (real scans), split so that no handwriting seen in training appears in the test.
"""
