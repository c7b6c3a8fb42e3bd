"""FID and KID by torchmetrics, with a feature network of the user's choice."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DataError
from .loading import explained_loading
from .pictures import opened

_LEAST_FOR_KID, _LARGEST_SUBSET, _BATCH = 20, 1000, 16


class FeatureNetwork(nn.Module):
    """A vision model of transformers, whose pooled output is a picture's features: ``[B, 3, H, W]`` to ``[B, D]``.

    From CLIP and similar models it takes the projected image embedding; from a model without a pooled output, the mean
    over tokens or positions.
    """

    def __init__(self, source: str, device: Any) -> None:
        from transformers import AutoImageProcessor, AutoModel

        super().__init__()
        with explained_loading(source, "features of pictures"):
            self.model = AutoModel.from_pretrained(source).to(device).eval()
            self.processor = AutoImageProcessor.from_pretrained(source)
        self.num_features = self(self.pixels([_grey()])).shape[-1]

    def pixels(self, pictures: Sequence[Any]) -> Tensor:
        """Return the network's input ``[B, 3, H, W]``, made by its own image processor."""
        pixels = self.processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        return pixels.to(self.model.device, self.model.dtype)

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> Tensor:
        """Return the features ``[B, D]``, float64."""
        encode = getattr(self.model, "get_image_features", self.model)
        features = encode(pixel_values=pixels)
        if not isinstance(features, Tensor):
            pooled = getattr(features, "pooler_output", None)
            features = features.last_hidden_state if pooled is None else pooled
            if pooled is None and features.dim() == 3:
                features = features.mean(1)
        return (features.mean((2, 3)) if features.dim() == 4 else features).double()


def _grey() -> Any:
    from PIL import Image

    return Image.new("RGB", (64, 64), "#999")


def distances(
    network: FeatureNetwork, drawn: Sequence[Path], real: Sequence[Path], kinds: Sequence[str] = ("fid", "kid")
) -> dict[str, Any]:
    """Return how far the distribution of drawn pictures' features is from that of real pictures' features.

    Args:
        network: computes the features.
        drawn: pictures.
        real: pictures.
        kinds: ``"fid"``: the squared Fréchet distance between two Gaussians (arXiv 1706.08500); ``"kid"``: the squared
            maximum mean discrepancy with the kernel (xᵀy / D + 1)³ (arXiv 1801.01401), mean and standard deviation over
            100 random subsets of at most 1000, or of half the pictures.

    Raises:
        ConfigError: if torchmetrics isn't installed.
        DataError: if there are too few pictures.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance
    except ImportError as error:
        raise ConfigError(f'FID and KID need torchmetrics: pip install "emma_adapter[metrics]" ({error})') from error
    fewest = min(len(drawn), len(real))
    if "fid" in kinds and fewest <= network.num_features:
        raise DataError(
            f"FID needs more pictures than the network has features, {network.num_features}, or its covariances have "
            f"no full rank: there are {len(drawn)} drawn and {len(real)} real ones. Draw more, or measure KID alone"
        )
    if "kid" in kinds and fewest < _LEAST_FOR_KID:
        raise DataError(
            f"KID needs at least {_LEAST_FOR_KID} pictures on either side, or its subsets tell nothing: there are "
            f"{len(drawn)} drawn and {len(real)} real ones. Draw more, or give more real ones"
        )
    metrics: dict[str, Any] = {}
    if "fid" in kinds:
        metrics["fid"] = FrechetInceptionDistance(feature=network)
    if "kid" in kinds:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it warns that it stores features, which it must
            metrics["kid"] = KernelInceptionDistance(feature=network, subset_size=min(_LARGEST_SUBSET, fewest // 2))
    for metric in metrics.values():
        metric.to(network.model.device)
    for paths, is_real in ((drawn, False), (real, True)):
        for start in range(0, len(paths), _BATCH):
            pixels = network.pixels(opened(paths[start : start + _BATCH]))
            for metric in metrics.values():
                metric.update(pixels, real=is_real)
    results: dict[str, Any] = {"drawn": len(drawn), "real": len(real), "features": network.num_features}
    if "fid" in metrics:
        results["fid"] = float(metrics["fid"].compute())
    if "kid" in metrics:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the subsets are random
            results["kid"], results["kid_deviation"] = map(float, metrics["kid"].compute())
    return results
