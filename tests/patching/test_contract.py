"""What the contract of a model family lets its author say of models that do it in another way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaModel

from emma_adapter import EmmaConfig, MediaLayout, RoutingError, patch_model, register_family
from emma_adapter.integrations.llava import LlavaFamily
from emma_adapter.integrations.qwen_vl import Qwen3VLFamily
from emma_adapter.models import registry
from emma_adapter.patching.call_plan import OuterCall
from emma_adapter.patching.planning import plan_call
from tests.support import tiny
from tests.support.zoo import ZOO, Row

QUESTIONS = ("is there a cat?", "how many dogs?")


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_FAMILIES", {})


def trained(model: nn.Module, **settings: Any) -> Any:
    adapter = patch_model(model, EmmaConfig(inner_dim=16), **{"processor": tiny.processor(), **settings})
    tiny.train_randomly(nn.ParameterList(adapter.parameters()))
    return adapter


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs).logits


def instructions(adapter: Any, run: Any) -> list[Tensor]:
    """Return the instruction tokens of each call of the adapter's module while ``run`` ran."""
    seen: list[Tensor] = []
    handle = adapter.alignment.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    try:
        run()
    finally:
        handle.remove()
    return seen


def two_rows(*images: int) -> dict[str, Any]:
    return tiny.chat_inputs([[tiny.user(text, images=n)] for text, n in zip(QUESTIONS, images, strict=True)])


# ------------------------------------------------------------------- one placeholder for images and videos


class ToldBySpans(Qwen3VLFamily):
    """Videos have the placeholders of images, and begin with a token of their own."""

    def placeholder_id(self, inner, modality):
        return super().placeholder_id(inner, "image")

    def placeholders(self, inner, input_ids):
        is_placeholder = input_ids == self.placeholder_id(inner, "image")
        is_video = (input_ids == inner.config.video_token_id).cumsum(1) > 0
        return {"image": is_placeholder & ~is_video, "video": is_placeholder & is_video}


def test_placeholders_that_spans_tell_apart():
    entry = ZOO["qwen3_vl"]
    model = entry.model()
    state = patch_model(model, processor=entry.processor())._state
    batch = entry.batch([Row(("is there a cat?",), images=((56, 56),), videos=(4,))])
    plain = plan_call(state, model.model, OuterCall(), batch)
    ids = batch["input_ids"].clone()
    videos = (ids == model.config.video_token_id).nonzero()
    # All but the first, which stands for the token before a video.
    ids[videos[1:, 0], videos[1:, 1]] = model.config.image_token_id
    state.family = ToldBySpans()
    told = plan_call(state, model.model, OuterCall(), {**batch, "input_ids": ids})
    assert torch.equal(told.placeholders["image"], plain.placeholders["image"])
    assert torch.equal(told.placeholders["video"], plain.placeholders["video"] - 1)
    assert int(told.placeholders["video"]) > 1


# ------------------------------------------------------------------------ sizes that only forward is given


class CountsCrops(LlavaModel):
    def forward(self, *args, crops=None, **kwargs):
        return super().forward(*args, **kwargs)


class Crops(LlavaFamily):
    model_types = ("llava",)
    size_arguments = ("crops",)

    def layout(self, call):
        crops = call.size("crops").tolist()
        each = int(call.placeholders.sum()) // sum(crops)
        return MediaLayout(tokens=[each * number for number in crops], entries=crops)


def test_sizes_that_no_feature_method_gets_are_those_of_the_call():
    register_family(Crops())
    model = tiny.llava()
    model.model.__class__ = CountsCrops
    adapter = trained(model)
    inputs = two_rows(2, 1)
    (seen,) = instructions(adapter, lambda: logits(model, {**inputs, "crops": torch.tensor([2, 1])}))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    with pytest.raises(RoutingError, match="an image would begin in one row"):
        logits(model, {**inputs, "crops": torch.tensor([1, 2])})
    with pytest.raises(RoutingError, match=r"without crops=.*to the author of the family"):
        logits(model, inputs)


# ------------------------------------------------------------------------------- a projector called per image


class OneByOne(nn.Module):
    def __init__(self, projector: nn.Module) -> None:
        super().__init__()
        self.each = projector

    def forward(self, visual_tokens: Tensor) -> Tensor:
        return torch.cat([self.each(image[None]) for image in visual_tokens])


class PerImage(LlavaFamily):
    model_types = ("llava",)
    projector_path = "multi_modal_projector.each"

    def layout(self, call):
        self.numbers.append(call.number)
        return MediaLayout(tokens=[call.visual_tokens.shape[1]], entries=[1], continues=True)

    def __init__(self):
        self.numbers = []


