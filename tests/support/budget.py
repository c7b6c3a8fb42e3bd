"""How much is tried: by ``make test`` as much as eight minutes allow, by ``make test-all`` everything.

The everyday tier draws few of what is drawn at random, and of a product of parameters as many that each pair of them
meets; it leaves out what is marked ``nightly``. The full one has the numbers that the README promises, other random
draws each time, and no test left out.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

FULL = os.environ.get("TEST_BUDGET") == "full"
#: What random draws start from: always the same in the everyday tier, in the full one what the run began by printing.
SEED = int(os.environ.get("TEST_SEED", "0"))


def budget(everyday: T, full: T) -> T:
    """Return how many, or which, are tried."""
    return full if FULL else everyday


def combinations(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Return the product of two or three axes; of three, in the everyday tier, as many that every two values meet.

    Where the first axis is at least as long as the third, and so is the second.
    """
    first, second, *rest = map(list, axes)
    if FULL or not rest:
        return list(itertools.product(first, second, *rest))
    [third] = rest
    return [(a, b, third[(i + j) % len(third)]) for i, a in enumerate(first) for j, b in enumerate(second)]


def some(number: int, axis: Iterable[Any], others: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Return the product of two axes; in the everyday tier, for each value of the first ``number`` of the second."""
    chosen = len(others) if FULL else min(number, len(others))
    return [(a, others[(i * chosen + k) % len(others)]) for i, a in enumerate(axis) for k in range(chosen)]
