"""The ablation of the digits benchmark: its plan, its resumption, its variants, its statistics."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor

import click
import numpy as np
import pytest
import scipy.stats
import torch
from click.testing import CliRunner
from filelock import FileLock
from transformers import AutoProcessor

from benchmarks.digits_vqa import arms, pretrain
from benchmarks.digits_vqa.ablation import __main__ as command
from benchmarks.digits_vqa.ablation import bases, recipes, records, variants
from benchmarks.digits_vqa.ablation.features import cache_features, use_cached_features, with_placeholders
from benchmarks.digits_vqa.ablation.plan import BASES, RATES, SEEDS, TUNING_SEED, Base, Cell, Settings, only_arms, plan
from benchmarks.digits_vqa.ablation.records import Record
from benchmarks.digits_vqa.ablation.report import RESULTS, write_report
from benchmarks.digits_vqa.ablation.results import Results
from benchmarks.digits_vqa.ablation.statistics import Clusters, mean_over_types
from benchmarks.digits_vqa.ablation.sweep import Sweep
from benchmarks.digits_vqa.ablation.table import markdown
from benchmarks.digits_vqa.ablation.worker import execute, fingerprint
from benchmarks.digits_vqa.pooled_llava import PooledLlava, PooledProjector
from benchmarks.digits_vqa.questions import QUESTION_TYPES
from benchmarks.digits_vqa.runs import answer, ask_for_pairs, ask_for_test, make_batch, make_data
from benchmarks.digits_vqa.vlm import BASE_DIR, TEXT_TOWER_DIR, llava_config
from emma_adapter import EmmaAlignment, EmmaConfig, get_adapter

TINY = Settings(steps=2, batch_size=4, train_scenes=12, test_scenes=8, pooled_steps=1)


@pytest.fixture(autouse=True)
def _variants(registry):
    variants.register()


# ------------------------------------------------------------------------------------------ plan


def cells(fusion="modulation"):
    return [job for job in plan(fusion) if isinstance(job, Cell)]


def test_every_arm_is_tuned_alike_and_reported_on_all_bases_and_seeds():
    assert len({(job.base, job.pooled_tokens) for job in plan("attention") if isinstance(job, Base)}) == 12
    for arm, pooled_tokens in {(cell.arm, cell.pooled_tokens) for cell in cells()}:
        own = [cell for cell in cells() if (cell.arm, cell.pooled_tokens) == (arm, pooled_tokens)]
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


def test_the_plan_holds_every_comparison():
    planned = {(cell.arm, cell.pooled_tokens) for cell in cells("attention")}
    single = [recipes.BASE, *recipes.controls("attention"), recipes.random_tower("attention"), *recipes.FUSIONS]
    single += [recipes.with_projector(fusion) for fusion in recipes.FUSIONS]
    single += [*recipes.LINEAR_PARTS, *recipes.ATTENTION_CHANGES]
    assert {(arm, 1) for arm in single} <= planned
    for tokens in (2, 4, 16):
        assert {(arm, tokens) for arm in (recipes.BASE, "attention", recipes.LORA_ALL)} <= planned
    for tokens in (4, 16):
        assert {(arm, tokens) for arm in ("projector + attention", recipes.PROJECTOR_LORA)} <= planned
    known = recipes.builders(TEXT_TOWER_DIR, TEXT_TOWER_DIR)
    assert {arm for arm, _ in planned} <= set(known)


def test_chosen_arms_bring_the_checkpoints_they_need():
    jobs = only_arms(plan("modulation"), [recipes.LORA_QV])
    assert {job for job in jobs if isinstance(job, Base)} == {Base(base, 1) for base in BASES}
    assert {job.arm for job in jobs if isinstance(job, Cell)} == {recipes.LORA_QV}
    with pytest.raises(ValueError, match="LoRA on q, v"):
        only_arms(plan("modulation"), ["LoRA"])


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
    jobs = [Cell("no such arm", 1, 0, 0, "test", 1e-3)]
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


def test_poolings(processor, data):
    tokens = torch.randn(3, 16, 96)
    projectors = {number: PooledProjector(llava_config(number)) for number in (1, 2, 4, 16)}
    for projector in projectors.values():
        projector.load_state_dict(projectors[1].state_dict())
    unpooled = projectors[16](tokens)
    assert unpooled.shape == (3, 16, 96)
    torch.testing.assert_close(projectors[1](tokens)[:, 0], unpooled.mean(1))
    torch.testing.assert_close(projectors[2](tokens)[:, 1], unpooled[:, 8:].mean(1))
    torch.testing.assert_close(projectors[4](tokens)[:, 1], unpooled[:, [2, 3, 6, 7]].mean(1))


def test_prompts_hold_as_many_placeholders_as_an_image_has_tokens(processor, data):
    cached = cache_features(arms.load_base(), data)
    model = use_cached_features(PooledLlava(llava_config(4)).eval(), cached)
    arm = recipes.builders(TEXT_TOWER_DIR, TEXT_TOWER_DIR)["modulation"](model, processor)
    expanded = with_placeholders(cached.data, 4).test
    batch = make_batch(processor.tokenizer, expanded, [0, 1, 2], answered=False)
    assert (batch["input_ids"] == model.config.image_token_id).sum(1).tolist() == [4, 4, 4]
    assert torch.isfinite(arm.model(**batch).logits).all()


def test_a_checkpoint_that_pools_to_more_tokens_starts_from_the_one_that_pools_to_one(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "LANGUAGE_SCENES", 20)
    monkeypatch.setattr(pretrain, "answer_accuracy", lambda model, split: {"all": 0.0})
    bases.make(Base(0, 4), TINY, tmp_path)
    assert bases.is_made(Base(0, 4), TINY, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [bases.folder(Base(0, 4), TINY, tmp_path).name]
    single, pooled = arms.load_base(), arms.load_base(bases.folder(Base(0, 4), TINY, tmp_path))
    for one, other in zip(single.model.vision_tower.parameters(), pooled.model.vision_tower.parameters(), strict=True):
        assert torch.equal(one, other)
    before, after = (model.model.multi_modal_projector.linear_1.weight for model in (single, pooled))
    assert 0 < (before - after).abs().max() < 0.01
    record = execute(Cell("modulation", 4, 0, 0, "test", 5e-3), TINY, tmp_path)
    assert record.parameters == recipes.ADAPTER_SIZE


# ------------------------------------------------------------------------------------------ variants

SIZES = EmmaConfig(
    visual_dim=12, instruction_dim=10, num_visual_tokens=4, visual_grid=(2, 2), max_instruction_tokens=5, inner_dim=16
)
IDENTITIES = sorted({*recipes.LINEAR_PARTS, *recipes.ATTENTION_CHANGES} - {"attention, output not zero-initialised"})


def aligned(fusion, seed=0):
    torch.manual_seed(seed)
    alignment = EmmaAlignment(SIZES.replace(fusion=fusion))
    inputs = torch.randn(2, 4, 12), torch.randn(2, 5, 10)
    return alignment, inputs[0], alignment(*inputs)


@pytest.mark.parametrize("fusion", IDENTITIES)
def test_untrained_variants_are_the_identity_and_learn(fusion):
    alignment, visual_tokens, out = aligned(fusion)
    assert torch.equal(out, visual_tokens)
    optimizer = torch.optim.SGD(alignment.parameters(), lr=0.1)
    torch.nn.functional.mse_loss(out, torch.ones_like(out)).backward()
    optimizer.step()
    assert not torch.equal(alignment(visual_tokens, torch.randn(2, 5, 10)), visual_tokens)


def test_the_output_that_is_not_zero_initialised_is_no_identity():
    _, visual_tokens, out = aligned("attention, output not zero-initialised")
    assert not torch.allclose(out, visual_tokens, atol=1e-3)


def test_a_zero_gate_on_a_zero_output_would_never_learn():
    """Why the arm with the gate has the usual output projection."""
    alignment, _, _ = aligned("attention, scalar zero gate")
    torch.nn.init.zeros_(alignment.fusion.cross_attention.output.weight)
    torch.nn.init.zeros_(alignment.fusion.cross_attention.output.bias)
    alignment(torch.randn(2, 4, 12), torch.randn(2, 5, 10)).square().sum().backward()
    assert all(not parameter.grad.any() for parameter in alignment.parameters())


def test_each_change_of_attention_is_one_change():
    plain = dict(aligned("attention")[0].named_parameters())
    for fusion in recipes.ATTENTION_CHANGES:
        changed = dict(aligned(fusion)[0].named_parameters())
        names = {name.removeprefix("fusion.").removeprefix("cross_attention.") for name in set(plain) ^ set(changed)}
        assert names == {
            "attention, no query term per position": {"position"},
            "attention, scalar zero gate": {"gate"},
        }.get(fusion, set())
    attention = aligned("attention, usual q/k initialisation")[0].fusion.cross_attention
    for weight in (attention.query.weight, attention.key.weight, attention.position):
        assert weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert not attention.output.weight.any()
    # The variance of the query is the same with and without the term per position.
    blind = aligned("attention, no query term per position")[0].fusion.cross_attention
    assert blind.query.weight.std().item() == pytest.approx(1.5 / 12**0.5, rel=0.2)


def test_parts_of_linear():
    """Instruction projection: ``P [D, Dt]`` and p. Alignment: ``W [N, N + T]`` and b."""
    projection, alignment, both = (
        sum(parameter.numel() for parameter in aligned(fusion)[0].parameters())
        for fusion in (*recipes.LINEAR_PARTS, "linear")
    )
    assert (projection, alignment) == (12 * 10 + 12, 4 * (4 + 5) + 4)
    assert both == projection + alignment
    module, visual_tokens, _ = aligned(recipes.LINEAR_PARTS[0])
    torch.nn.init.normal_(module.fusion.instruction_projection.weight)
    instruction = torch.randn(2, 5, 10)
    added = torch.nn.functional.gelu(instruction @ module.fusion.instruction_projection.weight.T).mean(1, keepdim=True)
    torch.testing.assert_close(module(visual_tokens, instruction), visual_tokens + added)


def test_arms_of_equal_size(processor):
    built = recipes.builders(TEXT_TOWER_DIR, TEXT_TOWER_DIR)
    size = {}
    for name in (*recipes.controls("attention"), "attention", "modulation", "projector + modulation"):
        size[name] = built[name](arms.load_base(), processor).num_parameters
    assert size["attention"] == size["modulation"] == recipes.ADAPTER_SIZE
    for name in (recipes.LORA_QV, recipes.LORA_ALL, recipes.shuffled("attention"), recipes.constant("attention")):
        assert size[name] == pytest.approx(recipes.ADAPTER_SIZE, rel=0.01)
    assert size["projector + modulation"] == recipes.ADAPTER_SIZE + size[recipes.PROJECTOR]
    assert size[recipes.PROJECTOR_LORA] == pytest.approx(size["projector + modulation"], rel=0.01)


def test_the_constant_instruction_is_the_same_for_all(processor, data):
    arm = recipes.builders(TEXT_TOWER_DIR, TEXT_TOWER_DIR)[recipes.constant("linear")](arms.load_base(), processor)
    asked = []
    get_adapter(arm.model).alignment.register_forward_pre_hook(lambda module, args: asked.append(args[1]))
    answer(arm, data.test, processor)
    tokens = torch.cat(asked)
    assert len(tokens) == len(data.test.questions)
    assert torch.equal(tokens, tokens[:1].expand_as(tokens))


# ------------------------------------------------------------------------------------------ statistics


def test_intervals_against_scipy():
    rng = np.random.default_rng(3)
    scenes = np.repeat(np.arange(60), rng.integers(1, 6, 60))
    types = rng.integers(0, 2, len(scenes))
    values = (rng.random(len(scenes)) < 0.2 + 0.5 * rng.random(60)[scenes]).astype(float)

    def statistic(drawn):
        rows = np.concatenate([np.flatnonzero(scenes == scene) for scene in drawn])
        return np.mean([values[rows][types[rows] == type].mean() for type in (0, 1)])

    wanted = scipy.stats.bootstrap(
        (np.arange(60),), statistic, vectorized=False, n_resamples=1500, method="percentile", random_state=1
    ).confidence_interval
    found = mean_over_types(values, Clusters(scenes, types))
    assert found.value == pytest.approx(statistic(np.arange(60)))
    assert found.low == pytest.approx(wanted.low, abs=0.015)
    assert found.high == pytest.approx(wanted.high, abs=0.015)


def test_questions_of_one_scene_count_as_one():
    """Ten copies of each question don't make the interval narrower; it is that of the mean of scenes."""
    right = np.random.default_rng(0).random(400) < 0.5
    found = mean_over_types(
        np.repeat(right, 10).astype(float), Clusters(np.repeat(np.arange(400), 10), np.zeros(4000, int))
    )
    assert found.half_width == pytest.approx(1.96 * right.std() / 20, rel=0.05)


