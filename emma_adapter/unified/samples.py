"""Sample pictures of a branch: the files beside its own, and the card's metadata about them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import BytesIO
from typing import Any

from ..errors import DataError
from ..messages import shown
from .pictures import rgb

#: Prompts and the PIL images that were drawn.
Samples = Sequence[tuple[str, Any]]
_FILE_NAME = "unified_sample_{}.png"


def sample_files(samples: Samples) -> dict[str, bytes]:
    """Return the PNG files of samples, by file name.

    Raises:
        DataError: if a sample isn't a prompt and a picture.
    """
    files = {}
    for number, sample in enumerate(samples):
        if not isinstance(sample, (tuple, list)) or len(sample) != 2 or not isinstance(sample[0], str):
            raise DataError(f"samples[{number}] is {shown(type(sample))}; give pairs of a prompt and a PIL image")
        file = BytesIO()
        rgb(sample[1]).save(file, "PNG")
        files[_FILE_NAME.format(number)] = file.getvalue()
    return files


def card_metadata(samples: Samples) -> str:
    """Return the YAML by which the hub shows samples; see ``<Gallery />`` in its documentation of model cards."""
    lines = []
    for number, (prompt, _) in enumerate(samples):
        # A JSON string is a YAML string.
        lines += [f"- text: {json.dumps(prompt)}", "  output:", f"    url: {_FILE_NAME.format(number)}"]
    return "\n".join(["widget:", *lines, ""]) if lines else ""
