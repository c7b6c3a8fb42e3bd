"""Where images go, and that the original's keep every bit."""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest
import torch
from torch import nn

from emma_adapter import (
    ConfigError,
    EmmaVisionExperts,
    RoutingError,
    UnsupportedModelError,
    add_vision_expert,
)
from emma_adapter.experts.module import VisionExperts
from tests.experts.small import (
    REFUSED,
    ROWS,
    WITH_EXPERTS,
    change,
    features,
    learn_router,
    pixels_of,
    same,
    stock_with,
    used_mlps,
    with_expert,
)
from tests.support import tiny
from tests.support.remote_internvl import internvl_chat
from tests.support.remote_llava import llava_original
from tests.support.zoo import ZOO, Row

entries = pytest.mark.parametrize("name", WITH_EXPERTS)
#: Families in which nothing tells which tiles are of one image: each tile is routed on its own.
TILES_ALONE = ("internvl", "idefics3", "smolvlm", "cohere2_vision", "aya_vision", "ovis2", "lfm2_vl")
TILES_ALONE += ("minicpmv4_6", "minicpmv4_7")
#: Families in which nothing tells which frames are of one video, either.
FRAMES_ALONE = tuple(name for name in ("minicpmv4_6", "minicpmv4_7") if name in ZOO)


def labelled(count: int) -> list[str]:
    return ["stem" if number % 2 else "original" for number in range(count)]


def routed_images(experts, batch) -> list[str]:
    with experts.watched() as report:
        features(experts.model, batch)
    return [image.expert for image in report.images]


@entries
def test_a_new_expert_changes_no_bit(name):
    batch = ZOO[name].batch(ROWS)
    stock = ZOO[name].model()
    want = stock(**batch).logits
    experts = with_expert(name, trained=False)
    assert set(routed_images(experts, batch)) == {"original"}
    assert torch.equal(experts.model(**batch).logits, want)
    with experts.routed("stem"):
        assert torch.equal(experts.model(**batch).logits, want)


