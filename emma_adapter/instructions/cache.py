"""A bounded cache that many threads may use."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, NamedTuple, TypeVar

Value = TypeVar("Value")


class CacheInfo(NamedTuple):
    """Hits, misses, capacity and size of a cache, as ``functools.lru_cache`` reports them."""

    hits: int
    misses: int
    maxsize: int
    currsize: int


class LRUCache(Generic[Value]):
    """A cache of the ``maxsize`` most recently used values; of none if it is 0.

    ``functools.lru_cache`` can't be pickled or copied with a model, and calls the function once per key, where
    a text tower needs all missing instructions as one batch.
    """

    def __init__(self, maxsize: int) -> None:
        self.maxsize = maxsize
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._lock = threading.Lock()
        self._hits = self._misses = 0

    def get_or_compute(self, keys: list[Hashable], compute: Callable[[list[Hashable]], list[Value]]) -> list[Value]:
        """Return the values of ``keys``; ``compute`` is called once for all missing keys, each listed once."""
        distinct_keys = list(dict.fromkeys(keys))
        with self._lock:
            values = {key: self._values[key] for key in distinct_keys if key in self._values}
            for key in values:
                self._values.move_to_end(key)
            missing_keys = [key for key in distinct_keys if key not in values]
            self._misses += len(missing_keys)
            self._hits += len(keys) - len(missing_keys)
        if missing_keys:
            computed = dict(zip(missing_keys, compute(missing_keys), strict=True))
            values.update(computed)
            if self.maxsize:
                with self._lock:
                    self._values.update(computed)
                    while len(self._values) > self.maxsize:
                        self._values.popitem(last=False)
        return [values[key] for key in keys]

    def info(self) -> CacheInfo:
        with self._lock:
            return CacheInfo(self._hits, self._misses, self.maxsize, len(self._values))

    def clear(self) -> None:
        with self._lock:
            self._values.clear()
            self._hits = self._misses = 0

    def __deepcopy__(self, memo: dict[int, object]) -> LRUCache[Value]:
        return type(self)(self.maxsize)

    def __reduce__(self) -> tuple[type[LRUCache[Value]], tuple[int]]:
        return type(self), (self.maxsize,)
