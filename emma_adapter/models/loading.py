"""Base models by folder or hub id."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import UnsupportedModelError


def model_without_weights(source: str, *, trust_remote_code: bool = False) -> Any:
    """Return the model on the meta device; only its configuration is read.

    Raises:
        UnsupportedModelError: if there is no vision-language model of this name.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    with _explained(source):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    _check_class(config, source, trust_remote_code)
    with _explained(source), torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)


def load_model(source: str, dtype: str, *, trust_remote_code: bool = False) -> Any:
    """Load a model with its weights.

    Raises:
        UnsupportedModelError: if there is no vision-language model of this name.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    with _explained(source):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    _check_class(config, source, trust_remote_code)
    with _explained(source):
        return AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, trust_remote_code=trust_remote_code)


def load_processor(source: str, *, trust_remote_code: bool = False) -> Any:
    """Load the processor of a model.

    Raises:
        UnsupportedModelError: if it can't be loaded.
    """
    from transformers import AutoProcessor

    with _explained(source):
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        raise UnsupportedModelError(
            f"{source} has no processor for images and text, but a {type(processor).__name__}: save the model's "
            "processor to the same folder, processor.save_pretrained(folder)"
        )
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token  # the attention mask hides it
    return processor


def _check_class(config: Any, source: str, trust_remote_code: bool) -> None:
    """Check that transformers has the class that the model was saved from: it would silently take another one."""
    import transformers

    saved_as = (getattr(config, "architectures", None) or [""])[0]
    with_code = trust_remote_code and "AutoModelForImageTextToText" in (getattr(config, "auto_map", None) or {})
    if saved_as and not with_code and not hasattr(transformers, saved_as):
        raise UnsupportedModelError(
            f"{source} was saved from the class {saved_as}, which transformers doesn't have; another class would make "
            "another model of its weights. If the folder holds the code of the class: --trust-remote-code; else load "
            "it with that class in a script"
        )


@contextmanager
def _explained(source: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # On a damaged or foreign folder, transformers, safetensors and tokenizers raise errors of any kind, and
        # transformers lists every class it knows after its first sentence.
        reason = (str(error).strip() or type(error).__name__).split("\n", 1)[0][:300]
        raise UnsupportedModelError(
            f"{source} can't be loaded as a vision-language model of transformers: check the folder or hub id, and "
            f"that its processor is there ({reason})"
        ) from error
