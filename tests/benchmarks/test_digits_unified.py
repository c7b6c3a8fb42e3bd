"""The drawing benchmark: exact scenes and edits, true captions, what the judge scores, and the shipped files."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from sklearn.datasets import load_digits
from torch import nn
from transformers import AutoProcessor

from benchmarks.digits_unified import (
    captions,
    comparisons,
    demo,
    judge,
    make_adapter,
    make_autoencoder,
    make_base,
    records,
    runs,
    training,
    vlm,
)
from benchmarks.digits_unified.captions import EDITS, caption, question, sample_edits
from benchmarks.digits_unified.scenes import (
    CELL,
    COLUMNS,
    GRIDS,
    HELD_OUT,
    ROWS,
    Scenes,
    render,
    sample_scenes,
    to_cells,
)
from benchmarks.digits_vqa.scenes import COLOURS, DIGITS, EMPTY, SPLITS

grids = pytest.mark.parametrize("grid", GRIDS)


def sampled(grid: int = 2, split: str = "test", n: int = 300, seed: int = 0, **options) -> Scenes:
    return sample_scenes(n, split, np.random.default_rng(seed), grid=grid, **options)


def combinations(scenes: Scenes) -> set[tuple[str, str]]:
    full = scenes.digits != EMPTY
    return {(DIGITS[d], COLOURS[c]) for d, c in zip(scenes.digits[full], scenes.colours[full], strict=True)}


def facts(scenes: Scenes, i: int) -> dict[str, tuple[str, str] | None]:
    """Place to (colour, digit), or None where the cell is empty."""
    grid = scenes.grid
    places = [f"{row} {column}" for row in ROWS[grid] for column in COLUMNS[grid]]
    cells = zip(scenes.colours[i], scenes.digits[i], strict=True)
    return {place: None if d == EMPTY else (COLOURS[c], DIGITS[d]) for place, (c, d) in zip(places, cells, strict=True)}


@grids
def test_pictures_are_reproducible_and_a_cell_is_32_pixels(grid):
    first, second = (render(sampled(grid, n=4, hand="varied")) for _ in range(2))
    assert first.shape == (4, 3, 32 * grid, 32 * grid)
    assert torch.equal(first, second)
    assert torch.equal((first * 255).round() / 255, first)
    assert first.min() >= 0 and first.max() <= 1


def test_a_cell_shows_its_digit_and_nothing_of_its_neighbours():
    scenes = sampled(n=20, hand="varied")
    first = to_cells(render(scenes))[:, 0]
    alone = scenes.digits.copy()
    alone[:, 1:] = EMPTY
    assert torch.equal(first, to_cells(render(replace(scenes, digits=alone)))[:, 0])
    ground = torch.as_tensor(scenes.grounds)[:, :, None, None]
    inked = ((first - ground).abs() > 1 / 255).flatten(1).any(1).numpy()
    assert (inked == (scenes.digits[:, 0] != EMPTY)).all()


def test_no_handwriting_is_in_two_splits():
    used = {}
    for split in SPLITS:
        scenes = sampled(3, split, n=1000)
        after = sample_edits(scenes, split, np.random.default_rng(1)).after
        used[split] = set()
        for one in (scenes, after):
            full = one.digits != EMPTY
            assert (load_digits().target[one.scans[full]] == one.digits[full]).all()
            used[split] |= set(one.scans[full].tolist())
    assert not (used["train"] & used["test"] or used["train"] & used["validation"] or used["validation"] & used["test"])


@grids
def test_held_out_combinations_are_in_no_training_scene_nor_edit(grid):
    scenes = sampled(grid, "train", n=2000)
    assert len(combinations(scenes)) == 36 and not combinations(scenes) & HELD_OUT
    assert not combinations(sample_edits(scenes, "train", np.random.default_rng(1)).after) & HELD_OUT
    held_out = sampled(grid, combinations="held out", n=200)
    assert all(combinations(held_out[i : i + 1]) & HELD_OUT for i in range(len(held_out)))
    assert combinations(sampled(grid, combinations="all", n=1000)) > HELD_OUT


@grids
def test_an_edit_changes_its_cells_and_no_other_pixel(grid):
    scenes = sampled(grid)
    edits = sample_edits(scenes, "test", np.random.default_rng(1))
    assert set(edits.kinds) == set(EDITS)
    different = (to_cells(render(edits.before)) != to_cells(render(edits.after))).flatten(2).any(2).numpy()
    assert (different == edits.changed).all()
    for kind, cells in (("recolour", 1), ("replace", 1), ("remove", 1), ("add", 1), ("move", 2)):
        assert (edits.changed[edits.kinds == kind].sum(1) == cells).all()


@grids
def test_an_edit_is_what_its_instruction_says(grid):
    edits = sample_edits(sampled(grid), "test", np.random.default_rng(1))
    for i, instruction in enumerate(edits.instructions):
        before, after = facts(edits.before, i), facts(edits.after, i)
        verb, *words = instruction.split()
        if verb == "add":
            place = " ".join(words[-2:])
            assert before[place] is None
            before[place] = (words[1], words[2])
        else:
            end = words[:2] == ["the", "digit"]
            [place] = (
                [" ".join(words[4:6])] if end else [p for p, cell in before.items() if cell and cell[1] == words[1]]
            )
            colour, digit = before[place]
            before[place] = {
                "make": (words[-1], digit),
                "replace": (colour, words[-1]),
                "remove": None,
                "move": None,
            }[verb]
            if verb == "move":
                target = " ".join(words[-2:])
                assert before[target] is None and target != place
                before[target] = (colour, digit)
            assert bool(edits.by_name[i]) != end
        assert before == after


@grids
def test_captions_say_what_is_there_in_words_that_the_tokenizer_has(grid):
    scenes, rng = sampled(grid, n=100), np.random.default_rng(1)
    orders = set()
    for i in range(len(scenes)):
        text = caption(scenes.digits[i], scenes.colours[i], rng)
        said = {" ".join(phrase.split()[-2:]): phrase.split()[:-2] for phrase in text.split(" , ")}
        orders.add(tuple(said))
        wanted = facts(scenes, i)
        assert said == {place: ["empty"] if cell is None else list(cell) for place, cell in wanted.items()}
        without = caption(scenes.digits[i], scenes.colours[i], rng, places=False)
        assert sorted(without.split(" , ")) == sorted(
            "empty" if cell is None else " ".join(cell) for cell in wanted.values()
        )
        asked, answer = question(scenes.digits[i], scenes.colours[i], rng)
        assert set(f"{text} {asked} {answer}".split()) <= set(captions.WORDS)
    assert len(orders) > 20
    assert set(" ".join(sample_edits(scenes, "test", rng).instructions).split()) <= set(captions.WORDS)


def test_the_judge_scores_known_cases():
    scenes = sampled(n=1)
    scenes = replace(scenes, digits=np.array([[3, 7, EMPTY, 3]]), colours=np.array([[0, 1, EMPTY, 2]]))

    def score(digits: list[int], colours: list[int]) -> dict[str, float]:
        return judge.mean(judge.score_drawings(judge.Reading(np.array([digits]), np.array([colours])), scenes))

    perfect = score([3, 7, EMPTY, 3], [0, 1, EMPTY, 2])
    assert set(perfect.values()) == {1.0}
    swapped = score([7, 3, EMPTY, 3], [1, 0, EMPTY, 2])
    assert swapped["position"] == pytest.approx(1 / 3) and swapped["anywhere"] == 1.0
    assert swapped["whole scene"] == 0.0 and swapped["whole scene, anywhere"] == 1.0
    twice = score([3, 7, 7, 3], [0, 1, 1, 0])
    assert twice["digit"] == 1.0 and twice["colour"] == twice["anywhere"] == pytest.approx(2 / 3)
    assert twice["empty"] == 0.0 == twice["whole scene"]


def test_the_judge_scores_known_edits():
    edits = sample_edits(sampled(n=60), "test", np.random.default_rng(1))
    wanted, untouched = render(edits.after), render(edits.before)
    read = judge.Reading(edits.after.digits, edits.after.colours)
    done = judge.mean(judge.score_edits(read, edits, wanted, wanted))
    assert done["edited cell"] == done["other cells kept"] == done["whole scene"] == 1.0
    assert done["pixel error of other cells"] == 0.0
    read = judge.Reading(edits.before.digits, edits.before.colours)
    undone = judge.mean(judge.score_edits(read, edits, untouched + 2 / 255, wanted))
    assert undone["edited cell"] == undone["whole scene"] == undone["edited, by name"] == 0.0
    assert undone["other cells kept"] == 1.0
    assert undone["pixel error of other cells"] == pytest.approx(2, abs=1e-3)


@grids
def test_the_shipped_judge_reads_unseen_handwriting(grid):
    scenes = sampled(grid, combinations="all", n=150)
    figures = judge.mean(judge.score_drawings(judge.load_judge().read(render(scenes)), scenes))
    assert figures["position"] > 0.98 and figures["empty"] > 0.99


def test_the_shipped_autoencoder_keeps_what_is_read():
    model = make_autoencoder.load_autoencoder()
    assert model.spatial_compression_ratio == CELL
    scenes = sampled(3, n=60)
    latents = make_autoencoder.encode(model, render(scenes))
    assert latents.shape == (60, 32, 3, 3)
    again = make_autoencoder.decode(model, latents)
    figures = judge.mean(judge.score_drawings(judge.load_judge().read(again), scenes))
    assert figures["position"] > 0.9
    statistics = json.loads((make_autoencoder.AUTOENCODER_DIR / make_autoencoder.LATENTS_FILE).read_text())
    mean, std = (torch.tensor(statistics[name]).view(-1, 1, 1) for name in ("mean", "std"))
    normalized = (latents - mean) / std
    assert normalized.mean().abs() < 0.1 and 0.9 < normalized.std() < 1.1


def test_fast_pixel_values_are_the_shipped_processors():
    processor = AutoProcessor.from_pretrained(vlm.BASE_DIR)
    pictures = render(sampled(3, n=3))
    expected = processor.image_processor(list(pictures), do_rescale=False, return_tensors="pt")
    pixels, grid = vlm.to_pixel_values(pictures)
    assert torch.equal(pixels, expected["pixel_values"]) and torch.equal(grid, expected["image_grid_thw"])


def test_a_stopped_training_goes_on_to_the_same_bits(tmp_path):
    def weights(work, *interruptions: int) -> list[torch.Tensor]:
        for until in (*interruptions, None):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(32, 8))
            optimizer = training.Optimizer(model.parameters(), 1e-2, 7, warm_up=2)

            def loss(step: int, rng: np.random.Generator, model: nn.Module = model) -> torch.Tensor:
                x = torch.as_tensor(rng.standard_normal((4, 1, 4, 4)), dtype=torch.float32)
                return (model(x) - torch.randn(4, 8)).square().mean()

            training.train("small", optimizer, loss, seed=3, until=until, work=work)
        return [parameter.detach() for parameter in model.parameters()]

    straight, stopped = weights(None), weights(tmp_path, 3, 5)
    assert all(map(torch.equal, straight, stopped))


@pytest.fixture(scope="module")
def painter() -> runs.Painter:
    return demo.load_painter(vlm.load_base(), AutoProcessor.from_pretrained(vlm.BASE_DIR), make_adapter.ADAPTER_DIR)


def test_the_shipped_branch_draws_and_edits_and_leaves_answers_alone(painter):
    asked = ["what digit is at the top left ?", "remove the five then describe"]
    inputs = make_base.make_inputs(asked, render(sampled(n=2)))
    with torch.no_grad():
        assert torch.equal(painter.model(**inputs).logits, vlm.load_base()(**inputs).logits)
    assert judge.mean(runs.draw(painter, 12, grid=2).scores)["position"] > 0.7
    assert judge.mean(runs.edit(painter, 12, grid=2).scores)["other cells kept"] > 0.7


def test_the_shipped_base_says_what_it_sees():
    scenes = sampled(3, n=10)
    said = make_base.say(vlm.load_base(), render(scenes), [captions.DESCRIBE] * 10)
    wanted = [caption(scenes.digits[i], scenes.colours[i]) for i in range(10)]
    assert np.mean([a == b for a, b in zip(said, wanted, strict=True)]) > 0.6


def test_the_shipped_files_are_small_and_name_no_folder_of_their_maker():
    folders = [judge.JUDGE_DIR, make_autoencoder.AUTOENCODER_DIR, vlm.BASE_DIR, make_adapter.ADAPTER_DIR]
    files = [file for folder in folders for file in folder.iterdir()]
    assert sum(file.stat().st_size for file in files) < 12e6
    for file in files:
        assert file.suffix == ".safetensors" or str(vlm.BASE_DIR.parent.parent) not in file.read_text()


def test_training_uses_what_a_step_draws(painter):
    """Drawing and editing, both grids: finite losses that depend on the step's numbers alone."""
    losses = []
    for seed in (0, 1, 2, 0):
        torch.manual_seed(seed)
        with torch.no_grad():
            losses.append(runs.loss(painter, runs.PHASES[-1], 0, np.random.default_rng(seed)).item())
    assert losses[0] == losses[3] and len(set(losses)) == 3 and max(losses) < 1.5


