"""Errors of the analysis."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from emma_adapter import AnalysisError, EmmaConfig, MediaLayout
from emma_adapter.analysis import (
    TokenMap,
    attention_mass,
    diagnose,
    information_gain,
    mask_statistics,
    mutual_information,
    on_image,
    pair_distances,
    probe,
    stitch,
    token_movement,
    weight_shares,
)
from emma_adapter.analysis.observing import _split_output
from tests.support import tiny

from .triggers import Bench, question, raises

LINEAR = EmmaConfig(fusion="linear")
SQUARE = np.zeros((2, 2), np.float32)
MAP = TokenMap(SQUARE, SQUARE, SQUARE, SQUARE, "image", 0, 0, 0, None)
NORMAL = np.random.default_rng(0).standard_normal((60, 3))


@raises(AnalysisError, "analysis/observing.py:observe", "a batch must be")
def analysing_a_text(bench: Bench) -> None:
    token_movement(bench.adapter(), "is there a cat?")


@raises(AnalysisError, "analysis/observing.py:observe", "saw no visual tokens")
def analysing_a_call_without_an_image(bench: Bench) -> None:
    token_movement(bench.adapter(), tiny.token_inputs([0]))


@raises(AnalysisError, "analysis/observing.py:observed_batches", "put a single one in a list")
def analysing_one_batch_where_many_are_wanted(bench: Bench) -> None:
    attention_mass(bench.adapter(), question())


@raises(AnalysisError, "analysis/observing.py:observed_batches", "no batch to analyse")
def analysing_an_iterator_that_is_used_up(bench: Bench) -> None:
    attention_mass(bench.adapter(), iter([]))


@raises(AnalysisError, "analysis/observing.py:_split_output", "can't be divided")
def a_projector_that_returns_another_number_of_tokens(bench: Bench) -> None:
    _split_output(torch.zeros(5, 4), MediaLayout(tokens=[2], entries=[1]))


@raises(AnalysisError, "analysis/movement.py:stitch", "tiles are needed")
def stitching_too_few_tiles(bench: Bench) -> None:
    stitch([MAP], 1, 2)


@raises(AnalysisError, "analysis/movement.py:on_image", "isn't known")
def painting_a_tile_of_unknown_place(bench: Bench) -> None:
    on_image([replace(MAP)], 4, 4)


@raises(AnalysisError, "analysis/weights.py:weight_shares", "weights by position")
def weights_by_position_of_attention(bench: Bench) -> None:
    weight_shares(bench.adapter(EmmaConfig(fusion="attention")))


@raises(AnalysisError, "analysis/attending.py:_cross_attention", "attends to nothing")
def attention_of_linear(bench: Bench) -> None:
    attention_mass(bench.adapter(LINEAR), [question()])


@raises(AnalysisError, "analysis/attending.py:attention_mass", "has an instruction")
def attention_to_empty_instructions(bench: Bench) -> None:
    nothing = torch.zeros(1, 2, dtype=torch.long)
    attention_mass(bench.adapter(), [{**question(), "instruction": nothing, "instruction_mask": nothing}])


@raises(AnalysisError, "analysis/attending.py:mask_statistics", "a mask over channels")
def the_mask_of_attention(bench: Bench) -> None:
    mask_statistics(bench.adapter(EmmaConfig(fusion="attention")), [question()])


@raises(AnalysisError, "analysis/pairs.py:pair_distances", "two batches each")
def pairs_that_are_single_batches(bench: Bench) -> None:
    pair_distances(bench.adapter(), [question()])


@raises(AnalysisError, "analysis/pairs.py:pair_distances", "other numbers of visual tokens")
def pairs_of_different_sizes(bench: Bench) -> None:
    pair_distances(bench.adapter(), [(tiny.token_inputs([1]), tiny.token_inputs([2]))])


@raises(AnalysisError, "analysis/pairs.py:pair_distances", "no pair to measure")
def no_pairs(bench: Bench) -> None:
    pair_distances(bench.adapter(), [])


@raises(AnalysisError, "analysis/information.py:information_gain", "where= must be")
def information_somewhere_else(bench: Bench) -> None:
    information_gain(bench.adapter(), [question()], ["no"], where="nowhere")


@raises(AnalysisError, "analysis/information.py:information_gain", "give one for each")
def too_few_responses(bench: Bench) -> None:
    information_gain(bench.adapter(), [question()], [])


@raises(AnalysisError, "analysis/information.py:_Estimation.__init__", "needs at least")
def information_of_too_few_samples(bench: Bench) -> None:
    mutual_information(NORMAL[:9], NORMAL[:9])


@raises(AnalysisError, "analysis/information.py:_Estimation.__init__", "are the same: give labels")
def information_of_vectors_that_are_labels(bench: Bench) -> None:
    mutual_information(NORMAL, np.eye(3)[np.arange(60) % 3])


@raises(AnalysisError, "analysis/information.py:_checked", "must be numbers")
def information_of_texts(bench: Bench) -> None:
    mutual_information(["a"] * 60, NORMAL)


@raises(AnalysisError, "analysis/information.py:_checked", "aren't finite")
def information_of_nan(bench: Bench) -> None:
    mutual_information(NORMAL * np.nan, NORMAL)


@raises(AnalysisError, "analysis/information.py:_components", "dims= must be")
def information_in_no_dimension(bench: Bench) -> None:
    mutual_information(NORMAL, NORMAL, dims=0)


@raises(AnalysisError, "analysis/information.py:_components", "all samples are the same")
def information_of_a_constant(bench: Bench) -> None:
    mutual_information(NORMAL * 0 + 1, NORMAL)


@raises(AnalysisError, "analysis/probes.py:probe", "needs features")
def probing_features_and_labels_of_different_numbers(bench: Bench) -> None:
    probe(NORMAL, [0, 1])


@raises(AnalysisError, "analysis/probes.py:probe", "groups must be [n]")
def probing_groups_of_another_number(bench: Bench) -> None:
    probe(NORMAL, np.arange(60) % 2, groups=[0, 1])


@raises(AnalysisError, "analysis/probes.py:probe", "aren't finite")
def probing_nan(bench: Bench) -> None:
    probe(NORMAL * np.nan, np.arange(60) % 2)


@raises(AnalysisError, "analysis/probes.py:probe", "with {folds} folds needs two labels")
def probing_for_one_label(bench: Bench) -> None:
    probe(NORMAL, np.zeros(60))


@raises(AnalysisError, "analysis/diagnosis.py:diagnose", "give one of each")
def diagnosing_without_answers(bench: Bench) -> None:
    diagnose(bench.adapter(), [question()], [])


@raises(AnalysisError, "analysis/diagnosis.py:diagnose", "asked often enough")
def diagnosing_a_single_question(bench: Bench) -> None:
    diagnose(bench.adapter(), [question()], ["no"])
