"""The ablation of the digits benchmark: its plans, their resumption, and what each arm trains."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import click
import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from benchmarks.digits_vqa import arms
from benchmarks.digits_vqa.ablation import recipes, records, variants
from benchmarks.digits_vqa.ablation.features import cache_features, use_cached_features, with_placeholders
from benchmarks.digits_vqa.ablation.plan import (
    BASES,
    RATES,
    SEEDS,
    TUNING_SEED,
    Base,
    Cell,
    Towers,
    needs,
    only_arms,
    parts_plan,
    practice_plan,
)
from benchmarks.digits_vqa.ablation.settings import ShortBases, TrainedOutBases
from benchmarks.digits_vqa.ablation.sweep import Sweep
from benchmarks.digits_vqa.pooled_llava import POOLINGS, PooledLlava, PooledProjector
from benchmarks.digits_vqa.runs import answer, make_batch, make_data, train
from benchmarks.digits_vqa.vlm import BASE_DIR, TEXT_TOWER_DIR, llava_config
from emma_adapter import get_adapter

#: Of the digits' four patches a side.
DIVIDING = [name for name, pooling in POOLINGS.items() if 4 % max(pooling.grid) == 0]
TINY = ShortBases(steps=2, batch_size=4, train_scenes=12, test_scenes=8)


@pytest.fixture(autouse=True)
def _registered(registry, monkeypatch):
    # The arms make the base model's family known, which shall go again.
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    variants.register()


# ------------------------------------------------------------------------------------------ plan


PLANS = {"practice": practice_plan, "parts": parts_plan}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


def cells(plan=parts_plan, fusion="modulation"):
    return [job for job in plan(fusion) if isinstance(job, Cell)]


@every_plan
def test_every_arm_is_tuned_alike_and_reported_on_all_bases_and_seeds(plan):
    jobs = plan("attention")
    assert len(set(jobs)) == len(jobs)
    poolings = {cell.pooling for cell in cells(plan)}
    assert {job for job in jobs if isinstance(job, Base)} == {Base(base, own) for base in BASES for own in poolings}
    assert {job for job in jobs if isinstance(job, Towers)} == {Towers(base) for base in BASES}
    for arm, pooling in {(cell.arm, cell.pooling) for cell in cells(plan)}:
        own = [cell for cell in cells(plan) if (cell.arm, cell.pooling) == (arm, pooling)]
        tuning = [cell for cell in own if cell.split == "validation"]
        reported = [cell for cell in own if cell.split == "test"]
        if arm == recipes.BASE:
            assert not tuning
            assert {cell.base for cell in reported} == set(BASES)
            continue
        assert [cell.rate for cell in tuning] == list(RATES)
        assert {(cell.base, cell.seed) for cell in tuning} == {(0, TUNING_SEED)}
        assert TUNING_SEED not in SEEDS
        assert [cell.rate for cell in reported] == [None] * len(reported)
        assert {(cell.base, cell.seed) for cell in reported} == {(base, seed) for base in BASES for seed in SEEDS}


@every_plan
def test_every_planned_arm_can_be_built(plan):
    planned = {cell.arm for fusion in recipes.FUSIONS for cell in cells(plan, fusion)}
    assert planned <= set(recipes.builders(TEXT_TOWER_DIR, TEXT_TOWER_DIR))


def test_the_parts_are_compared_with_the_whole_and_with_controls():
    planned = {(cell.arm, cell.pooling) for cell in cells(parts_plan, "attention")}
    single = [recipes.BASE, *recipes.FUSIONS, recipes.random_tower("attention"), recipes.shuffled("attention")]
    single += [recipes.PROJECTOR, recipes.LORA_QV, recipes.lora(), recipes.PROJECTOR_LORA]
    single += [recipes.with_projector(fusion) for fusion in recipes.FUSIONS]
    single += [*recipes.LINEAR_PARTS, *recipes.ATTENTION_CHANGES]
    assert {(arm, "1") for arm in single} <= planned
    for pooling in ("2", "4", "16"):
        assert {(arm, pooling) for arm in (recipes.BASE, "attention", recipes.lora())} <= planned


def test_what_practice_does_is_compared_at_every_pooling():
    planned = {(cell.arm, cell.pooling) for cell in cells(practice_plan)}
    for pooling in DIVIDING:
        for multiple in (1, 2):
            both, control = recipes.joint("modulation", multiple), recipes.lora(multiple + 1)
            assert {(both, pooling), (control, pooling), (recipes.BASE, pooling)} <= planned
    by_llm = recipes.llm_embeddings("modulation")
    for pooling in ("1", "2"):
        for arm in ("modulation", by_llm):
            assert {(arm, pooling), (recipes.with_roles(arm), pooling)} <= planned
    assert {(recipes.TWO_STEPS, "1"), (recipes.shuffled("modulation"), "1")} <= planned


def test_what_matters_most_comes_first():
    poolings = list(dict.fromkeys(job.pooling for job in cells(practice_plan)))
    assert poolings[:4] == ["1", "4", "16", "2"]
    first = {cell.arm for cell in cells(practice_plan)[: len(cells(practice_plan)) // 3]}
    assert first == {recipes.BASE, *recipes.practice("modulation")}


@every_plan
@pytest.mark.parametrize("settings", [ShortBases(), TrainedOutBases()], ids=["short", "trained out"])
def test_what_is_needed_is_planned_before(plan, settings):
    jobs = plan("modulation")
    place = {job: number for number, job in enumerate(jobs)}
    assert all(needs(job, settings) is None or place[needs(job, settings)] < place[job] for job in jobs)


def test_chosen_arms_bring_the_checkpoints_they_need():
    jobs = only_arms(parts_plan("modulation"), [recipes.LORA_QV], ShortBases())
    assert {job for job in jobs if isinstance(job, Base)} == {Base(base, "1") for base in BASES}
    assert {job.arm for job in jobs if isinstance(job, Cell)} == {recipes.LORA_QV}
    with pytest.raises(ValueError, match="LoRA on q, v"):
        only_arms(parts_plan("modulation"), ["LoRA"], ShortBases())


# ------------------------------------------------------------------------------------------ resumption


class Interrupted(ThreadPoolExecutor):
    """One worker that gets through ``jobs`` jobs and is then interrupted."""

    def __init__(self, jobs):
        super().__init__(1)
        self.left, self.submitted = jobs, []

    def submit(self, function, job, *args):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.submitted.append(job)
        return super().submit(function, job, *args)


def some_jobs():
    wanted = (recipes.LORA_QV, "linear")
    return [cell for cell in cells() if cell.arm in wanted and cell.base == 0 and cell.seed in (0, TUNING_SEED)]


def test_an_interrupted_sweep_goes_on_where_it_stopped(tmp_path):
    jobs = some_jobs()
    assert len(jobs) == 2 * (len(RATES) + 1)
    whole, parts, work = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl", tmp_path / "work"
    with Interrupted(100) as executor:
        Sweep(jobs, TINY, whole, work).run(executor, 1)
    with Interrupted(3) as executor, pytest.raises(KeyboardInterrupt):
        Sweep(jobs, TINY, parts, work).run(executor, 1)
    assert len(records.read(parts)) == 3
    # A kill while the next line was written.
    with parts.open("ab") as file:
        file.write(whole.read_bytes().splitlines()[3][:50])
    assert len(records.read(parts)) == 3
    with Interrupted(100) as executor:
        sweep = Sweep(jobs, TINY, parts, work)
        assert len(sweep.pending) == len(jobs) - 3
        sweep.run(executor, 1)
    assert not set(executor.submitted) & {record.cell for record in records.read(parts)[:3]}
    timeless = [
        [dataclasses.replace(record, seconds=0, cpu_seconds=0) for record in records.read(path)]
        for path in (whole, parts)
    ]
    # The same weights, questions and answers, run for run.
    assert timeless[0] == timeless[1]
    assert Sweep(jobs, TINY, parts, work).pending == []
    # Runs of other settings don't count.
    assert len(Sweep(jobs, dataclasses.replace(TINY, steps=3), parts, work).pending) == len(jobs)
    # The reported run has the rate that was best on the validation split.
    for arm in (recipes.LORA_QV, "linear"):
        own = [record for record in records.read(parts) if record.arm == arm]
        tried = {record.rate: record.mean for record in own if record.split == "validation"}
        [reported] = [record for record in own if record.split == "test"]
        assert tried[reported.rate] == max(tried.values())
        assert reported.rate_at_edge == (reported.rate in (min(RATES), max(RATES)))


def test_a_job_that_fails_is_named_and_what_was_finished_stays(tmp_path):
    jobs = [Cell("no such arm", "1", 0, 0, "test", 1e-3)]
    with ThreadPoolExecutor(1) as executor, pytest.raises(click.ClickException, match=r"no such arm.*is kept"):
        Sweep(jobs, TINY, tmp_path / "results.jsonl", tmp_path / "work").run(executor, 1)


def test_a_damaged_line_in_the_middle_is_reported(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"arm": "base"\n{}\n')
    with pytest.raises(click.ClickException, match=r"line 1 of .* remove the line"):
        records.read(path)


def test_bits_survive_packing():
    right = np.random.default_rng(0).random(1003) < 0.3
    assert (records.unpack(records.pack(right), 1003) == right).all()


# ------------------------------------------------------------------------------------------ cached features


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(BASE_DIR)


@pytest.fixture(scope="module")
def data(processor):
    return make_data(processor, train_scenes=6, test_scenes=4, pairs=4, split="validation")


def test_cached_features_change_nothing(processor, data):
    """Logits and gradients of a patched model, whether the instruction is read from the prompt or named."""
    cached = cache_features(arms.load_base(), data)
    found = []
    for use_cache, named in ((False, False), (True, False), (False, True), (True, True)):
        torch.manual_seed(0)
        model = arms.load_base()
        source = cached.data if use_cache else data
        if use_cache:
            use_cached_features(model, cached)
        arm = recipes.builders(TEXT_TOWER_DIR, TEXT_TOWER_DIR)["attention"](model, processor)
        torch.nn.init.normal_(get_adapter(model).alignment.fusion.cross_attention.output.weight, std=0.3)
        for part in (source.train, source.pairs):
            chosen = list(range(len(part.questions)))[-8:]
            texts = {"instruction": [part.questions[i].text for i in chosen]} if named else {}
            out = arm.model(**make_batch(processor.tokenizer, part, chosen, answered=True), **texts)
            found.append(out.logits.detach())
        out.loss.backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in arm.parameters]))
    for plain, cache in zip(found[:3] + found[6:9], found[3:6] + found[9:], strict=True):
        torch.testing.assert_close(cache, plain, rtol=1e-5, atol=2e-5)


def test_poolings():
    tokens = torch.randn(3, 16, 96)
    projectors = {name: PooledProjector(llava_config(name)) for name in DIVIDING}
    for name, projector in projectors.items():
        if name != "4, pixel shuffle":
            projector.load_state_dict(projectors["1"].state_dict())
        assert projector(tokens).shape == (3, POOLINGS[name].tokens, 96)
    unpooled = projectors["16"](tokens)
    torch.testing.assert_close(projectors["1"](tokens)[:, 0], unpooled.mean(1))
    torch.testing.assert_close(projectors["2"](tokens)[:, 1], unpooled[:, 8:].mean(1))
    torch.testing.assert_close(projectors["4"](tokens)[:, 1], unpooled[:, [2, 3, 6, 7]].mean(1))
    averaged = tokens.mean(1, keepdim=True).expand_as(tokens)
    torch.testing.assert_close(projectors["1, averaged before projecting"](tokens), projectors["1"](averaged))
    shuffled = projectors["4, pixel shuffle"]
    hidden = shuffled.linear_1(tokens[:, [8, 9, 12, 13]].flatten(1))
    torch.testing.assert_close(shuffled(tokens)[:, 2], shuffled.linear_2(shuffled.act(hidden)))


@pytest.mark.parametrize("pooling", DIVIDING)
def test_whatever_the_pooling_the_adapter_sees_all_patches(pooling, processor, data):
    cached = cache_features(arms.load_base(), data)
    model = use_cached_features(PooledLlava(llava_config(pooling, language_layers=1)).eval(), cached)
    arm = recipes.builders(TEXT_TOWER_DIR, TEXT_TOWER_DIR)["modulation"](model, processor)
    seen = []
    get_adapter(model).alignment.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    batch = make_batch(processor.tokenizer, with_placeholders(cached.data, pooling).test, [0, 1, 2], answered=False)
    assert (batch["input_ids"] == model.config.image_token_id).sum(1).tolist() == [POOLINGS[pooling].tokens] * 3
    assert torch.isfinite(arm.model(**batch).logits).all()
    assert seen == [(3, 16, 96)]


@pytest.mark.parametrize("name", [recipes.behind_projector("modulation"), recipes.MODA])
@pytest.mark.parametrize("pooling", ["1", "4", "16"])
def test_behind_the_projector_the_adapter_sees_what_the_language_model_sees(name, pooling, processor, data):
    cached = cache_features(arms.load_base(), data)
    model = use_cached_features(PooledLlava(llava_config(pooling, language_layers=1)).eval(), cached)
    arm = recipes.builders(TEXT_TOWER_DIR, TEXT_TOWER_DIR)[name](model, processor)
    seen = []
    get_adapter(model).alignment.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    answer(arm, with_placeholders(cached.data, pooling).test, processor)
    assert {shape[1:] for shape in seen} == {(POOLINGS[pooling].tokens, 96)}


# ------------------------------------------------------------------------------------------ arms


@pytest.mark.parametrize("layers", [2, 4])
def test_arms_of_equal_size(layers, processor):
    built = recipes.builders(TEXT_TOWER_DIR, TEXT_TOWER_DIR)

    def size(name):
        return built[name](PooledLlava(llava_config(language_layers=layers)), processor).num_parameters

    adapter = recipes.ADAPTER_SIZE
    assert size("attention") == size("modulation") == adapter
    for name in (recipes.LORA_QV, recipes.shuffled("attention"), recipes.constant("attention")):
        assert size(name) == pytest.approx(adapter, rel=0.02)
    for multiple in recipes.MULTIPLES:
        assert size(recipes.lora(multiple)) == pytest.approx(multiple * adapter, rel=0.01)
        assert size(recipes.joint("modulation", multiple)) == adapter + size(recipes.lora(multiple))
    assert size(recipes.TWO_STEPS) == pytest.approx(adapter, rel=0.02)
    assert size(recipes.behind_projector("modulation")) == pytest.approx(adapter, rel=0.05)
    assert size(recipes.MODA) == pytest.approx(2 * adapter, rel=0.15)
    with_projector = size("projector + modulation")
    assert with_projector == adapter + size(recipes.PROJECTOR)
    assert size(recipes.PROJECTOR_LORA) == pytest.approx(with_projector, rel=0.01)


def told(name, processor, questions):
    """What the adapter of an arm is told: instruction tokens and, unless it reads padding, their mask, by batch."""
    arm = recipes.builders(TEXT_TOWER_DIR, TEXT_TOWER_DIR)[name](arms.load_base(), processor)
    asked = []
    get_adapter(arm.model).alignment.register_forward_pre_hook(lambda module, args: asked.append(args[1:3]))
    answer(arm, questions, processor)
    assert sum(len(tokens) for tokens, _ in asked) == len(questions.questions)
    return asked


def test_the_constant_instruction_is_the_same_for_all(processor, data):
    tokens = torch.cat([tokens for tokens, _ in told(recipes.constant("linear"), processor, data.test)])
    assert torch.equal(tokens, tokens[:1].expand_as(tokens))


@pytest.mark.parametrize("name", ["modulation", recipes.llm_embeddings("modulation")])
def test_role_words_are_two_more_words(name, processor, data):
    alone, with_roles = (
        torch.cat([mask.sum(1) for _, mask in told(arm, processor, data.test)])
        for arm in (name, recipes.with_roles(name))
    )
    assert torch.equal(with_roles, alone + 2)
    words = recipes.WITH_ROLES.format(question=data.test.questions[0].text)
    for tokenizer in (processor.tokenizer, AutoProcessor.from_pretrained(TEXT_TOWER_DIR)):
        assert tokenizer.unk_token_id not in tokenizer(words).input_ids


def test_adapter_and_lora_both_learn_and_the_base_model_does_not(processor, data):
    torch.manual_seed(0)
    arm = recipes.builders(TEXT_TOWER_DIR, TEXT_TOWER_DIR)[recipes.joint("modulation")](arms.load_base(), processor)
    before = {name: parameter.detach().clone() for name, parameter in arm.model.named_parameters()}
    train(arm, data.train, processor, steps=2, batch_size=8, seed=0)
    changed = {name for name, parameter in arm.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {True, False} == {"lora_" in name for name in changed}
    trained = {id(parameter) for parameter in arm.parameters}
    assert {id(parameter) for name, parameter in arm.model.named_parameters() if name in changed} <= trained
    output = get_adapter(arm.model).alignment.fusion.cross_attention.output.weight
    assert id(output) in trained and output.any()
