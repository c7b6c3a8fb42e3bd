"""A trained model must learn to stop: labels end with a token at which ``generate`` stops, whatever the template."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
import torch

from emma_adapter import InstructionCollator, patch_model
from emma_adapter.data.examples import Examples
from emma_adapter.data.rows import open_rows
from emma_adapter.models.prompts import Prompts, stop_ids
from tests.support import tiny
from tests.support.workspace import make_workspace
from tests.support.zoo import ZOO

DOCS = Path(__file__).parents[2] / "docs"
TEMPLATED = [entry for entry in ZOO.values() if entry.processor().chat_template is not None]
entries = pytest.mark.parametrize("entry", TEMPLATED, ids=lambda entry: entry.name)


@entries
@pytest.mark.parametrize("with_system", [False, True])
def test_labels_of_every_family_end_with_a_token_that_stops(entry, with_system, tmp_path):
    """The template's own, or where it writes none the tokenizer's; once, and nothing but space after it."""
    processor = entry.processor()
    words = processor.tokenizer
    tiny.picture(0).resize((56, 56)).save(tmp_path / "0.png")
    said = [("user", "how many dogs?"), ("assistant", "two"), ("user", "what colour?"), ("assistant", "a red one")]
    said = [("system", "Be brief."), *said] if with_system else said
    row = {"image": "0.png", "messages": [{"role": role, "content": text} for role, text in said]}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    # As published: Gemma's generate stops at the end of a turn, too.
    turns = words.convert_tokens_to_ids(["<end_of_turn>", "<turn|>"])
    stops = {words.eos_token_id, *turns} - {None, words.unk_token_id}
    examples = Examples(processor, sorted(stops))
    table = examples.add(open_rows(str(tmp_path / "data.jsonl"), "train", None), "data", progress=False)
    batch = examples(list(table))
    for row, answer in enumerate(["two", "a red one"]):
        labels = batch["labels"][row][batch["labels"][row] != -100].tolist()
        places = [place for place, token in enumerate(labels) if token in stops]
        assert len(places) == 1
        assert words.decode(labels[: places[0]]).strip() == answer
        assert words.decode(labels[places[0] + 1 :]).strip() == ""


@entries
def test_the_prompt_of_an_answer_is_what_generate_meets(entry):
    processor = entry.processor()
    prompts = Prompts(processor)
    talk = [tiny.user("what is it?"), tiny.assistant("a bird"), tiny.user("why?", 0), tiny.assistant("so it is")]
    prompt, whole = prompts.answered(talk)
    assert whole.startswith(prompt)
    asked = prompts.prompt(talk[:-1])
    assert asked.removeprefix(prompt).strip() == ""  # LLaVA-OneVision's differs by a space
    assert whole.removeprefix(prompt).strip().startswith("so it is")


def test_an_end_that_is_written_already_is_not_written_again():
    prompts = Prompts(tiny.processor())
    talk = [tiny.user("what?"), tiny.assistant("a bird"), tiny.user("why?", 0)]
    for answer in ("so", "so</s>", "so </s> "):
        assert prompts.answered([*talk, tiny.assistant(answer)])[1].rstrip().endswith("</s>")
        assert prompts.answered([*talk, tiny.assistant(answer)])[1].count("</s>") == 1


def blocks(page: str) -> list[str]:
    """The Python of a page, also where a shell writes it to a file."""
    text = (DOCS / page).read_text()
    return re.findall(r"^(?:```python|cat > train.py [^\n]*)\n(.*?)^(?:```|PYTHON)$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", ["quick-start.md", "training.md", "your-data.md", "distributed.md"])
def test_the_documented_loops_teach_to_stop(page, tmp_path, monkeypatch):
    monkeypatch.chdir(make_workspace(tmp_path))
    found = blocks(page)
    last = next(number for number, code in enumerate(found) if "def collate(" in code)
    names: dict = {"__name__": "__main__"}
    for code in found[: last + 1]:
        exec(compile(code, page, "exec"), names)
    check_ends(names["collate"](names["rows"][:3]))


@pytest.mark.filterwarnings("ignore")
def test_the_documented_sft_run_teaches_to_stop(tmp_path, monkeypatch):
    monkeypatch.chdir(make_workspace(tmp_path))
    names: dict = {"__name__": "__main__"}
    first, sft = blocks("training.md")[0], next(code for code in blocks("training.md") if "SFTTrainer(" in code)
    exec(compile(first + sft, "training.md", "exec"), names)
    check_ends(names["trainer"].data_collator(list(names["dataset"])[:3]))


def check_ends(batch) -> None:
    """Of LLaVA-1.5's template, which doesn't end answers."""
    assert batch["labels"].shape[0] > 1
    for labels in batch["labels"]:
        text = tiny.tokenizer().decode(labels[labels != -100])
        assert text.strip().endswith("</s>"), text
        assert text.count("</s>") == 1
        assert len(text) < 20  # the answer alone


@pytest.mark.parametrize("ends", [True, False])
def test_the_collator_says_that_labels_teach_no_end(ends):
    processor = tiny.processor()
    adapter = patch_model(tiny.llava(), processor=processor)
    assert stop_ids(adapter.model, processor.tokenizer) == [2]
    labels = torch.tensor([[-100, -100, 7, 8, 2 if ends else 9], [-100, 7, 8, 9, 9]])
    collator = InstructionCollator(lambda rows: {"labels": labels}, adapter, instruction_of=lambda row: "why?")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        collator([{}])
        collator([{}])
    expected = [] if ends else ["no label of a batch is a token at which generate stops"]
    assert [str(warning.message).partition(",")[0] for warning in said] == expected
