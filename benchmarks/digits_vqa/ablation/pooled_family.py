"""What an adapter behind the projector has to know of a projector that pools."""

from __future__ import annotations

import math

from torch import nn

from emma_adapter import register_family
from emma_adapter.integrations.llava import LlavaFamily  # type: ignore[import-not-found, unused-ignore]

from ..pooled_llava import PooledProjector


class PooledLlavaFamily(LlavaFamily):
    """LLaVA, and the benchmark's, whose projector makes a token of each square of patches; not of each half."""

    def projector_merge(self, inner: nn.Module) -> int:
        projector = inner.multi_modal_projector
        if not isinstance(projector, PooledProjector):
            return super().projector_merge(inner)
        patches, _ = self.visual_size(inner)
        assert patches
        return math.isqrt(patches // projector.pooling.tokens)


def register() -> None:
    """Make it known, in this process."""
    register_family(PooledLlavaFamily())