@entries
def test_images_of_the_original_keep_their_bits_beside_others(name):
    """And the others are what a stock model computes that has the expert's weights."""
    batch = ZOO[name].batch(ROWS)
    experts = with_expert(name)
    original, other = features(ZOO[name].model(), batch), features(stock_with(experts), batch)
    assert not any(same(original, other))
    with experts.routed("stem"):
        assert all(same(features(experts.model, batch), other))
    images = routed_images(experts, batch)
    if name not in TILES_ALONE:
        assert len(images) == len(ROWS)
        labels = labelled(len(images))
    elif name not in ("idefics3", "smolvlm"):
        assert len(images) == len(original) > len(ROWS)
        labels = labelled(len(images))
    else:
        # Of each row as many tiles as its share of the tokens.
        tiles = [len(images) * len(row) // sum(map(len, original)) for row in original]
        labels = [label for number, label in zip(tiles, labelled(len(tiles)), strict=True) for _ in range(number)]
    learn_router(experts, labels, pixels_of(batch))
    assert routed_images(experts, batch) == labels
    mixed = features(experts.model, batch)
    rows = labelled(len(mixed))
    assert same(mixed, original) == [label == "original" for label in rows]
    assert same(mixed, other) == [label == "stem" for label in rows]


@pytest.mark.parametrize("name", FRAMES_ALONE)
def test_each_frame_goes_its_own_way_where_nothing_tells_the_video(name):
    batch = ZOO[name].batch([Row(videos=(3,), seed=2), Row(videos=(2,), seed=3)])
    experts = with_expert(name)
    original, other = features(ZOO[name].model(), batch), features(stock_with(experts), batch)
    labels = labelled(5)
    learn_router(experts, labels, pixels_of(batch))
    with experts.watched() as report:
        mixed = features(experts.model, batch)
    assert [(image.modality, image.expert) for image in report.images] == [("video", label) for label in labels]
    assert same(mixed, original) == [label == "original" for label in labels]
    assert same(mixed, other) == [label == "stem" for label in labels]


@pytest.mark.parametrize(
    "name", [entry.name for entry in ZOO.values() if entry.videos and entry.name not in FRAMES_ALONE]
)
def test_a_video_goes_one_way_with_all_its_frames(name):
    rows = [Row(images=((56, 56),), seed=1), Row(videos=(4,), seed=2), Row(images=((28, 84),), videos=(4,), seed=3)]
    batch = ZOO[name].batch(rows)
    experts = with_expert(name)
    original, other = features(ZOO[name].model(), batch), features(stock_with(experts), batch)
    labels = ["stem", "original", "original", "stem"]
    learn_router(experts, labels, pixels_of(batch))
    with experts.watched() as report:
        mixed = features(experts.model, batch)
    assert [(image.modality, image.expert) for image in report.images] == list(
        zip(["image", "image", "video", "video"], labels, strict=True)
    )
    assert same(mixed, original) == [label == "original" for label in labels]
    assert same(mixed, other) == [label == "stem" for label in labels]


@pytest.mark.parametrize("name", REFUSED)
def test_the_others_are_refused_with_the_reason(name):
    with pytest.raises(UnsupportedModelError, match=REFUSED[name]):
        with_expert(name)


def test_nothing_is_computed_where_nothing_is_routed_away(monkeypatch):
    experts = with_expert("qwen3_vl")
    batch = ZOO["qwen3_vl"].batch(ROWS)
    asked = []
    monkeypatch.setattr(VisionExperts, "compute", lambda *args, **kwargs: asked.append(args))
    experts.model(**batch)
    with experts.routed("original"):
        experts.model(**batch)
    assert not asked


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "llava_pixtral"])
def test_the_router_is_its_formula(name):
    """softmax of 0 and w·norm(mean of the image's tokens) + b, and the margin between the first and the best."""
    batch = ZOO[name].batch(ROWS)
    experts = with_expert(name, layers=1)
    add_vision_expert(experts.model, "maps")
    router = experts.model.emma_experts.router
    tiny.train_randomly(router, 2.0, seed=3)
    seen = []
    # The first routed block is the only one.
    mlp = used_mlps(experts.model, 1)[0]
    [block] = [m for m in experts.model.modules() if any(child is mlp for child in m.children())]
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0].double()), with_kwargs=True)
    with experts.watched() as report:
        features(experts.model, batch)
    handle.remove()
    [hidden] = seen
    if name == "qwen3_vl":
        images = hidden.split(batch["image_grid_thw"].prod(1).tolist())
    elif name == "llava_pixtral":
        images = hidden[0].split((batch["image_sizes"] // tiny.PATCH).prod(1).tolist())
    else:
        images = list(hidden)
    for tokens, image in zip(images, report.images, strict=True):
        mean = tokens.mean(0)
        normed = (mean - mean.mean()) / (mean.var(unbiased=False) + 1e-5).sqrt()
        logits = [torch.zeros((), dtype=torch.double)]
        logits += [router[f"{n}/weight"].double() @ normed + router[f"{n}/bias"].double()[0] for n in ("stem", "maps")]
        want = torch.stack(logits).softmax(0)
        torch.testing.assert_close(torch.tensor(list(image.probabilities.values())).double(), want, atol=1e-5, rtol=0)
        best = max(("stem", "maps"), key=image.probabilities.__getitem__)
        gap = image.probabilities[best] - image.probabilities["original"]
        assert image.expert == (best if gap > 0.2 else "original")
        for margin, expert in ((max(gap - 1e-6, 0), best if gap > 0 else "original"), (max(gap, 0), "original")):
            experts.margin = margin
            with experts.watched() as again:
                features(experts.model, batch)
            assert again.images[report.images.index(image)].expert == expert
        experts.margin = 0.2


def test_several_experts_in_one_batch():
    name = "qwen2_5_vl"
    batch = ZOO[name].batch(ROWS)
    experts = with_expert(name)
    again = add_vision_expert(experts.model, "maps")
    change(again, "maps", seed=1)
    assert again.names == experts.names == ("stem", "maps") and repr(again) == repr(experts)
    labels = ["maps", "original", "stem", "maps"]
    learn_router(experts, labels, pixels_of(batch))
    found = {"original": features(ZOO[name].model(), batch)}
    found |= {expert: features(stock_with(experts, expert), batch) for expert in experts.names}
    mixed = features(experts.model, batch)
    for number, label in enumerate(labels):
        assert [torch.equal(mixed[number], found[one][number]) for one in found] == [one == label for one in found]


def test_blocks_that_the_model_does_not_use_have_no_expert():
    """LLaVA takes the output of the last block but one."""
    model = ZOO["llava"].model()
    with pytest.raises(ConfigError, match="the 2 blocks"):
        add_vision_expert(model, "stem", 3)
    blocks = model.model.vision_tower.encoder.layers
    experts = add_vision_expert(model, "stem", 1)
    places = [any("emma" in name for name in vars(block)) for block in blocks]
    assert (experts.layers, places) == (1, [False, True, False])


def test_generation_goes_where_the_router_says():
    name = "qwen3_vl"
    batch = ZOO[name].batch(ROWS)
    experts = with_expert(name)
    change(experts, seed=5)
    learn_router(experts, labelled(len(ROWS)), pixels_of(batch))
    settings = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    want = ZOO[name].model().generate(**batch, **settings).logits[0]
    other = stock_with(experts).generate(**batch, **settings).logits[0]
    with experts.watched() as report:
        found = experts.model.generate(**batch, **settings).logits[0]
    assert report.counts == {"original": 2, "stem": 2}
    assert [torch.equal(*pair) for pair in zip(found, want, strict=True)] == [True, False, True, False]
    assert [torch.equal(*pair) for pair in zip(found, other, strict=True)] == [False, True, False, True]


def test_blocks_hold_for_one_model_in_one_thread_or_task():
    batch = ZOO["llava"].batch(ROWS[:2])
    experts, bystander = with_expert(), with_expert()
    original, stem = features(ZOO["llava"].model(), batch), features(stock_with(experts), batch)

    async def run(choice, want, turns):
        with experts.routed(choice):
            for _ in range(turns):
                await asyncio.sleep(0)
                assert all(same(features(experts.model, batch), want))

    async def together():
        await asyncio.gather(run("stem", stem, 3), run("original", original, 2), run(None, original, 2))

    asyncio.run(together())
    with experts.routed("stem"):
        assert all(same(features(bystander.model, batch), original))
        with experts.routed("original"):
            assert all(same(features(experts.model, batch), original))
        with experts.routed(None):
            assert all(same(features(experts.model, batch), original))
        assert all(same(features(experts.model, batch), stem))
    wrong, barrier = [], threading.Barrier(2)

    def work(choice, want):
        barrier.wait()
        for _ in range(10):
            with experts.routed(choice):
                if not all(same(features(experts.model, batch), want)):
                    wrong.append(choice)

    threads = [threading.Thread(target=work, args=pair) for pair in (("stem", stem), ("original", original))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_report_tells_every_image_and_nothing_is_kept_outside():
    batch = ZOO["llava"].batch(ROWS)
    experts = with_expert()
    with experts.watched() as report, experts.routed("stem"):
        features(experts.model, batch)
    assert report.counts == {"stem": len(ROWS)}
    assert str(report).splitlines()[0].startswith("image 0: stem (original 0.8")
    assert sum(report.images[0].probabilities.values()) == pytest.approx(1)
    tensors = [sum(type(o) is torch.Tensor for o in gc.get_objects()) for _ in range(3) if features_of(experts, batch)]
    assert tensors[1] == tensors[2] and len(report.images) == len(ROWS)


def features_of(experts, batch) -> bool:
    features(experts.model, batch)
    gc.collect()
    return True


def test_the_tower_by_itself_is_refused_unless_told():
    model = with_expert("llava").model
    pixels = ZOO["llava"].batch(ROWS)["pixel_values"]
    with pytest.raises(RoutingError, match="called by itself"):
        model.model.vision_tower(pixels)
    with EmmaVisionExperts(model).routed("original"):
        want = ZOO["llava"].model().model.vision_tower(pixels).last_hidden_state
        assert torch.equal(model.model.vision_tower(pixels).last_hidden_state, want)


@pytest.mark.parametrize(
    ("make", "side", "encode"),
    [
        (internvl_chat, 32, lambda model, pixels: model.extract_feature(pixels)),
        (llava_original, tiny.IMAGE_SIZE, lambda model, pixels: model.encode_images(pixels)),
    ],
    ids=["internvl_chat", "llava_original"],
)
@torch.no_grad()
def test_classes_of_their_own_route_each_tile(make, side, encode):
    model, stock = make(), make()
    experts = add_vision_expert(model, "stem", 1)
    change(experts)
    pixels = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    want = encode(stock, pixels)
    with experts.watched() as report:
        assert torch.equal(encode(model, pixels), want)
    assert report.counts == {"original": 3}
    with experts.routed("stem"):
        assert not torch.equal(encode(model, pixels), want)
    with pytest.raises(UnsupportedModelError, match="get_image_features"):
        experts.router_loss(labels=["stem"] * 3, pixel_values=pixels, images=pixels)


def test_an_expert_has_no_module_that_peft_could_wrap():
    experts = with_expert("qwen3_vl")
    kinds = {type(module) for module in experts.model.emma_experts.modules()}
    assert kinds == {VisionExperts, nn.ParameterDict}


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_compiled_model_routes_as_it_would():
    name = "qwen3_vl"
    batch = ZOO[name].batch(ROWS)
    experts = with_expert(name)
    with torch.enable_grad():
        learn_router(experts, labelled(len(ROWS)), pixels_of(batch))
    compiled = torch.compile(experts.model, backend="eager")
    for choice in (None, "stem", "original"):
        with experts.routed(choice):
            assert torch.equal(compiled(**batch).logits, experts.model(**batch).logits)