def test_a_picture_is_encoded_once_also_where_a_prompt_shows_it(painter, monkeypatch):
    """Its pixels there are what the processor made of them."""
    coder, encoded = painter.unified.autoencoder, []
    coder._latents.clear()
    encode = coder.autoencoder.encode
    monkeypatch.setattr(coder.autoencoder, "encode", lambda x: encoded.append(len(x)) or encode(x))
    editing = replace(runs.PHASES[-1], editing=1.0, large=0.0)
    with torch.no_grad():
        runs.loss(painter, editing, 0, np.random.default_rng(0))
    assert sum(encoded) == 2 * runs.BATCH[2]


def test_intervals_hold_the_mean_of_known_values():
    values = np.random.default_rng(0).binomial(1, 0.8, (3, 400)).astype(float)
    average, low, high = records.interval(values)
    assert low < 0.8 < high and low < average < high and high - low < 0.1


def test_the_demo_tells_the_whole_story(tmp_path):
    until = str(make_adapter.SHIPPED_STEPS + 1)
    arguments = ["--until", until, "--scenes", "4", "--output", str(tmp_path)]
    result = CliRunner().invoke(demo.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert result.output.count("the same bits") == 3 and "draws the same pictures" in result.output
    table = (tmp_path / "table.md").read_text()
    assert table in result.output
    for part in ("position", "whole scene", "edited cell", "other cells kept", "pixel error", "reconstruction"):
        assert part in table
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 5
    for name in ("drawings.png", "edits.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "adapter" / "unified_model.safetensors").is_file()


def test_comparisons_sweep_rates_and_then_seeds(tmp_path):
    """A run that is on record isn't done again, and the best rate of the first seed trains the others."""
    arm = next(arm for arm in comparisons.ARMS if arm.name == "reference by token")
    path = tmp_path / "records.jsonl"
    record = {"arm": arm.name, "steps": 2, "parameters": 1}
    for rate, loss in zip(comparisons.RATES, (0.3, 0.1, 0.2), strict=True):
        assert (arm, rate, 0) in comparisons.pending(records.load_records(path), [arm])
        records.add_record(path, {**record, "rate": rate, "seed": 0, "validation loss": loss, "figures": {}})
    assert comparisons.best_rate(records.load_records(path), arm) == comparisons.RATES[1]
    wanted = [(arm, comparisons.RATES[1], seed) for seed in (1, 2)]
    assert comparisons.pending(records.load_records(path), [arm]) == wanted


def test_each_way_of_showing_a_reference_is_what_it_says():
    rows, visual, latents = 4 * 4, torch.randn(16, 128), torch.randn(16, 32)
    for arm in comparisons.ARMS[:4]:
        made = comparisons.make(arm, 0)
        module = made.model.emma_unified.default
        torch.nn.init.normal_(module.fusion["latents"])
        own = latents @ module.fusion["latents"].mT
        fused = module.fuse(visual, latents)
        as_latents, as_seen = ((fused - wanted).abs().amax(1) < 1e-4 for wanted in (own, visual))
        assert as_latents.sum() == {"latents only": rows, "by token": rows / 2}.get(arm.reference, 0)
        assert as_seen.sum() == {"visual tokens only": rows, "by token": rows / 2}.get(arm.reference, 0)
        if arm.reference == "by channel":
            torch.testing.assert_close(fused, visual + own)


def test_the_comparisons_run_and_are_told(tmp_path):
    results = tmp_path / "records.jsonl"
    options = ["--workers", "1", "--steps", "1", "--scenes", "4", "--work", str(tmp_path / "work")]
    asked = [*options, "--results", str(results), "--only", "default", "--only", "reference by token"]
    done = CliRunner().invoke(comparisons.main, asked, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = records.load_records(results)
    assert len(found) == 2 * 5
    assert {record["picture tokens"] for record in found} == {4, 8}
    text = results.with_suffix(".md").read_text()
    assert text.count("| reference by token |") == 1 and "| describe, then draw |" in text
    # The same command has nothing left to do.
    assert "runs" not in CliRunner().invoke(comparisons.main, asked).output.split("|")[0]
