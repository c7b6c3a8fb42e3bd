"""One call of a method that encodes images or videos, and the division of its features into them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import RoutingError, UnsupportedModelError
from .families import MediaLayout, ModelFamily, ProjectorCall


@dataclass(frozen=True)
class FeatureCall:
    """The images or videos that are being encoded. Sizes only: pixels must not be kept alive."""

    modality: str
    sizes: Mapping[str, Any]
    pixel_shape: tuple[Any, ...] | None

    @classmethod
    def of(cls, family: ModelFamily, modality: str, pixels: Any, arguments: Mapping[str, Any]) -> FeatureCall:
        sizes = {name: arguments.get(name) for name in family.size_arguments}
        return cls(modality, sizes, _shape_of(pixels))

    def within(self, call: FeatureCall) -> FeatureCall:
        """Return the same with sizes that this feature method was not given and the call around it was."""
        sizes = {name: call.sizes.get(name) if value is None else value for name, value in self.sizes.items()}
        return dataclasses.replace(self, sizes=sizes)


def _shape_of(pixels: Any) -> tuple[Any, ...] | None:
    if isinstance(pixels, (list, tuple)):
        return tuple(tuple(part.shape) for part in pixels)
    return tuple(pixels.shape) if isinstance(pixels, Tensor) else None


def projector_call(
    inner: nn.Module, running: FeatureCall, visual_tokens: Tensor, placeholders: Tensor | None, number: int = 0
) -> ProjectorCall:
    return ProjectorCall(
        inner=inner,
        modality=running.modality,
        visual_tokens=visual_tokens,
        sizes=running.sizes,
        pixel_shape=running.pixel_shape,
        placeholders=placeholders,
        number=number,
    )


def checked_layout(family: ModelFamily, call: ProjectorCall, *, in_tower: bool = False) -> MediaLayout:
    """Return the layout of a call's visual tokens.

    Args:
        family: of the model.
        call: of the projector; inside the vision tower, with the tower's hidden states in place of its input.
        in_tower: True for the layout of these hidden states, which the tower may pad, or merge at its end.

    Raises:
        UnsupportedModelError: if the family returns no layout.
        RoutingError: if the visual tokens are not as many as the layout says.
    """
    layout = family.layout(call)
    if not isinstance(layout, MediaLayout):
        raise UnsupportedModelError(
            f"{type(family).__name__}.layout must return an emma_adapter.MediaLayout; got {type(layout).__name__}"
        )
    if in_tower and family.pads_images:
        layout = dataclasses.replace(layout, packed=False, grids=None)
    elif in_tower and layout.grids is not None:
        merge = family.tower_merge(call.inner)
        layout = dataclasses.replace(layout, grids=[(height * merge, width * merge) for height, width in layout.grids])
    shape = call.visual_tokens.shape
    grids = layout.grids
    expected, actual = sum(layout.entries), shape[0]
    if layout.packed:
        if grids is None or len(grids) != expected:
            raise RoutingError(f"the layout of {type(family).__name__} is packed and must name the grid of each entry")
        expected, actual = sum(height * width for height, width in grids), shape[:-1].numel()
    if expected != actual:
        raise RoutingError(
            f"the call announces {expected} {'visual tokens' if layout.packed else 'images, tiles or frames'}, but "
            f"the projector got {actual}: pass on everything that the model's processor returns"
        )
    return layout
