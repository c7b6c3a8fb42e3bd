"""Which classes of transformers are image-text models and language models, by model type, as its auto classes know."""

from __future__ import annotations

from transformers.models.auto import modeling_auto


def image_text_classes() -> dict[str, tuple[str, ...]]:
    """Return the names of the classes that ``AutoModelForImageTextToText`` makes, by model type."""
    return _by_type("MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES") | _by_type("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES")


def language_model_types() -> frozenset[str]:
    """Return the model types of ``AutoModelForCausalLM``; those of image-text models can be among them."""
    return frozenset(_by_type("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"))


def _by_type(mapping: str) -> dict[str, tuple[str, ...]]:
    # Releases of transformers have different ones; without one, no class is known by it.
    names = getattr(modeling_auto, mapping, {})
    return {model_type: (name,) if isinstance(name, str) else tuple(name) for model_type, name in names.items()}
