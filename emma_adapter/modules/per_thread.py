"""A value of its own for each thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class PerThread(threading.local, Generic[Value]):
    """Holds what ``make`` returns, made anew in each thread that reads ``value``.

    Set attributes of ``value``, never ``value`` itself: wherever ``torch.compile`` breaks its graph, it forgets what it
    has set on a ``threading.local`` (seen in torch 2.14).
    """

    def __init__(self, make: Callable[[], Value]) -> None:
        self.value = make()
