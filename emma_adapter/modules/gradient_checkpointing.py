"""Memories of calls, for when a checkpointed part of one is computed again in backward.

Recomputation may run in another thread, outside of the call and of the blocks it was made in, and long after other
calls. What it shares with the call is the memory of the tensors that the checkpointed part was given. A weak reference
to a storage keeps its address from being used again, which makes the address a safe key, and the entry ends with the
tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..errors import InstructionError
from .private import is_backward_running, storage_address

Value = TypeVar("Value")
_Key = tuple[int, int | torch.SymInt, torch.Size]

# A dataset that is kept in memory would otherwise add an entry for each of its tensors.
_MOST_ENTRIES = 256

_AMBIGUOUS = (
    "a checkpointed part of the model is computed again for backward, and its input was given to several calls with "
    "different instructions, or with the adapter on and off, so that it can't be told which of them this is: pass "
    "instruction= to each call, or give each a tensor of its own: input_ids.clone(), pixel_values.clone()"
)


def may_be_recomputed(module: nn.Module) -> bool:
    """Return whether a backward may follow a call of ``module``."""
    # Not only where gradients are recorded: reentrant checkpointing records none at first.
    return (
        (module.training or torch.is_grad_enabled())
        and not torch.is_inference_mode_enabled()
        and not torch.compiler.is_compiling()
    )


def with_own_memory(tensors: Any) -> Any:
    """Return a copy of a tensor, or of the first one in a list, by which a part of a call is recognised.

    The tensor itself may be given to several calls. It is not copied if the copy would have other strides, for which
    kernels may round differently.
    """
    if isinstance(tensors, Tensor):
        copied = tensors.clone()
        return copied if copied.stride() == tensors.stride() else tensors
    if isinstance(tensors, (list, tuple)) and tensors:
        return type(tensors)([with_own_memory(tensors[0]), *tensors[1:]])
    return tensors


def is_recomputing() -> bool:
    """Return whether this thread runs a backward: a forward that runs inside of one is a recomputation."""
    return not torch.compiler.is_compiling() and is_backward_running()


class RecomputationMemory(Generic[Value]):
    """A value for each call, by a tensor that the call was given: of the last 256 whose tensor still exists.

    Args:
        same: whether two values mean the same for a call; asked only where one tensor was given to several calls.
    """

    def __init__(self, same: Callable[[Value, Value], bool]) -> None:
        self._same = same
        self._entries: dict[_Key, _Entry[Value]] = {}
        self._lock = threading.Lock()

    def remember(self, tensor: Tensor, value: Value) -> None:
        if torch.compiler.is_compiling():
            # The compiler gave up on the caller, and compiles this function alone.
            return
        key, reference = _key_of(tensor), StorageWeakRef(tensor.untyped_storage())
        with self._lock:
            for expired_key in [key for key, entry in self._entries.items() if entry.reference.expired()]:
                del self._entries[expired_key]
            entry = self._entries.get(key)
            if entry is None or entry.pending == 0:
                self._entries[key] = _Entry(reference, value)
                if len(self._entries) > _MOST_ENTRIES:
                    del self._entries[next(iter(self._entries))]
                return
            entry.pending += 1
            entry.ambiguous = entry.ambiguous or not (value is entry.value or self._same(value, entry.value))

    def recall(self, tensor: Tensor) -> Value | None:
        """Return the value of the call that was given this tensor; None if none was.

        Raises:
            InstructionError: if several calls were, and their values differ.
        """
        with self._lock:
            entry = self._entries.get(_key_of(tensor))
            if entry is None:
                return None
            if entry.ambiguous:
                raise InstructionError(_AMBIGUOUS)
            entry.pending = max(0, entry.pending - 1)
            return entry.value

    def __len__(self) -> int:
        return len(self._entries)


class _Entry(Generic[Value]):
    def __init__(self, reference: StorageWeakRef, value: Value) -> None:
        self.reference = reference
        self.value = value
        #: Calls that weren't computed again yet. Once all were, the next one may have another value.
        self.pending = 1
        self.ambiguous = False


def _key_of(tensor: Tensor) -> _Key:
    return storage_address(tensor), tensor.storage_offset(), tensor.shape