# ------------------------------------------------------------------------------------------ report and command


def made_up_records(settings):
    """``modulation`` is right far more often than LoRA, which is the best of the controls; ``linear`` isn't."""
    _, questions = ask_for_test(settings.test_scenes, "test")
    _, _, pairs = ask_for_pairs(settings.test_scenes, "test")
    chance = {"modulation": 0.85, "linear": 0.61, recipes.LORA_ALL: 0.62, recipes.LORA_QV: 0.5, recipes.BASE: 0.4}
    chance[recipes.PROJECTOR_LORA] = 0.95
    size = dict.fromkeys(chance, recipes.ADAPTER_SIZE) | {recipes.PROJECTOR_LORA: 62_000, recipes.BASE: 0}
    made = []
    for number, (arm, share) in enumerate(chance.items()):
        for base in (0, 1):
            rng = np.random.default_rng((number, base))
            right, of_pairs = rng.random(len(questions)) < share, rng.random(len(pairs)) < share
            types = np.array([question.type for question in questions])
            accuracy = {type: float(right[types == type].mean()) for type in QUESTION_TYPES}
            made.append(
                Record(
                    arm=arm, pooled_tokens=1, base=base, seed=0, split="test", rate=5e-3, rate_at_edge=False,
                    settings=dataclasses.asdict(settings), parameters=size[arm], seconds=1.0, cpu_seconds=1.0,
                    mean=float(np.mean(list(accuracy.values()))), accuracy=accuracy, pairs=0.5,
                    right=records.pack(right), pairs_right=records.pack(of_pairs),
                    questions=fingerprint(questions + pairs),
                )
            )  # fmt: skip
    return made


