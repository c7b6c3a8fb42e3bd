"""JSON of strangers: what is nested too deeply for code that walks it is refused when it is read."""

from __future__ import annotations

import json

import pytest

from emma_adapter.files.untrusted import MAX_NESTING, parse_json


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a": ', "}")], ids=["lists", "objects"])
def test_so_many_levels_are_read_and_no_more(opening, closing):
    def nested(levels: int) -> str:
        return opening * levels + "1" + closing * levels

    assert parse_json(nested(MAX_NESTING)) == json.loads(nested(MAX_NESTING))
    with pytest.raises(ValueError, match=f"nested more than {MAX_NESTING} levels deep"):
        parse_json(nested(MAX_NESTING + 1))
    with pytest.raises(ValueError, match="nested"):
        parse_json(nested(100_000))
