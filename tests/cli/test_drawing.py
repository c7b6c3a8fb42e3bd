from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from emma_adapter import EmmaUnified, load_unified
from emma_adapter.cli import draw, edit, evaluate_drawing, main, report
from tests.support import tiny
from tests.support.workspace import make_drawing_workspace

MODEL = "Qwen/Qwen3-VL-8B-Instruct"
COMMON = ["--model", MODEL, "--adapter", "drawing", "--steps", "2", "--seed", "7"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """With a branch that was trained with an autoencoder by name, and two pictures."""
    folder = tmp_path_factory.mktemp("workspace")
    make_drawing_workspace(folder, MODEL)
    for number in range(2):
        tiny.picture(number).resize((64, 96)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(autouse=True)
def _inside(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


def loaded():
    return AutoModelForImageTextToText.from_pretrained(MODEL), AutoProcessor.from_pretrained(MODEL)


def wanted(prompt, seeds, image=None, **settings):
    """What the library itself draws."""
    model, processor = loaded()
    unified = load_unified(model.eval(), "drawing", processor=processor)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    made = unified.set_progress_bar_config(disable=True).generate_images(
        prompt, image, num_inference_steps=2, num_images_per_prompt=len(seeds), generator=generators, **settings
    )
    return [np.array(picture) for picture in made.images]


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize("command", [draw, edit, evaluate_drawing, report], ids=lambda command: command.name)
def test_scales_of_guidance_are_the_librarys(command):
    library = inspect.signature(EmmaUnified.generate_images).parameters
    scales = {option.name: option.default for option in command.params if option.name.endswith("guidance_scale")}
    assert scales
    assert scales == {name: library[name].default for name in scales}


def test_drawings_are_the_librarys_and_tell_how_they_were_made(tmp_path):
    sizes = ["--height", "64", "--width", "96"]
    folder = tmp_path / "new" / "folder"
    run("draw", "a red bird", "a blue one", *COMMON, *sizes, "--num-images", 2, "--output", folder)
    assert {path.name for path in folder.iterdir()} == {f"{seed}.png" for seed in (7, 8, 9, 10)}
    for prompt, seeds in (("a red bird", (7, 8)), ("a blue one", (9, 10))):
        for seed, want in zip(seeds, wanted(prompt, seeds, height=64, width=96), strict=True):
            with Image.open(folder / f"{seed}.png") as picture:
                assert np.array_equal(np.array(picture), want)
                told = picture.text
            assert (told["prompt"], told["seed"], told["steps"], told["width"]) == (prompt, str(seed), "2", "96")
            assert told["guidance_scale"] == "3.0" and told["model"] == MODEL and "negative_prompt" not in told


def test_edits_of_each_image_and_of_all_together(tmp_path):
    run("edit", "make it blue", "0.png", "1.png", *COMMON, "--output", tmp_path)
    run("edit", "make it blue", "0.png", "1.png", *COMMON, "--together", "--output", tmp_path / "both.png")
    sources = [Image.open(f"{number}.png").convert("RGB") for number in range(2)]
    for path, seed, images in (("7.png", 7, sources[0]), ("8.png", 8, sources[1]), ("both.png", 7, [sources])):
        want = wanted("make it blue", (seed,), images)[0]
        assert np.array_equal(np.array(Image.open(tmp_path / path)), want) and want.shape == (96, 64, 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["draw", "x", *COMMON, "--height", "65"], "64"),
        (["draw", *COMMON], "Missing argument"),
        (["edit", "x", "missing.png", *COMMON], "does not exist"),
        (["edit", "x", "broken.png", *COMMON], "broken.png"),
        (["draw", "x", "--model", MODEL, "--adapter", "nowhere"], "neither a folder here nor"),
        (["draw", "x", *COMMON, "--autoencoder", "nowhere/at/all"], "can't be loaded"),
        (["draw", "x", *COMMON, "--device", "nowhere"], "--device nowhere"),
    ],
)
def test_bad_input_is_one_line(tmp_path, workspace, arguments, words):
    (workspace / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    line = run(*arguments, "--output", tmp_path, code=2).stderr.splitlines()[-1]
    assert line.startswith("Error: ") and words in line
    assert not list(tmp_path.iterdir())