def test_report_computes_the_best_control_of_equal_size(tmp_path):
    settings = Settings(test_scenes=100)
    made = made_up_records(settings)
    results = Results(made, settings, "modulation")
    modulation, linear = results.get("modulation"), results.get("linear")
    # The projector with LoRA is better, and larger.
    assert results.best_control(modulation).arm == recipes.LORA_ALL
    wanted = np.mean([r.mean for r in made if r.arm == "modulation"]) - np.mean(
        [r.mean for r in made if r.arm == recipes.LORA_ALL]
    )
    gain = results.gain(modulation, results.best_control(modulation))
    assert gain.value == pytest.approx(wanted, abs=1e-4)
    assert gain.low < gain.value < gain.high
    assert results.gain(linear, results.best_control(linear)).low < 0
    for record in made:
        records.append(tmp_path / "results.jsonl", record)
    write_report(tmp_path / "results.jsonl", settings, "modulation")
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "modulation, 1 token an image: " in text
    assert "over LoRA on all linears, the best control of equal size; the goal of 5 is reached" in text
    assert "tells from zero: linear (1 token)" in text
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_the_shipped_tables_are_those_of_the_shipped_records():
    results = Results(records.read(RESULTS), Settings(), "modulation")
    assert markdown(results) == RESULTS.with_suffix(".md").read_text(encoding="utf-8")


