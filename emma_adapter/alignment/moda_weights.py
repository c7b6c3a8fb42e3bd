"""Reading the module of MoDA's released checkpoints: arXiv 2506.01850, github.com/waybarrios/MoDA."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..files.tensor_file import read_header
from ..files.untrusted import open_regular, parse_json
from ..messages import listed, plain, shown
from .config import EmmaConfig

#: The module by its names in LLaVA's checkpoints, in earlier ones of these, and in Qwen3-VL's.
_MODULE = re.compile(r"(?:.*\.)?(?:moda|masking|moda_adapter)\.(?P<name>.+)")
_LAYER = re.compile(r"(?:decoder\.)?layers\.(?P<number>\d+)\.(?P<name>.+)")
#: Prefix of the layer that LLaVA's decoder was copied from, which computes nothing.
_TEMPLATE = "decoder_layer."
_REMEDY = "give a folder or a file of safetensors with MoDA's module, as github.com/waybarrios/MoDA writes them"

#: Parts of a layer by their names in ``torch.nn.TransformerDecoderLayer``, and in MoDA's own for Qwen3-VL.
_PARTS = {
    "self_attn.out_proj": "self_attention.output",
    "multihead_attn.out_proj": "cross_attention.output",
    "linear1": "expand",
    "linear2": "contract",
    "ff1": "expand",
    "ff2": "contract",
    **{f"norm{number + 1}": f"norms.{number}" for number in range(3)},
    **{
        f"{short}_{theirs}": f"{attention}.{part}"
        for short, attention in (("sa", "self_attention"), ("ca", "cross_attention"))
        for theirs, part in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "output"))
    },
}
_STACKED = {
    f"{theirs}.in_proj_{kind}": (attention, kind)
    for theirs, attention in (("self_attn", "self_attention"), ("multihead_attn", "cross_attention"))
    for kind in ("weight", "bias")
}


def read_moda(source: str | PathLike[str], num_heads: int | None) -> tuple[EmmaConfig, dict[str, Tensor]]:
    """Return config and ``EmmaAlignment`` state dict, float32, of the module in a MoDA checkpoint.

    Args:
        source: a folder of safetensors, or one such file; only the module's tensors are read.
        num_heads: attention heads, which the weights don't tell. Default: the number in the folder's ``config.json``,
            or 16, as in the paper's models.

    Raises:
        CheckpointError: if there is no such module in it, or its tensors don't fit together.
    """
    source = Path(source)
    stored = _read(source)
    tensors = dict(_renamed(stored, source))
    mask, expand = tensors.get("mask.weight"), tensors.get("layers.0.expand.weight")
    if mask is None or expand is None or mask.ndim != 2 or expand.ndim != 2:
        raise CheckpointError(f"{source}: MoDA's module lacks its mask_head or its first layer; {_REMEDY}")
    numbers = {int(name.split(".")[1]) for name in tensors if name.startswith("layers.")}
    try:
        config = EmmaConfig.moda(
            visual_dim=mask.shape[0],
            instruction_dim=mask.shape[0],
            inner_dim=expand.shape[0],
            num_heads=_heads_in_config(source) if num_heads is None else num_heads,
            fusion_options={"num_layers": max(numbers) + 1, "mask_scale": 1.0},
        )
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}; {_REMEDY}") from error
    return config, {f"fusion.{name}": value for name, value in tensors.items()}


def _read(source: Path) -> dict[str, Tensor]:
    """Return the module's tensors, by their names in it."""
    files = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
    if not files:
        raise CheckpointError(f"there are no safetensors in {source}; {_REMEDY}")
    stored: dict[str, Tensor] = {}
    for path in files:
        try:
            with open_regular(path) as file:
                names = {
                    name: match["name"] for name in read_header(file, path)[0] if (match := _MODULE.fullmatch(name))
                }
        except FileNotFoundError as error:
            raise CheckpointError(f"there is no file {path}; {_REMEDY}") from error
        # Mapped, not read: the language model around the module is hundreds of times larger.
        with safe_open(path, "pt") as tensors:
            stored |= {short: tensors.get_tensor(name) for name, short in names.items()}
    if not stored:
        raise CheckpointError(f"{source} holds no module called 'moda', 'masking' or 'moda_adapter'; {_REMEDY}")
    return stored


def _renamed(stored: Mapping[str, Tensor], source: Path) -> Iterator[tuple[str, Tensor]]:
    unknown = []
    for name, tensor in stored.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{source}: {plain(name)} holds values that aren't finite floats; download or copy it again"
            )
        value = tensor.float()
        layer = _LAYER.fullmatch(name)
        part, _, kind = ("", "", "") if layer is None else layer["name"].rpartition(".")
        if name == "mask_head.weight":
            yield "mask.weight", value
        elif layer is not None and layer["name"] in _STACKED:
            attention, kind = _STACKED[layer["name"]]
            for projection, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                yield f"layers.{layer['number']}.{attention}.{projection}.{kind}", piece.contiguous()
        elif layer is not None and part in _PARTS:
            yield f"layers.{layer['number']}.{_PARTS[part]}.{kind}", value
        elif not name.startswith(_TEMPLATE):
            unknown.append(name)
    if unknown:
        raise CheckpointError(f"{source}: MoDA's module has unknown tensor(s) {listed(sorted(unknown))}; {_REMEDY}")


def _heads_in_config(source: Path) -> int:
    path = source / "config.json"
    if not source.is_dir() or not path.exists():
        return 16
    try:
        with open_regular(path) as file:
            model_config: Any = parse_json(file.read())
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}; download or copy it again") from error
    number = model_config.get("moda_num_heads", 16) if isinstance(model_config, dict) else 16
    if not isinstance(number, int):
        raise CheckpointError(
            f"{path}: moda_num_heads should be a number and is {shown(number)}; download or copy it again"
        )
    return number
