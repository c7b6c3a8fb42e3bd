"""Blocks such as ``with adapter.disable_adapter()``, and the scope they make in the current thread or task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from ..instructions.pipeline import InstructionTokens


class BlockOwner:
    """Stands for a patched model in its blocks, so that they don't keep the model alive."""


@dataclass(frozen=True, eq=False)
class Block:
    """One ``with`` block that was entered."""

    owner: BlockOwner
    #: Name of the adapter that was active when it was entered.
    adapter: str
    #: None if the block disables the adapter, or makes calls go through another one.
    instruction: InstructionTokens | None
    #: The adapter that calls in the block go through.
    uses: str | None = None


@dataclass(frozen=True)
class Scope:
    """The combined effect of all blocks that a call is in."""

    disabled: bool = False
    #: The innermost block that names an instruction.
    named: Block | None = None
    #: The adapter that calls go through, if it isn't the one that is active in all threads.
    adapter: str | None = None

    def means(self, other: Scope) -> bool:
        """Return whether a call does the same in the other scope."""
        if self.disabled or other.disabled:
            return self.disabled == other.disabled
        if self.adapter != other.adapter:
            return False
        block, other_block = self.named, other.named
        if block is None or other_block is None or block is other_block:
            return block is other_block
        assert block.instruction is not None and other_block.instruction is not None
        return block.adapter == other_block.adapter and block.instruction.equals(other_block.instruction)


# A context variable rather than a thread-local one: tasks of one event loop take turns in a thread.
_ENTERED: ContextVar[tuple[Block, ...]] = ContextVar("emma_adapter_blocks", default=())


@contextmanager
def entered(block: Block) -> Iterator[None]:
    _ENTERED.set((*_ENTERED.get(), block))
    try:
        yield
    finally:
        # Not the earlier value: asynchronous code may leave blocks in another order than it entered them.
        _ENTERED.set(tuple(other for other in _ENTERED.get() if other is not block))


def current_scope(owner: BlockOwner) -> Scope:
    """Return the scope of the current thread or task."""
    blocks = [block for block in _ENTERED.get() if block.owner is owner]
    named = [block for block in blocks if block.instruction is not None]
    adapters = [block.uses for block in blocks if block.uses is not None]
    disabled = len(named) + len(adapters) < len(blocks)
    return Scope(disabled, named[-1] if named else None, adapters[-1] if adapters else None)
