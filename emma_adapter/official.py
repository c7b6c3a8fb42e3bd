"""Reading the authors' checkpoint: github.com/SaraGhazanfari/EMMA, ``vision_tower.bin``."""

from __future__ import annotations

import math
import pickle
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from .config import EmmaConfig
from .errors import CheckpointError

_TENSORS = (
    "text_projection.weight",  # [D, Dt]
    "text_projection.bias",  # [D]
    "image_text_infusion.weight",  # [N, N + T]
    "image_text_infusion.bias",  # [N]
)
_PREFIX = "model.vision_tower."


def read_official(path: str | PathLike[str]) -> tuple[EmmaConfig, dict[str, Tensor]]:
    """Config and ``EmmaAlignment`` state dict, float32, of a ``vision_tower.bin``.

    Both key forms are understood: bare, and prefixed with ``model.vision_tower.``.

    Raises:
        CheckpointError: if the file can't be read safely, lacks a tensor, or has inconsistent shapes.
    """
    stored = _load(Path(path))
    found = {name: _one_of(stored, name, path) for name in _TENSORS}
    if any(key.removeprefix(_PREFIX) == "learnable_tokens" for key in stored):
        raise CheckpointError(
            f"{path} holds learnable tokens: it is the authors' variant v2 or v3; only the published EMMA, v1, is read"
        )
    projection, infusion = found["text_projection.weight"], found["image_text_infusion.weight"]
    matrices = projection.ndim == infusion.ndim == 2 and projection.numel() > 0 and infusion.numel() > 0
    if not matrices or infusion.shape[1] <= infusion.shape[0]:
        raise CheckpointError(
            f"{path}: expected text_projection.weight [D, Dt] and image_text_infusion.weight [N, N + T], none empty; "
            f"got {list(projection.shape)} and {list(infusion.shape)}"
        )
    visual_dim, instruction_dim = projection.shape
    num_visual = infusion.shape[0]
    for name, size in (("text_projection.bias", visual_dim), ("image_text_infusion.bias", num_visual)):
        if found[name].shape != (size,):
            raise CheckpointError(f"{path}: {name} should be [{size}] and is {list(found[name].shape)}")
    side = math.isqrt(num_visual)
    config = EmmaConfig.paper(
        visual_dim=visual_dim,
        instruction_dim=instruction_dim,
        num_visual_tokens=num_visual,
        visual_grid=(side, side) if side * side == num_visual else None,
        max_instruction_tokens=infusion.shape[1] - num_visual,
    )
    weight = infusion.double()
    return config, {
        "fusion.instruction_projection.weight": projection.float(),
        "fusion.instruction_projection.bias": found["text_projection.bias"].float(),
        "fusion.image_weight": (weight[:, :num_visual] - torch.eye(num_visual, dtype=torch.float64)).float(),
        "fusion.text_weight": weight[:, num_visual:].float().contiguous(),
        "fusion.bias": found["image_text_infusion.bias"].float(),
    }


def _load(path: Path) -> dict[str, object]:
    try:
        # mmap leaves the towers, which are hundreds of times larger than what is wanted, on disk.
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path}; give the path of the authors' vision_tower.bin") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not a file of tensors, or holds objects beside tensors, which are never unpickled: {error}"
        ) from error
    except Exception as error:
        raise CheckpointError(f"{path} can't be read as a PyTorch checkpoint (truncated?): {error}") from error
    if not isinstance(stored, dict):
        raise CheckpointError(f"{path} holds a {type(stored).__name__} instead of a state dict")
    return {key: value for key, value in stored.items() if isinstance(key, str)}


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _one_of(stored: dict[str, object], name: str, path: str | PathLike[str]) -> Tensor:
    for key in (name, _PREFIX + name):
        value = stored.get(key)
        if isinstance(value, Tensor):
            if not value.is_floating_point():
                raise CheckpointError(f"{path}: {key} should hold floating-point weights and holds {value.dtype}")
            return value
    raise CheckpointError(f"{path} has no tensor {name!r}, bare or prefixed with {_PREFIX!r}: not an EMMA checkpoint")
