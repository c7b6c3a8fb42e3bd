"""The scoring rules, beside cases that were computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from emma_adapter.evaluation.answers import edit_scores, read_marks, share_of_yes
from emma_adapter.evaluation.objects import Found, judge_objects, kept, overlap, relations
from emma_adapter.evaluation.pictures import seed_of
from emma_adapter.evaluation.summary import Score, summarise, table

LEFT, RIGHT = Found((0, 0, 10, 10), 0.9), Found((50, 0, 60, 10), 0.8)
BELOW = Found((50, 40, 60, 60), 0.7)


def judged(row, objects, colours=None):
    return judge_objects(row, objects, lambda name, found: [(colours or {})[one] for one in found])


@pytest.mark.parametrize(
    ("one", "other", "wanted"),
    [
        (LEFT.box, RIGHT.box, {"left of"}),
        (RIGHT.box, LEFT.box, {"right of"}),
        (RIGHT.box, BELOW.box, {"above"}),
        # Centres 50 and 45 apart, each shortened by 0.1 x (10 + 10) and 0.1 x (10 + 20), of a length of 67.3.
        (BELOW.box, LEFT.box, {"right of", "below"}),
        # 3 apart, of which the margin of 0.1 x 20 leaves 1 of 3: not enough.
        ((0, 0, 10, 10), (3, 0, 13, 10), set()),
        # 4 apart: 2 of 4 is not more than a half. 5 apart: 3 of 5 is.
        ((0, 0, 10, 10), (4, 0, 14, 10), set()),
        ((0, 0, 10, 10), (5, 0, 15, 10), {"left of"}),
        ((0, 0, 10, 10), (0, 0, 10, 10), set()),
    ],
)
def test_relations(one, other, wanted):
    assert relations(one, other) == wanted


def test_counting():
    three = {
        "include": [{"class": "dog", "count": 3}],
        "exclude": [{"class": "dog", "count": 4}, {"class": "cat", "count": 1}],
    }
    dogs = [LEFT, RIGHT, BELOW, LEFT]
    assert judged(three, {"dog": dogs[:3]}) == []
    assert len(judged(three, {"dog": dogs[:2]})) == 1
    assert len(judged(three, {"dog": dogs})) == 1
    assert len(judged(three, {"dog": dogs[:3], "cat": [LEFT]})) == 1
    assert len(judged(three, {})) == 1


def test_colours_are_those_of_the_most_confident():
    row = {"include": [{"class": "dog", "count": 1, "color": "red"}]}
    assert judged(row, {"dog": [LEFT, RIGHT]}, {LEFT: "red", RIGHT: "blue"}) == []
    assert "blue instead of red" in judged(row, {"dog": [RIGHT, LEFT]}, {LEFT: "red", RIGHT: "blue"})[0]


def test_positions_are_of_every_pair_and_need_their_target():
    row = {
        "include": [
            {"class": "cat", "count": 1, "color": "red"},
            {"class": "dog", "count": 2, "position": ["right of", 0]},
        ]
    }
    assert judged(row, {"cat": [LEFT], "dog": [RIGHT, BELOW]}, {LEFT: "red"}) == []
    assert len(judged(row, {"cat": [LEFT], "dog": [RIGHT, LEFT]}, {LEFT: "red"})) == 1
    # A cat of another colour is no target.
    assert len(judged(row, {"cat": [LEFT], "dog": [RIGHT, BELOW]}, {LEFT: "blue"})) == 2


def test_which_objects_count():
    again = Found((0, 0, 10, 8), 0.95)  # 0.8 of LEFT
    assert overlap(again.box, LEFT.box) == pytest.approx(0.8) and overlap(LEFT.box, RIGHT.box) == 0
    assert kept([BELOW, LEFT, again], threshold=0.7, max_overlap=1) == [again, LEFT]
    assert kept([BELOW, LEFT, again], threshold=0.5, max_overlap=0.8) == [again, BELOW]
    assert kept([BELOW, LEFT, again], threshold=0.5, max_overlap=0.81) == [again, LEFT, BELOW]
    assert kept([BELOW, LEFT, again], threshold=0.5, max_overlap=1, most=1) == [again]


def test_a_question_falls_with_its_parents():
    asked = [{"question": "a"}, {"question": "b", "after": [1]}, {"question": "c", "after": [2]}, {"question": "d"}]
    assert share_of_yes(asked, [True, True, True, False]) == 0.75
    assert share_of_yes(asked, [False, True, True, True]) == 0.25
    assert share_of_yes(asked, [True, False, True, True]) == 0.5


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('{"score": [8, 6.5], "reasoning": "good"}', [8, 6.5]),
        ('```json\n{"score": [0, 10]}\n```', [0, 10]),
        ('Here you are: {"score": [8, 6]}', None),
        ('{"score": [8, 11]}', None),
        ('{"score": [8, NaN]}', None),
        ('{"score": [true, 1]}', None),
        ('{"score": ["8", 1]}', None),
        ('{"score": [8]}', None),
        ('{"score": 8}', None),
        ("[8, 6]", None),
        ("", None),
        ("[" * 10_000, None),
    ],
)
def test_marks_are_read_strictly(text, wanted):
    assert read_marks(text) == wanted


def test_an_edit_is_worth_the_root_of_its_least_marks():
    assert edit_scores([9, 4], [6, 8])["edits"] == math.sqrt(24)
    assert edit_scores([0, 9], [6, 8])["edits"] == 0
    assert edit_scores(None, [6, 8]) == {"semantic consistency": None, "perceptual quality": 6, "edits": None}


def scores(measure, *rows):
    return [Score(row, "", tag, measure, value, None) for row, (tag, values) in enumerate(rows) for value in values]


def test_means_are_over_prompts_and_then_over_tags():
    rows = [("a", [1.0, 0.0]), ("a", [1.0]), ("a", [1.0]), ("b", [0.0, None, None])]
    every, a, b = summarise(scores("objects", *rows))
    assert (a.mean, a.prompts, a.pictures) == (pytest.approx(2.5 / 3), 3, 4)
    assert (b.mean, b.low, b.high, b.pictures, b.unreadable) == (0, 0, 0, 1, 2)
    assert every.mean == pytest.approx(1.25 / 3) and every.unreadable == 2
    # Questions: over prompts.
    assert summarise(scores("questions", *rows))[0].mean == pytest.approx(2.5 / 4)


def test_nothing_readable_is_no_zero():
    [line] = summarise(scores("edits", ("", [None])))
    assert line.mean is None and line.unreadable == 1 and "-" in table([line])


def test_intervals_are_those_of_the_normal_distribution_where_it_holds():
    values = np.random.default_rng(1).normal(size=400)
    [line] = summarise(scores("edits", *(("", [value]) for value in values)))
    half = 1.96 * values.std() / 20
    assert line.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert line.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_of_two_tags_the_interval_is_that_of_independent_means():
    random = np.random.default_rng(2)
    a, b = random.normal(size=300), 3 * random.normal(size=100)
    every = summarise(scores("edits", *(("a", [one]) for one in a), *(("b", [one]) for one in b)))[0]
    half = 1.96 * math.sqrt(a.var() / 300 + b.var() / 100) / 2
    assert (every.high - every.low) / 2 == pytest.approx(half, rel=0.1)


def test_seeds_are_of_row_and_picture_and_stay():
    seeds = {seed_of(0, row, number) for row in range(20) for number in range(20)}
    assert len(seeds) == 400 and seed_of(0, 3, 1) == seed_of(0, 3, 1) != seed_of(1, 3, 1)
