from __future__ import annotations

import copy
import pickle
import threading

from hypothesis import given
from hypothesis import strategies as st

from emma_adapter.instructions.cache import LRUCache


@given(st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=5), max_size=30), st.integers(0, 4))
def test_answers_are_right_and_the_size_is_bounded(requests, maxsize):
    cache = LRUCache(maxsize)
    asked = 0
    for keys in requests:
        computed = []

        def compute(missing, computed=computed):
            computed.extend(missing)
            return [10 * key for key in missing]

        assert cache.get_or_compute(keys, compute) == [10 * key for key in keys]
        assert len(computed) == len(set(computed))
        asked += len(keys)
        info = cache.info()
        assert info.currsize <= maxsize == info.maxsize
        assert info.hits + info.misses == asked


def test_the_least_recently_used_goes_first():
    cache = LRUCache(2)
    computed = []

    def get(key):
        return cache.get_or_compute([key], lambda keys: computed.extend(keys) or [str(k) for k in keys])[0]

    for key in (1, 2, 1, 3, 1, 2):
        assert get(key) == str(key)
    assert computed == [1, 2, 3, 2]
    cache.clear()
    assert cache.info() == (0, 0, 2, 0)


def test_copies_start_empty():
    cache = LRUCache(3)
    cache.get_or_compute(["a"], lambda keys: [1])
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert other.info() == (0, 0, 3, 0)
        assert other.get_or_compute(["a"], lambda keys: [2]) == [2]


def test_many_threads():
    cache = LRUCache(5)
    wrong = []

    def work(seed):
        for i in range(300):
            keys = [(seed * i + j) % 9 for j in range(3)]
            if cache.get_or_compute(keys, lambda missing: [k * k for k in missing]) != [k * k for k in keys]:
                wrong.append(keys)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cache.info().currsize <= 5
