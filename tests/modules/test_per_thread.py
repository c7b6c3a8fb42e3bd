from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from emma_adapter import EmmaConfig, get_adapter, patch_model
from emma_adapter.modules.per_thread import PerThread
from tests.support import tiny
from tests.support.zoo import ZOO, Row


class Noted:
    def __init__(self) -> None:
        self.what: object = None


def test_each_thread_has_its_own():
    notes = PerThread(Noted)
    notes.value.what = "mine"
    seen: list[object] = []

    def look() -> None:
        seen.append(notes.value.what)
        notes.value.what = "another's"

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [None]
    assert notes.value.what == "mine"


class Breaks(nn.Module):
    """A projector that may break a compiler's graph."""

    def __init__(self, projector: nn.Module) -> None:
        super().__init__()
        self.projector, self.breaks = projector, True

    def forward(self, image_features):
        if self.breaks:
            torch._dynamo.graph_break()
        return self.projector(image_features)


@pytest.mark.parametrize("place", ["before_projector", "after_projector"])
def test_what_a_hook_noted_outlives_a_break_of_the_graph(place):
    """``torch.compile`` forgot what one hook of the projector had noted for the next: whose projector runs, and what is
    aligned behind it."""
    entry = ZOO["internvl"]
    model = entry.model()
    model.model.multi_modal_projector = Breaks(model.model.multi_modal_projector)
    inputs = entry.batch([Row(("how many?",), images=((56, 56),))])
    with torch.no_grad():
        before = model(**inputs).logits
    adapter = patch_model(model, EmmaConfig(inner_dim=8, num_heads=2, place=place), processor=entry.processor())
    tiny.train_randomly(adapter.alignment)
    # The adapter's own goes on breaking the graph.
    adapter.train_only(projector=True)
    model.model.multi_modal_projector.breaks = False
    tiny.train_randomly(adapter.projector, scale=0.1)
    model.eval()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        expected = model(**inputs).logits
        assert not torch.allclose(expected, before, atol=1e-3)
        torch.testing.assert_close(compiled(**inputs).logits, expected)
        with get_adapter(compiled).disabled():
            torch.testing.assert_close(compiled(**inputs).logits, before)
