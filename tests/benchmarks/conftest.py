"""The tests here hold the benchmarks, not the library: ``make test-benchmarks``, and the full tier, run them."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.nightly)
