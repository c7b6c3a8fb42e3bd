"""Visual question answering on real photographs: ``python -m benchmarks.photos_vqa``.

Scenes are 3x3 grids of photographed things, cut out, on tinted photographs; no photograph seen in training appears in
the test. The vision tower is an EfficientNet pretrained on ImageNet, frozen. The arms are those of ``digits_vqa``.
"""
