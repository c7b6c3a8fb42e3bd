from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import save_file

from emma_adapter import CheckpointError
from emma_adapter.files.tensor_file import read_header, read_tensors


@pytest.fixture
def path(tmp_path):
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}, tmp_path / "x.safetensors", {"format": "pt"})
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize("change", [-1, 1, 4096])
def test_a_file_has_the_size_that_its_header_tells(path, change):
    """What comes behind the tensors is read by nobody, and would be in no checksum."""
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + bytes(change))
    message = re.escape(f"it has {len(content) + change:,} bytes instead of {len(content):,}")
    with path.open("rb") as file:
        with pytest.raises(CheckpointError, match=message):
            read_header(file, path)
        with pytest.raises(CheckpointError, match="not a valid safetensors file"):
            read_tensors(file, path)