@pytest.fixture
def per_image():
    """A model that projects its images one by one, and the same with all at once."""
    whole = tiny.llava()
    expected = trained(whole)
    family = PerImage()
    register_family(family)
    model = tiny.llava()
    model.model.multi_modal_projector = OneByOne(model.model.multi_modal_projector)
    adapter = trained(model)
    adapter.alignment.load_state_dict(expected.alignment.state_dict())
    return model, adapter, whole, expected, family


def test_images_that_are_projected_one_by_one(per_image):
    model, adapter, whole, expected, family = per_image
    for images in ((2, 1), (0, 2), (1, 1)):
        inputs = two_rows(*images)
        family.numbers.clear()
        torch.testing.assert_close(logits(model, inputs), logits(whole, inputs), atol=1e-5, rtol=0)
        assert family.numbers == list(range(sum(images)))
    settings = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2}
    assert torch.equal(model.generate(**inputs, **settings), whole.generate(**inputs, **settings))
    pixels = inputs["pixel_values"]
    for named in ("is there a cat?", list(QUESTIONS)):
        with adapter.instruction(named), expected.instruction(named), torch.no_grad():
            features = [named_model.model.get_image_features(pixels) for named_model in (model, whole)]
        one, other = (getattr(output, "pooler_output", output) for output in features)
        torch.testing.assert_close(torch.cat(list(one)), torch.cat(list(other)), atol=1e-5, rtol=0)


def test_more_images_than_placeholders_are_noticed_one_by_one(per_image):
    model, *_ = per_image
    inputs = two_rows(1, 1)
    more = torch.cat([inputs["pixel_values"], inputs["pixel_values"][:1]])
    with pytest.raises(RoutingError, match="do not match"):
        logits(model, {**inputs, "pixel_values": more})


# --------------------------------------------------------------------------- a projector that embeds ids, too


class AlsoEmbeds(nn.Module):
    def __init__(self, projector: nn.Module) -> None:
        super().__init__()
        self.projector = projector
        self.table = nn.Embedding(8, 4)

    def forward(self, ids: Tensor | None = None, visual_tokens: Tensor | None = None) -> Tensor:
        return self.table(ids) if visual_tokens is None else self.projector(visual_tokens)


class Embedding(nn.Module):
    def __init__(self, projector: nn.Module) -> None:
        super().__init__()
        self.both = AlsoEmbeds(projector)

    def forward(self, visual_tokens: Tensor) -> Tensor:
        self.both(torch.arange(8)[None])
        return self.both(ids=None, visual_tokens=visual_tokens)


def test_calls_with_token_ids_pass_by():
    whole = tiny.llava()
    expected = trained(whole)
    register_family(type("Both", (LlavaFamily,), {"projector_path": "multi_modal_projector.both"})())
    model = tiny.llava()
    model.model.multi_modal_projector = Embedding(model.model.multi_modal_projector)
    adapter = trained(model)
    adapter.alignment.load_state_dict(expected.alignment.state_dict())
    inputs = two_rows(2, 1)
    assert torch.equal(logits(model, inputs), logits(whole, inputs))
    both = model.model.multi_modal_projector.both
    # Outside of any call: a text alone.
    assert torch.equal(both(ids=torch.arange(3)), both.table.weight[:3])


# ------------------------------------------------------------------------------------- encoder and decoder


class WithDecoder(LlavaForConditionalGeneration):
    """Takes labels as a decoder's: of any length."""

    def forward(self, *args, labels=None, **kwargs):
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("length", ["equal", "other"])
def test_the_labels_of_a_decoder_are_not_taken_for_a_map_of_the_prompt(length):
    model = tiny.llava()
    model.__class__ = WithDecoder
    model.config.is_encoder_decoder = True
    adapter = trained(model)
    inputs = two_rows(1, 1)
    plain = instructions(adapter, lambda: logits(model, inputs))
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -8:] = 5
    labels = labels if length == "equal" else labels[:, -3:]
    model.train()
    trained_on = instructions(adapter, lambda: model(**inputs, labels=labels))
    assert torch.equal(plain[0], trained_on[0])


# ------------------------------------------------------------------------------------------ grids as lists


def test_grids_may_be_lists_as_tolist_gives_them():
    grids = torch.tensor([[2, 3], [1, 4]]).tolist()
    layout = MediaLayout(tokens=[6, 4], entries=[1, 1], grids=grids, packed=True)
    assert layout.grids == [(2, 3), (1, 4)]
    assert hash(layout.grids[0])
