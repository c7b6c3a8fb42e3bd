"""Reading the authors' checkpoint: github.com/SaraGhazanfari/EMMA, ``vision_tower.bin``."""

from __future__ import annotations

import math
import os
import pickletools
import re
import zipfile
from os import PathLike
from pathlib import Path
from typing import IO, BinaryIO

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files.untrusted import open_regular
from ..messages import plain, shown
from .config import EmmaConfig

_TENSORS = (
    "text_projection.weight",  # [D, Dt]
    "text_projection.bias",  # [D]
    "image_text_infusion.weight",  # [N, N + T]
    "image_text_infusion.bias",  # [N]
)
_PREFIX = "model.vision_tower."
_REMEDY = "give the vision_tower.bin that the authors' training wrote"
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

#: Everything that the pickle of a state dict may refer to.
_GLOBALS = re.compile(
    r"collections OrderedDict|torch\._utils (_rebuild_tensor_v2|_rebuild_parameter)|torch [A-Z][A-Za-z0-9]*Storage"
)
_TUPLES = frozenset({"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"})
#: In bytes; the description of the tensors in the authors' file has a hundred thousand.
_MAX_PICKLE = 2**20
_MAX_TUPLES = 8
#: The pickles at the beginning of a file in PyTorch's older format: two numbers, the machine, the dict and its keys.
_LEGACY_PICKLES = 5


def read_official(path: str | PathLike[str]) -> tuple[EmmaConfig, dict[str, Tensor]]:
    """Return config and ``EmmaAlignment`` state dict, float32, of a ``vision_tower.bin``.

    Both key forms are understood: bare, and prefixed with ``model.vision_tower.``.

    Raises:
        CheckpointError: if the file can't be read safely, lacks a tensor, has inconsistent shapes, or holds values that
            aren't finite.
    """
    stored, size = _load(Path(path))
    tensors = {name: _one_of(stored, name, path, size) for name in _TENSORS}
    if any(key.removeprefix(_PREFIX) == "learnable_tokens" for key in stored):
        raise CheckpointError(
            f"{path} holds learnable tokens: it is the authors' variant v2 or v3; only the published EMMA, v1, is "
            f"read; {_REMEDY}"
        )
    projection, infusion = tensors["text_projection.weight"], tensors["image_text_infusion.weight"]
    matrices = projection.ndim == infusion.ndim == 2 and projection.numel() > 0 and infusion.numel() > 0
    if not matrices or infusion.shape[1] <= infusion.shape[0]:
        raise CheckpointError(
            f"{path}: expected text_projection.weight [D, Dt] and image_text_infusion.weight [N, N + T], none empty; "
            f"got {shown(list(projection.shape))} and {shown(list(infusion.shape))}; {_REMEDY}"
        )
    visual_dim, instruction_dim = projection.shape
    num_visual = infusion.shape[0]
    for name, size in (("text_projection.bias", visual_dim), ("image_text_infusion.bias", num_visual)):
        if tensors[name].shape != (size,):
            raise CheckpointError(
                f"{path}: {name} should be [{size}] and is {shown(list(tensors[name].shape))}; {_REMEDY}"
            )
    side = math.isqrt(num_visual)
    config = EmmaConfig.paper(
        visual_dim=visual_dim,
        instruction_dim=instruction_dim,
        num_visual_tokens=num_visual,
        visual_grid=(side, side) if side * side == num_visual else None,
        max_instruction_tokens=infusion.shape[1] - num_visual,
    )
    image_weight = infusion[:, :num_visual].to(torch.float64, copy=True)
    image_weight.diagonal().sub_(1)
    state_dict = {
        "fusion.instruction_projection.weight": projection.float(),
        "fusion.instruction_projection.bias": tensors["text_projection.bias"].float(),
        "fusion.image_weight": image_weight.float(),
        "fusion.text_weight": infusion[:, num_visual:].float().contiguous(),
        "fusion.bias": tensors["image_text_infusion.bias"].float(),
    }
    if not all(bool(torch.isfinite(value).all()) for value in state_dict.values()):
        raise CheckpointError(
            f"{path} holds values that are NaN, infinite or too large for float32; download or copy it again"
        )
    return config, state_dict


