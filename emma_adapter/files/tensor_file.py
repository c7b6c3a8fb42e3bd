"""Safetensors files that others made: the header is checked before a tensor is read."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from ..errors import CheckpointError
from ..messages import plain, shown
from .untrusted import parse_json

_MAX_HEADER = 2**22

#: Dtypes of saved weights, and of the buffers of a user's own fusion, by their names in safetensors.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes: safetensors itself doesn't notice changed values."""
    checksum = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        checksum.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        checksum.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return checksum.hexdigest()


def read_header(file: BinaryIO, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a safetensors file, on the meta device, and its metadata.

    Raises:
        CheckpointError: if the file doesn't have the size that its header implies, or holds tensors of a dtype that no
            adapter has. Other faults are left for safetensors to find.
    """
    try:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if length > min(_MAX_HEADER, size - 8):
            raise ValueError(f"its header would have {length:,} of {size:,} bytes")
        header = parse_json(file.read(length).decode("utf-8"))
        metadata = header.pop("__metadata__", {})
        tensors, end = {}, 0
        for name, entry in header.items():
            if entry["dtype"] not in _DTYPES:
                raise ValueError(f"{plain(name)} is {shown(entry['dtype'])}, which no tensor of an adapter is")
            dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
            start, stop = entry["data_offsets"]
            if not all(type(number) is int and 0 <= number < 2**63 for number in (*shape, start, stop)):
                raise ValueError(f"the shape or place of {plain(name)} has entries other than numbers")
            if stop - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{plain(name)} has {stop - start:,} bytes, which don't fit its shape {shown(shape)}")
            tensors[name] = torch.empty(shape, dtype=dtype, device="meta")
            end = max(end, stop)
        if 8 + length + end != size:
            raise ValueError(f"it has {size:,} bytes instead of {8 + length + end:,}")
        if not isinstance(metadata, dict):
            raise ValueError("its metadata is no object")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise _invalid(path, error) from error
    return tensors, metadata


def read_tensors(file: BinaryIO, path: Path) -> dict[str, Tensor]:
    try:
        file.seek(0)
        tensors = safetensors.torch.load(file.read())
        # Cloned into memory that PyTorch allocates, as that of other tensors.
        return {name: tensors.pop(name).clone() for name in list(tensors)}
    except Exception as error:
        raise _invalid(path, error) from error


def _invalid(path: Path, error: Exception) -> CheckpointError:
    reason = plain(str(error)) or type(error).__name__
    return CheckpointError(f"{path} is not a valid safetensors file: {reason}; download or copy it again")
