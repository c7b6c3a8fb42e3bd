"""Placeholder tokens: where a prompt holds the visual tokens of its images and videos, as the model's family says."""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .families import ModelFamily


def placeholder_ids(family: ModelFamily, inner: nn.Module) -> dict[str, int]:
    """Return the placeholder token of each modality.

    Raises:
        UnsupportedModelError: if the family doesn't name it.
    """
    ids = {modality: family.placeholder_id(inner, modality) for modality in family.modalities}
    for modality, token_id in ids.items():
        if not isinstance(token_id, int):
            raise UnsupportedModelError(
                f"{type(family).__name__}.placeholder_id must return the id of a token for {modality!r}; "
                f"got {token_id!r}"
            )
    return ids


def find_placeholders(family: ModelFamily, inner: nn.Module, input_ids: Tensor) -> dict[str, Tensor]:
    """Return where the placeholder tokens of each modality are, bool ``[B, L]``.

    Raises:
        UnsupportedModelError: if the family doesn't say so for each of its modalities.
    """
    placeholder_ids(family, inner)
    places = family.placeholders(inner, input_ids)
    if set(places) != set(family.modalities) or any(places[name].shape != input_ids.shape for name in places):
        raise UnsupportedModelError(
            f"{type(family).__name__}.placeholders must return a tensor of the shape of input_ids for each of "
            f"{list(family.modalities)}; got { ({name: list(where.shape) for name, where in places.items()}) }"
        )
    return places
