"""A value of its own for each thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class PerThread(threading.local, Generic[Value]):
    """Holds what ``make`` returns, made anew in each thread that looks.

    What changes are the attributes of ``value``, never an attribute of this: ``torch.compile`` (seen in torch 2.14)
    forgets those that it has set on a ``threading.local`` wherever it breaks its graph.
    """

    def __init__(self, make: Callable[[], Value]) -> None:
        self.value = make()
