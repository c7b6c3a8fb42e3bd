from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from emma_adapter.cli import main
from tests.evaluation import judging
from tests.support import tiny
from tests.support.workspace import make_drawing_workspace

MODEL = "Qwen/Qwen3-VL-8B-Instruct"
ROWS = [
    {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a red dog"},
    {"prompt": "a bird", "questions": [{"question": "A bird?"}, {"question": "Is it blue?", "after": [1]}]},
    {"instruction": "make it blue", "image": "0.png"},
]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workspace")
    make_drawing_workspace(folder, MODEL)
    tiny.picture(0).resize((64, 96)).save(folder / "0.png")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    judging.detector(folder / "owl")
    judging.clip(folder / "clip")
    judging.vit(folder / "vit", width=8)
    return folder


@pytest.fixture(autouse=True)
def _inside(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


def run(*arguments, code=0):
    result = CliRunner().invoke(main, ["evaluate-drawing", *(str(argument) for argument in arguments)])
    assert result.exit_code == code, result.output
    return result.output


def test_drawn_once_and_scored(tmp_path):
    drawing = ["prompts.jsonl", "--output", tmp_path, "--model", MODEL, "--adapter", "drawing", "--steps", 1]
    drawing += ["--num-images", 2, "--height", 64, "--width", 64]
    assert "Drawn: 6 pictures; 0 were there" in run(*drawing)
    files = {path: path.read_bytes() for path in tmp_path.glob("*/samples/*.png")}
    assert len(set(files.values())) == len(files) == 6
    gone = tmp_path / "00002" / "samples" / "00001.png"
    gone.unlink()
    assert "Drawn: 1 pictures; 5 were there" in run(*drawing)
    assert files == {path: path.read_bytes() for path in files}
    assert "other settings" in run(*drawing, "--seed", 1, code=2)

    judges = ["--detector", "owl", "--colours", "clip", "--judge", MODEL, "--threshold", 0]
    told = run("prompts.jsonl", "--output", tmp_path, *judges)
    summary = json.loads((tmp_path / "summary.json").read_text())
    means = {(line["measure"], line["tag"]): line for line in summary["scores"]}
    # A random model writes no JSON.
    assert means["edits", "all"]["unreadable"] == 2 and means["edits", "all"]["mean"] is None
    assert means["questions", "all"]["pictures"] == means["objects", "colors"]["pictures"] == 2
    assert "95 % interval" in told and len((tmp_path / "scores.jsonl").read_text().splitlines()) == 10

    # What was judged is there, though there are too few pictures to compare.
    for name in ("scores.jsonl", "summary.json"):
        (tmp_path / name).unlink()
    (tmp_path / "real").mkdir()
    tiny.picture(0).save(tmp_path / "real" / "0.png")
    compared = ["--real", tmp_path / "real", "--features", "vit"]
    assert "pictures" in run("prompts.jsonl", "--output", tmp_path, *judges, *compared, code=2)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_what_has_no_judge_is_told(tmp_path):
    for number in range(3):
        (tmp_path / f"{number:05}" / "samples").mkdir(parents=True)
        for other in range(10):
            tiny.picture(number * 10 + other).save(tmp_path / f"{number:05}" / "samples" / f"{other}.png")
    told = run(
        "prompts.jsonl", "--output", tmp_path, "--detector", "owl", "--real", "birds", "--features", "vit", code=2
    )
    assert "Not judged: 1 rows of objects" in told and "Not judged: 1 rows of edits" in told
    assert "FID needs more pictures" in told  # there are four birds
    told = run("prompts.jsonl", "--output", tmp_path, "--real", tmp_path, "--features", "vit")
    assert "FID: 0.0000" in told or "FID: -0.0000" in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", MODEL], "--model and --adapter go together"),
        (["--features", "vit"], "--real and --features go together"),
        (["--judge", MODEL], "has no picture"),
        (["--detector", "nowhere/at/all"], "can't be loaded"),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, words):
    assert words in run("prompts.jsonl", "--output", tmp_path, *arguments, code=2).splitlines()[-1]
