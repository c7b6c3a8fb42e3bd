"""``with adapter.disable_adapter()`` and ``with adapter.instruction(…)``: what holds in the current thread or task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from ..instructions.pipeline import InstructionTokens


class BlockOwner:
    """Stands for a patched model in its blocks, which don't keep the model alive."""


@dataclass(frozen=True, eq=False)
class Block:
    """One entered ``with``."""

    owner: BlockOwner
    #: Name of the adapter that was active when it was entered.
    adapter: str
    #: None if the block disables the adapter, or has another one be used.
    instruction: InstructionTokens | None
    #: The adapter that calls in the block go through.
    uses: str | None = None


@dataclass(frozen=True)
class Scope:
    """What all blocks that a call is in mean for it."""

    disabled: bool = False
    #: The innermost block that names an instruction.
    named: Block | None = None
    #: The adapter that calls go through, if not the one that is active for everybody.
    adapter: str | None = None

    def means(self, other: Scope) -> bool:
        """Whether a call does the same in the other."""
        if self.disabled or other.disabled:
            return self.disabled == other.disabled
        if self.adapter != other.adapter:
            return False
        one, another = self.named, other.named
        if one is None or another is None or one is another:
            return one is another
        assert one.instruction is not None and another.instruction is not None
        return one.adapter == another.adapter and one.instruction.equals(another.instruction)


# A context variable rather than a field of the thread: tasks of one event loop take turns in a thread.
_ENTERED: ContextVar[tuple[Block, ...]] = ContextVar("emma_adapter_blocks", default=())


@contextmanager
def entered(block: Block) -> Iterator[None]:
    _ENTERED.set((*_ENTERED.get(), block))
    try:
        yield
    finally:
        # Not what was before: asynchronous code may leave blocks in another order than it entered them.
        _ENTERED.set(tuple(other for other in _ENTERED.get() if other is not block))


def current_scope(owner: BlockOwner) -> Scope:
    """Of the thread or task that asks."""
    blocks = [block for block in _ENTERED.get() if block.owner is owner]
    named = [block for block in blocks if block.instruction is not None]
    used = [block.uses for block in blocks if block.uses is not None]
    return Scope(len(named) + len(used) < len(blocks), named[-1] if named else None, used[-1] if used else None)
