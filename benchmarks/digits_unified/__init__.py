"""Drawing and editing scenes of real handwritten digits with a small stock Qwen3-VL.

Scenes are 2x2 or 3x3 grids of digits in four colours, 32 pixels a digit: one visual token of Qwen3-VL, one latent of a
32x autoencoder. The digits come from scikit-learn's ``load_digits`` (real scans), split as in ``digits_vqa``.
"""
