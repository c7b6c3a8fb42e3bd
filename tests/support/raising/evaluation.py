"""Errors of evaluating a model that draws."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from emma_adapter import ConfigError, DataError
from emma_adapter.evaluation import pictures
from emma_adapter.evaluation.distances import FeatureNetwork, distances
from emma_adapter.evaluation.judges import Detector, VisionLanguageJudge
from emma_adapter.evaluation.tasks import Task, read_tasks
from tests.evaluation import judging
from tests.support import tiny

from .triggers import Bench, raises

TASKS, DPG = "evaluation/tasks.py", "evaluation/dpg.py"


def read(bench: Bench, row: Any) -> list[Task]:
    file = bench.folder / "prompts.jsonl"
    file.write_bytes(row if isinstance(row, bytes) else json.dumps(row).encode())
    return read_tasks(file)


def objects(bench: Bench, **clause: Any) -> None:
    read(bench, {"prompt": "a dog", "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, **clause}]})


@raises(DataError, f"{TASKS}:read_tasks", "is not UTF-8")
def prompts_in_another_encoding(bench: Bench) -> None:
    read(bench, b'{"prompt": "\xff"}')


@raises(DataError, f"{TASKS}:read_tasks", "holds no rows")
def no_prompts(bench: Bench) -> None:
    read(bench, b"\n")


@raises(DataError, f"{TASKS}:_read_lines", "is not valid JSON")
def a_prompt_that_is_no_json(bench: Bench) -> None:
    read(bench, b"a red bird")


def dpg(
    bench: Bench, *lines: str, columns: str = "item_id,text,proposition_id,dependency,question_natural_language"
) -> None:
    file = bench.folder / "dpg_bench.csv"
    file.write_text("\n".join([columns, *lines]))
    read_tasks(file)


@raises(DataError, f"{DPG}:read_dpg", "as DPG-Bench's")
def a_table_of_something_else(bench: Bench) -> None:
    dpg(bench, "a dog", columns="caption")


@raises(DataError, f"{DPG}:read_dpg", "is not valid CSV")
def a_table_with_a_cell_that_is_too_long(bench: Bench) -> None:
    dpg(bench, "a" * 200_000)


@raises(DataError, f"{DPG}:_in_order", "number them apart")
def two_questions_of_one_number(bench: Bench) -> None:
    dpg(bench, "1,a dog,1,0,Is there a dog?", "1,a dog,1,0,Is it red?")


@raises(DataError, f"{DPG}:_in_order", "in a circle")
def questions_that_wait_for_each_other(bench: Bench) -> None:
    dpg(bench, "1,a dog,1,2,Is there a dog?", "1,a dog,2,1,Is it red?")


@raises(DataError, f"{DPG}:_parents", "0 is none")
def a_question_that_waits_for_none_that_is_there(bench: Bench) -> None:
    dpg(bench, "1,a dog,1,7,Is there a dog?")


@raises(DataError, f"{DPG}:_number", "a whole number")
def a_question_whose_number_is_a_word(bench: Bench) -> None:
    dpg(bench, "1,a dog,one,0,Is there a dog?")


@raises(DataError, f"{TASKS}:_task", "should be a JSON object")
def a_prompt_that_is_a_text(bench: Bench) -> None:
    read(bench, "a red bird")


@raises(DataError, f"{TASKS}:_task", "to draw: give it one")
def a_row_without_a_prompt(bench: Bench) -> None:
    read(bench, {"prompt": " "})


@raises(DataError, f"{TASKS}:_task", "it must be a text")
def a_tag_that_is_a_number(bench: Bench) -> None:
    read(bench, {"prompt": "a dog", "tag": 3})


@raises(DataError, f"{TASKS}:_task", "which are judged differently")
def objects_and_questions_in_one_row(bench: Bench) -> None:
    read(bench, {"prompt": "a dog", "include": [], "questions": []})


@raises(DataError, f"{TASKS}:_task", "give the name of a file")
def an_edit_of_no_image(bench: Bench) -> None:
    read(bench, {"prompt": "make it blue", "image": []})


@raises(DataError, f"{TASKS}:_check_objects", "must be a list of")
def an_object_that_is_a_name(bench: Bench) -> None:
    read(bench, {"prompt": "a dog", "include": ["dog"]})


@raises(DataError, f"{TASKS}:_check_objects", "name what is to be seen")
def an_object_without_a_class(bench: Bench) -> None:
    objects(bench, **{"class": ""})


@raises(DataError, f"{TASKS}:_check_objects", "give a whole number from 1")
def no_objects(bench: Bench) -> None:
    objects(bench, count=0)


@raises(DataError, f"{TASKS}:_check_objects", "; known are ")
def an_unknown_colour(bench: Bench) -> None:
    objects(bench, color="mauve")


@raises(DataError, f"{TASKS}:_check_objects", "the number of an earlier clause")
def a_position_beside_itself(bench: Bench) -> None:
    objects(bench, position=["left of", 1])


@raises(DataError, f"{TASKS}:_check_questions", "must be a list of")
def no_questions(bench: Bench) -> None:
    read(bench, {"prompt": "a dog", "questions": []})


@raises(DataError, f"{TASKS}:_check_questions", "has no text")
def an_empty_question(bench: Bench) -> None:
    read(bench, {"prompt": "a dog", "questions": [{"question": ""}]})


@raises(DataError, f"{TASKS}:_check_questions", "numbers of earlier ")
def a_question_after_itself(bench: Bench) -> None:
    read(bench, {"prompt": "a dog", "questions": [{"question": "a dog?", "after": [1]}]})


@raises(ConfigError, "evaluation/pictures.py:begin", "drawn with other settings")
def going_on_with_other_settings(bench: Bench) -> None:
    for seed in range(2):
        pictures.begin(bench.folder, {"seed": seed})


@raises(DataError, "evaluation/pictures.py:draw_missing", "holds pictures of another row")
def going_on_with_other_prompts(bench: Bench) -> None:
    (bench.folder / "out" / "00000").mkdir(parents=True)
    (bench.folder / "out" / "00000" / "metadata.jsonl").write_text("{}\n")
    pictures.draw_missing(None, read(bench, {"prompt": "a dog"}), bench.folder / "out", bench.folder, 1, 0)


@raises(DataError, "evaluation/pictures.py:pictures_of", "has no picture in")
def scoring_what_was_not_drawn(bench: Bench) -> None:
    pictures.pictures_of(read(bench, {"prompt": "a dog"})[0], bench.folder)


@raises(ConfigError, "evaluation/loading.py:explained_loading", "can't be loaded for")
def a_detector_that_is_no_detector(bench: Bench) -> None:
    Detector(judging.vit(bench.folder), "cpu")


@raises(ConfigError, "evaluation/judges.py:VisionLanguageJudge.__init__", "begins with the same token")
def a_judge_without_words(bench: Bench) -> None:
    tiny.llava().save_pretrained(bench.folder)
    tiny.processor().save_pretrained(bench.folder)
    bench.monkeypatch.setattr(VisionLanguageJudge, "_first_tokens", lambda self, word: {3})
    VisionLanguageJudge(str(bench.folder), "cpu")


def measure(bench: Bench, count: int, kind: str) -> None:
    network = FeatureNetwork(judging.vit(bench.folder), "cpu")
    distances(network, [Path("a.png")] * count, [Path("b.png")] * count, [kind])


@raises(ConfigError, "evaluation/distances.py:distances", "need torchmetrics")
def fid_without_torchmetrics(bench: Bench) -> None:
    bench.monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    measure(bench, 17, "fid")


@raises(DataError, "evaluation/distances.py:distances", "FID needs more pictures")
def fid_of_too_few_pictures(bench: Bench) -> None:
    measure(bench, 16, "fid")


@raises(DataError, "evaluation/distances.py:distances", "KID needs at least")
def kid_of_too_few_pictures(bench: Bench) -> None:
    measure(bench, 19, "kid")
