"""``emma-adapter report``: its data, its messages, and the page in a browser."""

from __future__ import annotations

import builtins
import json
import shutil

import pytest
from click.testing import CliRunner

from emma_adapter import patch_model
from emma_adapter.cli import main
from emma_adapter.data.rows import open_rows
from emma_adapter.errors import DataError
from tests.support import browser, tiny
from tests.support.budget import some
from tests.support.workspace import MODEL_ID, make_workspace

#: CSS pixels.
PHONE, DESK = (360, 800), (1280, 900)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = make_workspace(tmp_path_factory.mktemp("workspace"))
    adapter = patch_model(tiny.llava(), processor=tiny.processor())
    tiny.train_randomly(adapter.alignment)
    adapter.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture(autouse=True)
def _inside(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


def report(*arguments, code=0, data="birds", adapter="adapter", model=MODEL_ID):
    command = ["report", "--model", model, "--adapter", adapter, "--data", data, "--device", "cpu"]
    result = CliRunner().invoke(main, [*command, "--max-new-tokens", "2", *(str(part) for part in arguments)])
    assert result.exit_code == code, result.output
    return result


def refused(*arguments, **options):
    """What is said on the one line, after the progress bars."""
    line = report(*arguments, code=2, **options).stderr.splitlines()[-1]
    assert line.startswith("Error: ")
    return line


@pytest.fixture(scope="module")
def page(workspace):
    """With words that are longer than a phone is wide."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        rows = [json.loads(line) for line in (workspace / "birds" / "questions.jsonl").read_text().splitlines()]
        rows[0]["question"] += " " + "w" * 500
        rows[1]["answer"] = rows[1]["attribute"] = "\u05e6\u05d1\u05e2 " * 40
        rows[2]["question"] += "</script></svg><script>document.title = 'owned'</script><img src=http://example.com/x>"
        (workspace / "birds" / "wild.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        said = report("--output", "wild.html", data="birds/wild.jsonl").stdout
        assert "Saved to wild.html: 8 questions, 8 of them shown" in said
    return workspace / "wild.html"


# ---------------------------------------------------------------------------------------------- data


def test_a_folder_a_limit_and_an_output(tmp_path):
    said = report("--output", tmp_path / "page.html", "--limit", 3, "--show", 2).stdout
    assert "3 questions, 2 of them shown" in said
    words = (tmp_path / "page.html").read_text()
    assert "How many dogs are there?" in words and "What colour is the bird?" in words
    assert words.startswith("<!DOCTYPE html>")


def test_conversations_end_with_their_last_question(tmp_path, workspace):
    talk = [("user", "<image>is there a cat?"), ("assistant", "no"), ("user", "a dog?"), ("assistant", "yes")]
    row = {"image": "0.png", "messages": [{"role": role, "content": text} for role, text in talk]}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    report("--images", workspace / "birds", "--output", tmp_path / "page.html", data=str(tmp_path / "data.jsonl"))
    words = (tmp_path / "page.html").read_text()
    assert '<h3 dir="auto">a dog?</h3>' in words
    assert '<dd dir="auto">yes</dd>' in words


def test_single_questions_teach_too(workspace):
    """The short form is the long one, for every command."""
    rows = open_rows("birds", "train", None)
    assert len(rows) == 8
    assert rows.messages(0)[0]["content"] == [
        {"type": "image"},
        {"type": "text", "text": "How many dogs are there?"},
    ]
    assert rows.messages(0)[1] == tiny.assistant("two")
    assert (rows.label(0, "attribute"), rows.label(0, "pair")) == ("count", None)


def test_questions_without_answers(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"question": "why?", "pair": 7}')
    rows = open_rows(str(tmp_path / "data.jsonl"), "train", None)
    assert [message["role"] for message in rows.messages(0, answered=False)] == ["user"]
    assert rows.label(0, "pair") == "7"
    with pytest.raises(DataError, match="nothing to learn"):
        rows.messages(0)


def test_a_dataset_with_questions(tmp_path):
    import datasets

    columns = {"question": ["why?"], "answer": ["so"], "attribute": ["cause"], "images": [["0.png"]], "other": [1]}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
    rows = open_rows(str(tmp_path / "saved"), "train", None)
    assert [message["role"] for message in rows.messages(0)] == ["user", "assistant"]
    assert (rows.label(0, "attribute"), rows.label(0, "pair")) == ("cause", None)


# ---------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--limit", "0"], "--limit"),
        (["--show", "x"], "--show"),
        (["--dtype", "int8"], "bfloat16"),
        (["--device", "abacus"], "abacus"),
        (["--output", "nowhere/page.html"], "no folder nowhere"),
        (["--output", "birds"], "birds"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(arguments, words):
    assert words in refused(*arguments)


@pytest.mark.parametrize(
    "options",
    [{"model": "nowhere/at-all"}, {"data": "nowhere.jsonl"}, {"data": "images"}, {"adapter": "images"}],
    ids=str,
)
def test_what_isnt_there(options):
    [name] = options.values()
    assert name in refused(**options)


def test_the_processor_of_another_model_is_one_line(tmp_path, workspace):
    shutil.copytree(workspace / MODEL_ID, tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "processor_config.json").read_text())
    (tmp_path / "model" / "processor_config.json").write_text(json.dumps({**settings, "patch_size": 7}))
    assert "Let the model's processor make text and images together" in refused(model=str(tmp_path / "model"))


@pytest.mark.parametrize("package", ["jinja2", "matplotlib", "sklearn"])
def test_missing_extra(monkeypatch, package):
    real = builtins.__import__

    def without(name, *rest):
        if name == package:
            raise ModuleNotFoundError(f"No module named {package!r}")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert 'pip install "emma_adapter[report]"' in refused()


# ---------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def chromium():
    if browser.found() is None:
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    with browser.chromium() as started:
        yield started


@pytest.mark.parametrize(("size", "dark"), some(1, [PHONE, DESK], [False, True]), ids=str)
def test_it_reads_well(chromium, page, size, dark):
    chromium.open(page, width=size[0], height=size[1], dark=dark)
    assert chromium.run("return innerWidth") == size[0]
    assert chromium.run("return document.documentElement.scrollWidth") <= size[0]
    assert chromium.run(browser.TOO_WIDE) == []
    assert chromium.run(browser.CONTRAST) >= 4.5
    brightness = chromium.run("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(brightness) < 64) is dark
    assert chromium.complaints() == []
    # The page itself, and what is in it.
    assert [url for url in chromium.requests() if not url.startswith(("data:image/", page.as_uri()))] == []
    assert chromium.run("return document.title") == "EMMA report: adapter"
    seen = chromium.run("return [...document.images].map(image => image.complete && image.naturalWidth > 0)")
    assert len(seen) == 8 and all(seen)
    drawn = chromium.run("return [...document.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect().width)")
    assert len(drawn) > 8 and all(100 < width <= size[0] for width in drawn)


def test_it_prints_on_white(chromium, page):
    chromium.open(page, width=794, height=1123, dark=True)
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    chromium.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": dark})
    assert chromium.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert chromium.run(browser.CONTRAST) >= 7


def test_the_browser_would_tell(chromium, tmp_path):
    """What the tests above find none of, they would find."""
    policy = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\">"
    (tmp_path / "bad.html").write_text(
        f"{policy}<meta name='viewport' content='width=device-width'><div style='width: 900px'>a</div>"
    )
    chromium.open(tmp_path / "bad.html", width=360, height=800, dark=False)
    assert any("style" in complaint for complaint in chromium.complaints())
    (tmp_path / "worse.html").write_text(
        "<meta name='viewport' content='width=device-width'><body style='background: white'>"
        "<div style='width: 900px; color: #aaa'>wide and grey</div><img src='http://127.0.0.1:9/x.png'>"
    )
    chromium.open(tmp_path / "worse.html", width=360, height=800, dark=False)
    assert chromium.run("return document.documentElement.scrollWidth") >= 900
    assert chromium.run(browser.TOO_WIDE) and chromium.run(browser.CONTRAST) < 4.5
    assert "http://127.0.0.1:9/x.png" in chromium.requests()
