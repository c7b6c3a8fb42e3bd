from __future__ import annotations

import csv

from hypothesis import given
from hypothesis import strategies as st

from emma_adapter.evaluation.answers import share_of_yes
from emma_adapter.evaluation.tasks import read_tasks

COLUMNS = [
    "item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed", "tuple",
    "question_natural_language",
]  # fmt: skip


def written(path, lines):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(lines)
    return path


def line(item, number, question, parents="0", text="a red bird, in a tree"):
    return dict(zip(COLUMNS, [item, text, "", number, parents, "", "", "", question], strict=True))


def test_the_published_tables_form(tmp_path):
    lines = [
        line("partiprompts0", 1, "Is there a bird?"),
        line("partiprompts0", 2, 'Is it "red"?', "1"),
        line("partiprompts0", 4, "Is it in the tree?", "1, 3"),
        line("partiprompts0", 3, "Is there a tree?"),
        line("stanford1", 1, "Is there a dog?", text="ein Hund\nim Schnee – ❄"),
    ]
    first, second = read_tasks(written(tmp_path / "dpg_bench.csv", lines))
    assert (first.prompt, first.kind, first.row["item_id"]) == ("a red bird, in a tree", "questions", "partiprompts0")
    assert first.row["questions"] == [
        {"question": "Is there a bird?", "after": []},
        {"question": 'Is it "red"?', "after": [1]},
        {"question": "Is there a tree?", "after": []},
        {"question": "Is it in the tree?", "after": [1, 3]},
    ]
    assert second.prompt == "ein Hund\nim Schnee – ❄" and len(second.row["questions"]) == 1


@st.composite
def dependencies(draw):
    """Of each question its parents, all of lower rank, and whether a judge says yes; in any order, of any numbers."""
    count = draw(st.integers(1, 7))
    parents = [sorted(draw(st.sets(st.integers(0, rank - 1)))) if rank else [] for rank in range(count)]
    numbers = draw(st.lists(st.integers(1, 99), min_size=count, max_size=count, unique=True))
    answers = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    return parents, numbers, answers, draw(st.permutations(range(count)))


@given(drawn=dependencies())
def test_a_question_holds_if_all_that_it_depends_on_do(drawn, tmp_path_factory):
    parents, numbers, answers, order = drawn
    lines = [
        line("x", numbers[rank], f"{rank}?", ",".join(str(numbers[parent]) for parent in parents[rank]) or "0")
        for rank in order
    ]
    [task] = read_tasks(written(tmp_path_factory.mktemp("dpg") / "dpg_bench.csv", lines))
    asked = task.row["questions"]
    assert sorted(one["question"] for one in asked) == sorted(f"{rank}?" for rank in range(len(order)))

    def holds(rank):
        return answers[rank] and all(map(holds, parents[rank]))

    wanted = sum(map(holds, range(len(order)))) / len(order)
    assert share_of_yes(asked, [answers[int(one["question"][:-1])] for one in asked]) == wanted
