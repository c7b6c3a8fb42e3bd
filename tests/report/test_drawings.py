"""The report on a model that draws: its pictures are the library's, its previews and differences the formulas'."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from emma_adapter import UnifiedConfig, add_vision_expert
from emma_adapter.report import make_drawing_report, render
from emma_adapter.unified.flow import clean_estimate
from tests.support import tiny
from tests.unified.small import picture, seeded, unified

from .test_report import HOSTILE, check, text_of

SIZE = {"height": 64, "width": 64}
ROWS = [
    {"prompt": "a red five"},
    {"prompt": "make it blue", "image": picture(0, 64, 64), "target": picture(1, 64, 64)},
    {"prompt": "both", "image": [picture(2, 64, 64), picture(3, 96, 64)], "target": None},
]


@pytest.fixture(scope="module")
def drawer():
    """With a vision expert that takes some pictures."""
    made = unified("qwen3_vl", UnifiedConfig(decoupling=2))
    experts = add_vision_expert(made.model, "stem", layers=1)
    tiny.train_randomly(made.model.emma_experts)
    experts.margin = 0.02
    return made, experts


def report_of(made, rows=ROWS, **settings):
    return make_drawing_report(made, rows, **{"num_inference_steps": 3, "previews": 2, "seed": 7, **SIZE, **settings})


@pytest.fixture(scope="module")
def report(drawer):
    return report_of(drawer[0], model_name="tiny/qwen", adapter_name="my drawing")


def generate(made, row, seed, **settings):
    given = {"num_inference_steps": 3, "generator": seeded(seed), **SIZE, **settings}
    image = row.get("image")
    return made.generate_images(row["prompt"], None if image is None else [image], **given).images


def test_pictures_are_the_librarys(drawer, report):
    assert [own.number for own in report.drawn] == [1, 2, 3]
    for own, row in zip(report.drawn, ROWS, strict=True):
        want = generate(drawer[0], row, own.seed)[0]
        assert np.array_equal(own.picture, want) and own.picture.size == (64, 64)
    assert [own.seed for own in report.drawn] == [7, 8, 9]


def test_a_row_is_the_same_whichever_others_are_shown(drawer, report):
    few = report_of(drawer[0], show=2)
    assert [own.number for own in few.drawn] == [1, 3] and few.rows == 3
    for own, before in zip(few.drawn, report.drawn[::2], strict=True):
        assert np.array_equal(own.picture, before.picture) and own.seed == before.seed
    assert "2 of 3 rows" in render(few) and "All rows" in render(report)


def test_previews_are_what_a_step_to_the_end_would_draw(drawer, report):
    """x_t - t·v is one Euler step from t to 0."""
    for own, row in zip(report.drawn, ROWS, strict=True):
        states = [torch.randn(1, 8, 2, 2, generator=seeded(own.seed))]
        generate(
            drawer[0], row, own.seed, callback_on_step_end=lambda _, n, t, given, s=states: s.append(given["latents"])
        )
        assert [preview.step for preview in own.previews] == [1, 2]
        for preview in own.previews:
            last = {"latents": states[preview.step - 1], "sigmas": [preview.time], "generator": None}
            want = np.asarray(generate(drawer[0], row, 0, **last)[0], np.int16)
            # Up to rounding, which the division by the step's length makes larger.
            assert np.abs(np.asarray(preview.picture, np.int16) - want).max() <= 1
        assert [preview.time for preview in own.previews] == pytest.approx([1, 6 / 7])
    assert not np.array_equal(report.drawn[0].previews[0].picture, report.drawn[0].picture)


def test_the_clean_estimate_is_the_formula():
    x0, noise = torch.randn(2, 2, 8, 3, 3, generator=seeded(), dtype=torch.float64)
    before, after = 0.2 * x0 + 0.8 * noise, 0.7 * x0 + 0.3 * noise
    torch.testing.assert_close(clean_estimate(before, after, 0.8, 0.3), x0)
    assert torch.equal(clean_estimate(before, after, 0.8, 0.0).float(), after.float())


def test_differences(drawer, report):
    assert report.drawn[0].difference is None
    own = report.drawn[1]
    apart = np.abs(np.asarray(own.picture, np.int16) - np.asarray(own.sources[0], np.int16))
    assert np.array_equal(own.difference.picture, np.minimum(apart * 4, 255))
    assert own.difference.mean == pytest.approx(apart.mean() / 255) and not own.difference.resized
    page = render(report)
    assert f"times 4; its mean is {own.difference.mean:.1%} of the range" in page
    assert "differs by 1/4 of the range" in page
    wide = report_of(drawer[0], ROWS[1:2], width=96, amplification=2.5, num_inference_steps=1, previews=3).drawn[0]
    assert wide.difference.resized and wide.difference.picture.size == wide.picture.size == (96, 64)
    assert wide.previews == ()


def test_where_experts_took_the_pictures(drawer, report):
    """As each picture by itself is routed."""
    made, experts = drawer
    assert report.drawn[0].routed == () and [len(own.routed) for own in report.drawn[1:]] == [1, 2]
    processor = made._state.processor.image_processor
    seen = set()
    for own in report.drawn[1:]:
        for source, routed in zip(own.sources, own.routed, strict=True):
            inputs = processor(images=[source], return_tensors="pt")
            with torch.no_grad(), experts.watched() as alone:
                made.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
            assert routed.expert == alone.images[0].expert
            assert routed.probabilities == pytest.approx(alone.images[0].probabilities, abs=1e-5)
            margin = routed.probabilities["stem"] - routed.probabilities["original"]
            assert (routed.expert == "stem") is (margin > experts.margin)
            assert f"<bdi>{routed.expert}</bdi></td><td><bdi>{margin:+.3f}</bdi>" in render(report)
            seen.add(routed.expert)
    assert seen == {"stem", "original"} and "Vision experts" in report.facts
    assert [len(own.routed) for own in report_of(made, guidance_scale=1, image_guidance_scale=1).drawn] == [0, 1, 2]


@pytest.mark.parametrize(("name", "kind"), [("llava_next", "Source"), ("internvl", "Tile")])
def test_what_guidance_reads_again_is_told_once(name, kind):
    """InternVL's model isn't told which tiles are of one picture."""
    made = unified(name, UnifiedConfig(decoupling=2))
    tiny.train_randomly(add_vision_expert(made.model, "stem", layers=1).model.emma_experts)
    quick = {"num_inference_steps": 1, "previews": 0}
    plain = report_of(made, ROWS[2:], guidance_scale=1, image_guidance_scale=1, **quick)
    guided = report_of(made, ROWS[2:], **quick)
    assert len(plain.drawn[0].routed) == len(guided.drawn[0].routed) == (2 if kind == "Source" else 4)
    for one, other in zip(plain.drawn[0].routed, guided.drawn[0].routed, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
    assert f"{kind} 2</bdi></th>" in render(guided)


def test_the_page_is_sound_whatever_the_prompts_are(drawer):
    rows = [{"prompt": prompt, "image": picture(number, 64, 64)} for number, prompt in enumerate(HOSTILE[:5])]
    rows[0]["target"] = picture(9, 200, 120)
    names = {"model_name": HOSTILE[0], "adapter_name": HOSTILE[1]}
    report = report_of(
        drawer[0], rows, num_inference_steps=2, previews=1, guidance_scale=1, image_guidance_scale=1, **names
    )
    tree = check(render(report))
    for prompt, title in zip(HOSTILE[:4], text_of(tree, "h3"), strict=False):
        assert title == " ".join(prompt.split())
    images = list(tree.iter("img"))
    # Source, edited, difference and one preview of each row, and what is wanted of the first.
    assert len(images) == 4 * 5 + 1
    assert all("row" in image.attrib["alt"] for image in images)
    # Exact where it is small.
    shown = Image.open(io.BytesIO(base64.b64decode(images[2].attrib["src"].split(",")[1])))
    assert np.array_equal(shown, report.drawn[0].picture)


def test_the_facts_are_the_branchs(drawer, report):
    facts, made = report.facts, drawer[0]
    own = sum(parameter.numel() for parameter in made.parameters())
    assert facts["Parameters"].startswith(f"{own:,}, ")
    assert facts["Decoupling"].startswith("copies of rank 2; the first 1 of 2 layers")
    assert facts["Autoencoder"] == "AutoencoderDC, 32 pixels a latent, 8 channels"
    page = render(report)
    assert all(name in page for name in ("tiny/qwen", "my drawing", *facts, *report.settings))


def test_nothing_is_said_of_experts_where_there_are_none():
    report = report_of(unified("qwen3_vl", UnifiedConfig(decoupling=2)), ROWS[1:2], num_inference_steps=1)
    assert report.margin is None and report.drawn[0].routed == () and "Vision experts" not in report.facts
    assert "expert" not in render(report)
