"""The blocks ``with experts.routed(…)`` and ``with experts.watched()``, which hold in a thread or asynchronous task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field


class Owner:
    """A stand-in for a model, by which blocks refer to it without keeping it alive."""


@dataclass(frozen=True)
class RoutedImage:
    """The route of one image or video."""

    #: ``"image"`` or ``"video"``.
    modality: str
    #: Name of the expert that computed it, or ``"original"``.
    expert: str
    #: The router's, of ``"original"`` and every expert, even if the choice was forced.
    probabilities: Mapping[str, float]


@dataclass
class RoutingReport:
    """The routes in a ``with experts.watched()`` block, in the order of the vision tower's calls."""

    images: list[RoutedImage] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """The number of images that went to each expert, or to the original."""
        return dict(Counter(image.expert for image in self.images))

    def __str__(self) -> str:
        return "\n".join(
            f"{image.modality} {number}: {image.expert} ("
            + ", ".join(f"{name} {share:.3f}" for name, share in image.probabilities.items())
            + ")"
            for number, image in enumerate(self.images)
        )


@dataclass(frozen=True, eq=False)
class _Block:
    """A ``with`` block that has been entered."""

    owner: Owner
    #: The argument of a ``routed`` block, in a tuple.
    choice: tuple[str | None] | None = None
    report: RoutingReport | None = None


_ENTERED: ContextVar[tuple[_Block, ...]] = ContextVar("emma_experts_blocks", default=())


@contextmanager
def _entered(block: _Block) -> Iterator[None]:
    _ENTERED.set((*_ENTERED.get(), block))
    try:
        yield
    finally:
        # Only this block is removed: asynchronous code may leave blocks in another order than it entered them.
        _ENTERED.set(tuple(entered for entered in _ENTERED.get() if entered is not block))


@contextmanager
def routed(owner: Owner, choice: str | None) -> Iterator[None]:
    """Send every image to ``choice`` within the block; None: where the router sends it."""
    with _entered(_Block(owner, choice=(choice,))):
        yield


@contextmanager
def watched(owner: Owner) -> Iterator[RoutingReport]:
    """Record routes in the report within the block."""
    report = RoutingReport()
    with _entered(_Block(owner, report=report)):
        yield report


def choice_of(owner: Owner) -> tuple[str | None] | None:
    """Return the argument of the innermost ``routed`` block, in a tuple; None outside of one."""
    return next((b.choice for b in reversed(_ENTERED.get()) if b.owner is owner and b.choice is not None), None)


def reports_of(owner: Owner) -> list[RoutingReport]:
    """Return the reports of the ``watched`` blocks that this thread or task is in."""
    return [block.report for block in _ENTERED.get() if block.owner is owner and block.report is not None]