def test_records_of_other_questions_are_refused():
    settings = Settings(test_scenes=100)
    made = [dataclasses.replace(record, questions="others") for record in made_up_records(settings)]
    with pytest.raises(click.ClickException, match="remove the results file"):
        Results(made, settings, "modulation")


def test_the_plan_is_printed_and_nothing_else_happens(tmp_path):
    paths = ["--results", str(tmp_path / "a" / "results.jsonl"), "--work", str(tmp_path / "work")]
    result = CliRunner().invoke(command.main, ["--plan", *paths], catch_exceptions=False)
    runs = len(cells())
    assert f"{runs} runs and 11 base checkpoints in all" in result.output
    assert not list(tmp_path.iterdir())


def test_mistakes_are_explained(tmp_path):
    paths = ["--results", str(tmp_path / "results.jsonl"), "--work", str(tmp_path)]
    result = CliRunner().invoke(command.main, ["--only", "lora", "--plan", *paths])
    assert result.exit_code == 2
    assert "LoRA on q, v" in result.output
    with FileLock(tmp_path / "sweep.lock"):
        result = CliRunner().invoke(command.main, paths)
    assert result.exit_code == 1
    assert "another sweep is running" in result.output


def test_a_record_is_one_json_line(tmp_path):
    path = tmp_path / "results.jsonl"
    record = made_up_records(Settings(test_scenes=10))[0]
    records.append(path, record)
    records.append(path, record)
    lines = path.read_text().splitlines()
    assert [json.loads(line)["arm"] for line in lines] == ["modulation"] * 2
    assert records.read(path) == [record, record]
