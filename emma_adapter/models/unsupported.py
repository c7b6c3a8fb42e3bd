"""Why a model has no family: whether one could be written for it, and if not, what it lacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from torch import nn

from ..errors import UnsupportedModelError
from .class_names import image_text_classes, language_model_types

_CODES = "it turns images into tokens of its vocabulary, and has no features between a vision tower and a projector"
_NO_TOWER = "it has no vision tower: pixels enter the language model through one linear layer"
_CROSS_ATTENTION = (
    "its text layers read the image by cross-attention, without a projector that puts visual tokens into the prompt"
)
_READS_ALREADY = "its Q-Former reads the instruction already"

#: What keeps these types of transformers from having a family; the list is of release 5.24.
_REASONS = {
    **dict.fromkeys(("chameleon", "emu3", "apertus1p5"), _CODES),
    **dict.fromkeys(("fuyu", "gemma4_unified", "inkling_mm_model"), _NO_TOWER),
    **dict.fromkeys(("blip", "git", "idefics", "pix2struct", "pp_formulanet", "udop"), _CROSS_ATTENTION),
    "vision-encoder-decoder": _CROSS_ATTENTION,
    **dict.fromkeys(("instructblip", "instructblipvideo"), _READS_ALREADY),
    "pi0": "it puts out the motions of a robot, not text",
    "evolla": "it reads proteins, not images",
}


def raise_unsupported(model: nn.Module, model_type: str, supported: Sequence[str]) -> NoReturn:
    """Raise the error about a model without a family, which says why it has none and what to do.

    Raises:
        UnsupportedModelError: always.
    """
    name = f"model_type {model_type!r} ({type(model).__name__})"
    if (whole := _whole_model_type(model_type)) is not None:
        raise UnsupportedModelError(
            f"{name} is the language model of {whole!r} alone, without its vision tower: load the checkpoint with "
            "AutoModelForImageTextToText.from_pretrained(…), not with AutoModelForCausalLM"
        )
    if model_type in _REASONS:
        raise UnsupportedModelError(
            f"{name} can't have an adapter between vision tower and projector: {_REASONS[model_type]}"
        )
    parts = {part for part in ("vision", "audio") if getattr(model.config, f"{part}_config", None) is not None}
    if parts == {"audio"}:
        raise UnsupportedModelError(f"{name} can't have an adapter: it hears audio and sees no images")
    if not parts and model_type not in image_text_classes() and model_type in language_model_types():
        raise UnsupportedModelError(f"{name} can't have an adapter: it is a language model and sees no images")
    raise UnsupportedModelError(
        f"{name} is not supported; supported are {list(supported)}. If it has a vision tower and a projector, a family "
        "for it takes a few lines: subclass emma_adapter.ModelFamily and call "
        "emma_adapter.register_family(YourFamily()), as docs/adding-a-family.md shows"
    )


def _whole_model_type(model_type: str) -> str | None:
    """Return the type of the image-text model whose language model this type is, as ``gemma3`` for ``gemma3_text``."""
    for ending in ("_text", "_text_model"):
        whole = model_type.removesuffix(ending)
        if whole != model_type and whole in image_text_classes():
            return whole
    return None
