"""``emma-adapter report --unified``."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from emma_adapter import add_vision_expert
from emma_adapter.cli import main
from tests.support import browser
from tests.support.workspace import AUTOENCODER_ID, make_drawing_workspace

MODEL = "Qwen/Qwen3-VL-8B-Instruct"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workspace")
    model = make_drawing_workspace(folder, MODEL)
    add_vision_expert(model, "stem", layers=1).save_pretrained(folder / "experts")
    rows = [
        {"prompt": f"a bird {'w' * 500}"},
        {"prompt": "make it blue", "image": "images/0.png", "target": "images/1.png"},
    ]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(autouse=True)
def _inside(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


def report(*arguments, code=0, data="prompts.jsonl"):
    command = ["report", "--model", MODEL, "--adapter", "drawing", "--data", data, *map(str, arguments)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def file(workspace):
    """With a word that is longer than a phone is wide."""
    settings = ["--height", 64, "--width", 64, "--steps", 2, "--previews", 1, "--seed", 3, "--experts", "experts"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        assert "2 of 2 rows drawn" in report("--unified", "--output", "page.html", *settings).stdout
    return workspace / "page.html"


def test_a_page(file):
    page = file.read_text()
    assert "make it blue" in page and "Row 2 of the data, seed 4" in page and AUTOENCODER_ID in page
    assert page.count("<img ") == 2 + 5 and "stem; margin 0.2" in page


@pytest.mark.skipif(browser.found() is None, reason="needs Chromium and its driver")
def test_it_reads_well(file):
    with browser.chromium() as chromium:
        for width, dark in ((390, False), (1280, True)):
            chromium.open(file, width=width, height=800, dark=dark)
            assert chromium.run("return document.documentElement.scrollWidth") <= width
            assert chromium.run(browser.TOO_WIDE) == [] and chromium.run(browser.CONTRAST) >= 4.5
            assert chromium.complaints() == []
            assert [url for url in chromium.requests() if not url.startswith(("data:image/", file.as_uri()))] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--unified", "--limit", "4"], "--limit has no effect on drawing"),
        (["--unified", "--max-new-tokens", "32"], "--max-new-tokens has no effect"),
        (["--unified", "--batch-size", "8"], "--batch-size has no effect"),
        (["--unified", "--instruction-encoder", "llm"], "--instruction-encoder has no effect"),
        (["--steps", "20"], "--steps needs --unified"),
        (["--seed", "0"], "--seed needs --unified"),
        (["--experts", "x"], "--experts needs --unified"),
        (["--image-guidance-scale", "1"], "--image-guidance-scale needs --unified"),
        (["--unified", "--amplification", "0"], "--amplification"),
        (["--unified", "--height", "65", "--width", "64"], "64 x 64"),
        (["--unified", "--output", "nowhere/page.html"], "no folder nowhere"),
    ],
)
def test_bad_arguments(tmp_path, monkeypatch, workspace, arguments, words):
    line = report(*arguments, code=2).stderr.splitlines()[-1]
    assert line.startswith("Error: ") and words in line
    assert not (workspace / "report.html").exists()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"target": "images/0.png"}, 'line 1 lacks "prompt", and has'),
        ({"prompt": "a", "image": "nowhere.png"}, "nowhere.png"),
        ({"prompt": "a <|image_pad|>"}, "row 1 can't be drawn"),
    ],
)
def test_bad_rows(tmp_path, row, words):
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    assert words in report("--unified", code=2, data=str(tmp_path / "data.jsonl")).stderr.splitlines()[-1]
