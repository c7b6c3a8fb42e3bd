"""Base models by folder or hub id."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import UnsupportedModelError


def model_without_weights(source: str) -> Any:
    """The model on the meta device: its configuration is all that is read.

    Raises:
        UnsupportedModelError: if there is no vision-language model of this name.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    with _explained(source):
        config = AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config)


def load_model(source: str, dtype: str) -> Any:
    """The model with its weights.

    Raises:
        UnsupportedModelError: if there is no vision-language model of this name.
    """
    from transformers import AutoModelForImageTextToText

    with _explained(source):
        return AutoModelForImageTextToText.from_pretrained(source, dtype=dtype)


def load_processor(source: str) -> Any:
    """The processor of a model.

    Raises:
        UnsupportedModelError: if it can't be loaded.
    """
    from transformers import AutoProcessor

    with _explained(source):
        return AutoProcessor.from_pretrained(source)


@contextmanager
def _explained(source: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        # transformers lists every class it knows after its first sentence.
        reason = str(error).strip().split("\n", 1)[0][:300]
        raise UnsupportedModelError(
            f"{source} can't be loaded as a vision-language model of transformers: check the folder or hub id, and "
            f"that its processor is there ({reason})"
        ) from error