def _load(path: Path) -> tuple[dict[str, object], int]:
    """Return the state dict, and the size of the file in bytes."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            if is_zip:
                _check_zip(file)
            else:
                for _ in range(_LEGACY_PICKLES):
                    _check_pickle(file)
        # mmap leaves the towers on disk, which are hundreds of times larger than the rest.
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path}; give the path of the authors' vision_tower.bin") from error
    except CheckpointError:
        raise
    except _ForeignPickleError as error:
        raise CheckpointError(
            f"{path} is not a file of tensors, or holds objects beside tensors, which are never unpickled: {error}; "
            f"{_REMEDY}"
        ) from error
    except Exception as error:
        raise CheckpointError(
            f"{path} can't be read as a PyTorch checkpoint: {plain(str(error)) or type(error).__name__}; {_REMEDY}"
        ) from error
    if not isinstance(stored, dict):
        raise CheckpointError(f"{path} holds a {type(stored).__name__} instead of a state dict; {_REMEDY}")
    return {key: value for key, value in stored.items() if isinstance(key, str)}, size


class _ForeignPickleError(Exception):
    """A pickle that isn't a state dict's."""


def _check_zip(file: BinaryIO) -> None:
    """Check that an archive is as ``torch.save`` makes them: uncompressed, with one pickle, of a state dict."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise _ForeignPickleError("its parts are compressed, which PyTorch's never are")
        pickles = [entry for entry in entries if entry.filename.lower().endswith(".pkl")]
        if len(pickles) != 1:
            raise _ForeignPickleError(f"it has {len(pickles)} pickles instead of one")
        with archive.open(pickles[0]) as content:
            _check_pickle(content)


def _check_pickle(file: IO[bytes]) -> None:
    """Check that the pickle which begins here refers only to tensors, and that its length bounds the cost to load it.

    PyTorch's own check, ``weights_only``, lets calls pass that allocate any amount of memory; and to put nested tuples
    into a dict, each of which holds the next one twice, Python hashes the innermost 2^depth times.

    Raises:
        _ForeignPickleError: if it isn't.
        ValueError: if it is no pickle.
    """
    begin = file.tell()
    depths: list[int | None] = []  # of nested tuples, for each value on the stack; None is a mark
    memo: dict[object, int] = {}
    for opcode, argument, position in pickletools.genops(file):
        if position is not None and position - begin > _MAX_PICKLE:
            raise _ForeignPickleError(f"it describes its tensors in more than {_MAX_PICKLE:,} bytes")
        if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST") and not _GLOBALS.fullmatch(str(argument)):
            raise _ForeignPickleError(plain(str(argument or opcode.name)))
        if opcode.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = depths[-1] or 0
            continue
        operand_depths = _pop_operands(depths, opcode)
        depth = max(operand_depths, default=0) + 1 if opcode.name in _TUPLES else 0
        if opcode.name in ("BINGET", "LONG_BINGET") and memo.get(argument):
            raise _ForeignPickleError("it uses a tuple twice")
        if depth > _MAX_TUPLES:
            raise _ForeignPickleError(f"it nests tuples more than {_MAX_TUPLES} deep")
        depths += [None if kind is pickletools.markobject else depth for kind in opcode.stack_after]


def _pop_operands(depths: list[int | None], opcode: pickletools.OpcodeInfo) -> list[int]:
    """Pop what an opcode takes from the stack, and return the depths."""
    operands = opcode.stack_before
    popped: list[int] = []
    if pickletools.markobject in operands:
        while (depth := depths.pop()) is not None:
            popped.append(depth)
        operands = operands[: operands.index(pickletools.markobject)]
    return popped + [depths.pop() or 0 for _ in operands]


def _one_of(stored: dict[str, object], name: str, path: str | PathLike[str], size: int) -> Tensor:
    for key in (name, _PREFIX + name):
        value = stored.get(key)
        if isinstance(value, Tensor):
            is_plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided
            if value.dtype not in _DTYPES or not is_plain or value.device.type != "cpu":
                raise CheckpointError(
                    f"{path}: {key} should be a plain tensor of floating-point weights and is a {type(value).__name__} "
                    f"of {value.dtype}; {_REMEDY}"
                )
            # With strides of zero, a small file can hold a tensor of any size.
            if value.numel() * value.itemsize > min(value.untyped_storage().nbytes(), size):
                raise CheckpointError(
                    f"{path}: {key} would be {shown(list(value.shape))}, more than is in the file; {_REMEDY}"
                )
            return value.detach()
    raise CheckpointError(
        f"{path} has no tensor {name!r}, bare or prefixed with {_PREFIX!r}: not an EMMA checkpoint; {_REMEDY}"
    )
