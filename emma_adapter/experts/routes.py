"""Routes of images to experts, and the division of a vision tower's tokens among images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RoutingError
from ..models.families import ModelFamily
from ..models.feature_calls import FeatureCall, checked_layout, projector_call
from .config import ORIGINAL


@dataclass(frozen=True)
class Route:
    """The experts that compute the images of one call of a vision tower."""

    #: The expert that takes all images.
    whole: str | None = None
    #: For each expert that takes some, the entries or tokens that are theirs: bool ``[entries, 1, 1]``, or of packed
    #: tokens ``[S, 1]`` or ``[1, S, 1]``.
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    #: Where the router sent each image.
    chosen: Sequence[str] = ()

    def fits(self, hidden: Tensor) -> bool:
        """Return whether ``rows`` are those of hidden states, which the tower may merge between two blocks."""
        return all(
            rows.shape[0] == hidden.shape[0] and rows.shape[-2] in (1, hidden.shape[-2]) for rows in self.rows.values()
        )

    @classmethod
    def to(cls, name: str) -> Route:
        """Return the route of all images to one expert, or to the original."""
        return cls(whole=None if name == ORIGINAL else name)


@dataclass(frozen=True)
class Media:
    """The division of a vision tower's hidden states into images and videos."""

    #: How many entries or, where ``packed``, tokens each has.
    lengths: Sequence[int]
    packed: bool

    @classmethod
    def of(cls, family: ModelFamily, inner: Any, running: FeatureCall, hidden: Tensor) -> Media:
        """Return the division of hidden states ``[entries, N, D]``, ``[S, D]`` or ``[1, S, D]``.

        Raises:
            RoutingError: if they don't match what the call announces.
        """
        call = projector_call(inner, running, _as_projected(family, inner, running, hidden), None)
        layout = checked_layout(family, call, in_tower=True)
        if not layout.packed:
            return cls(list(layout.entries), packed=False)
        assert layout.grids is not None
        areas, lengths = [height * width for height, width in layout.grids], []
        for entries in layout.entries:
            lengths.append(sum(areas[:entries]))
            areas = areas[entries:]
        return cls(lengths, packed=True)

    def pooled(self, hidden: Tensor) -> Tensor:
        """Return the mean of each image's tokens ``[images, D]``, float32."""
        rows = hidden.reshape(-1, hidden.shape[-1]) if self.packed else hidden.mean(1, dtype=torch.float32)
        return torch.stack([part.mean(0, dtype=torch.float32) for part in rows.split(list(self.lengths))])

    def route(self, chosen: Sequence[str], hidden: Tensor) -> Route:
        """Return the route of images to the experts of these names, one for each."""
        taken = set(chosen) - {ORIGINAL}
        if len(set(chosen)) == 1 and taken:
            return Route(whole=chosen[0])
        shape = (*hidden.shape[:-1], 1) if self.packed else (-1, 1, 1)
        lengths = torch.tensor(self.lengths)
        return Route(
            chosen=chosen,
            rows={
                name: torch.tensor([choice == name for choice in chosen])
                .repeat_interleave(lengths)
                .view(shape)
                .to(hidden.device)
                for name in sorted(taken)
            },
        )


def _as_projected(family: ModelFamily, inner: nn.Module, running: FeatureCall, hidden: Tensor) -> Tensor:
    """Return a stand-in for the projector's input, from which families tell the layout: LLaVA drops the class token."""
    if hidden.ndim < 3 or not family.has_fixed_size(inner):
        return hidden
    name = "vision_feature_select_strategy"
    config: Any = inner.config
    strategy = running.sizes.get(name) or getattr(config, name, None)
    return hidden[:, 1:] if strategy == "default" else hidden


def require_call(running: object) -> None:
    """Check that the model's call in which the vision tower runs is known.

    Raises:
        RoutingError: if it isn't.
    """
    if running is None:
        raise RoutingError(
            "the vision tower was called by itself, or a part of it is computed again for a call that ended long ago, "
            "and it can't be told which tokens are of which image: call the model, model.generate or "
            'model.get_image_features, or choose for all images: with experts.routed("original"): …'
        )


def choose(logits: Tensor, names: Sequence[str], margin: float) -> tuple[list[str], list[dict[str, float]]]:
    """Return the expert or original that each image goes to, and the probabilities of all.

    Args:
        logits: ``[images, 1 + experts]``, the original's first.
        names: of the experts.
        margin: by which the most probable expert must exceed the original.
    """
    rows = logits.detach().softmax(-1).tolist()
    chosen = []
    for original, *others in rows:
        best = max(range(len(others)), key=others.__getitem__)
        chosen.append(names[best] if others[best] - original > margin else ORIGINAL)
    return chosen, [dict(zip((ORIGINAL, *names), row, strict=True)) for row in rows]
