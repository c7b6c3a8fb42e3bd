"""The ablation's base checkpoints: trained until they stop getting better, and resumably."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from click.testing import CliRunner

from benchmarks.digits_unified import training
from benchmarks.digits_vqa import arms, language, pretrain
from benchmarks.digits_vqa.ablation import bases, ceiling, recipes, records, trained_out
from benchmarks.digits_vqa.ablation.plan import RATES, TUNING_SEED, Base, Cell, Towers, practice_plan, with_needs
from benchmarks.digits_vqa.ablation.results import Results
from benchmarks.digits_vqa.ablation.settings import ShortBases, TrainedOutBases
from benchmarks.digits_vqa.ablation.sweep import Sweep
from benchmarks.digits_vqa.ablation.table import practice_markdown
from benchmarks.digits_vqa.ablation.worker import execute
from benchmarks.digits_vqa.questions import QUESTION_TYPES
from benchmarks.digits_vqa.vlm import BASE_DIR

SMALL = {"steps": 2, "batch_size": 4, "train_scenes": 12, "test_scenes": 8, "contrastive_steps": 1}
TINY = TrainedOutBases(**SMALL, base_steps=6, decay_steps=2)


@pytest.fixture(autouse=True)
def _quick(registry, monkeypatch):
    # The arms make the base model's family known, which shall go again.
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    monkeypatch.setattr(language, "SCENES", 20)
    monkeypatch.setattr(language, "BATCH", 4)
    monkeypatch.setattr(trained_out, "VALIDATION_SCENES", 10)
    monkeypatch.setattr(trained_out, "EVALUATE_EVERY", 2)


def parameters(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def trained(work, **changes):
    vision_tower = arms.load_base().model.vision_tower.state_dict()
    settings = {"pooling": "4", "language_layers": 1, "seed": 0, "budget": 8, "decay_steps": 2, **changes}
    return trained_out.train_out(vision_tower, **settings, work=work)


def test_training_stops_where_it_no_longer_gets_better():
    def stops(losses, budget=10**6):
        reached = [trained_out.is_trained_out(losses[:number], budget) for number in range(len(losses) + 1)]
        return reached.index(True) if True in reached else None

    assert stops([1 / number for number in range(1, 50)]) is None
    # Three in a row that aren't better by one per cent; many small steps are one large one.
    assert stops([1.0, 1.0, 1.0, 1.0, 0.1]) == 4
    assert stops([0.5, 0.4, 0.4, 0.4, 0.4, 0.399, 0.399, 0.399]) == 8
    assert stops([0.993**number for number in range(50)]) is None
    # One that is low by chance hides nothing.
    assert stops([0.5, 0.4, 0.2, 0.3, 0.28, 0.26, 0.24, 0.22]) is None
    assert stops([1 / number for number in range(1, 50)], 4 * trained_out.EVALUATE_EVERY) == 4


def test_it_goes_on_where_it_was_interrupted_to_the_same_weights(tmp_path, monkeypatch):
    whole, told = trained(tmp_path / "whole")
    monkeypatch.setattr(training, "_EVERY", 1)
    ask, left = language.loss, 0

    def interrupted(*arguments):
        nonlocal left
        if torch.is_grad_enabled():
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
        return ask(*arguments)

    monkeypatch.setattr(language, "loss", interrupted)
    # Of ten steps: between two evaluations, and while the rate falls.
    for steps in (3, 6):
        left = steps
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "parts")
    left = 1
    again, told_again = trained(tmp_path / "parts")
    assert torch.equal(parameters(whole), parameters(again))
    assert told == told_again


def test_the_rate_falls_from_the_best_point_on(tmp_path, monkeypatch):
    curve = [3.0, 1.0, *[2.0] * 6]
    found = iter([*curve, 9.0])
    ask = language.loss

    def loss(*arguments):
        made = ask(*arguments)
        return made if torch.is_grad_enabled() else torch.tensor(next(found))

    monkeypatch.setattr(language, "loss", loss)
    monkeypatch.setattr(trained_out, "WARM_UP", 1)
    model, told = trained(tmp_path, budget=100)
    assert told["stopped"] == "no improvement"
    assert (told["best_step"], told["steps_at_constant_rate"]) == (4, 16)
    assert told["validation_losses"] == {str(2 * number): loss for number, loss in enumerate(curve, start=1)}
    assert told["validation_loss"] == 9.0
    best, last = (torch.load(tmp_path / name)["parameters"] for name in ("best.pt", "constant.pt"))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def distance(others):
        pairs = zip(trainable, others, strict=True)
        return sum((one.detach() - other).square().sum().item() for one, other in pairs)

    assert 0 < distance(best) < distance(last)


def test_a_base_checkpoint_says_how_it_was_trained_and_can_be_run(tmp_path):
    base, pooling = Base(0, "4, pixel shuffle"), "4, pixel shuffle"
    bases.make(base, TINY, tmp_path)
    folder = bases.folder(base, TINY, tmp_path)
    # What an interrupted training needs is gone.
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    told = json.loads((folder / bases.TRAINING).read_text())
    assert told["stopped"] == "budget" and set(told["validation_losses"]) == {"2", "4", "6"}
    assert set(told["validation_accuracy"]) == set(QUESTION_TYPES)
    model = arms.load_base(folder)
    assert model.config.pooling == pooling
    shipped, towers = arms.load_base().model.vision_tower, model.model.vision_tower
    assert torch.equal(parameters(shipped), parameters(towers))
    both = recipes.joint("modulation")
    record = execute(Cell(both, pooling, 0, 0, "test", 5e-3), TINY, tmp_path)
    assert record.parameters == 2 * recipes.ADAPTER_SIZE + 96


def test_a_study_makes_its_bases_chooses_rates_and_is_then_done(tmp_path):
    arms_wanted = (recipes.BASE, recipes.lora(2), recipes.joint("modulation"))
    cells = [job for job in practice_plan("modulation") if isinstance(job, Cell) and job.arm in arms_wanted]
    some = {cell for cell in cells if (cell.pooling, cell.base) == ("4", 0) and cell.seed in (0, TUNING_SEED)}
    jobs = with_needs(practice_plan("modulation"), some, TINY)
    assert jobs[:2] == [Towers(0), Base(0, "4")] and len(jobs) == 2 + 2 * (len(RATES) + 1) + 1
    results = tmp_path / "results.jsonl"
    with ThreadPoolExecutor(1) as executor:
        Sweep(jobs, TINY, results, tmp_path / "work").run(executor, 1)
    assert Sweep(jobs, TINY, results, tmp_path / "work").pending == []
    found = Results(records.read(results), TINY, "modulation")
    assert {arm for arm, pooling in found.arms if pooling == "4"} == set(arms_wanted)
    assert "| 4 |" in practice_markdown(found)


def test_other_bases_have_towers_of_their_own(tmp_path):
    assert bases.folder(Towers(0), TINY, tmp_path) == BASE_DIR
    bases.make(Towers(1), TINY, tmp_path)
    bases.make(Base(1, "1"), TINY, tmp_path)
    of_towers, own = (arms.load_base(bases.folder(made, TINY, tmp_path)) for made in (Towers(1), Base(1, "1")))
    assert torch.equal(parameters(of_towers.model.vision_tower), parameters(own.model.vision_tower))
    assert not torch.equal(parameters(own.model.vision_tower), parameters(arms.load_base().model.vision_tower))
    assert (bases.folder(Base(1, "1"), TINY, tmp_path) / "text_tower").is_dir()


def test_short_bases_go_on_from_the_one_that_pools_to_one_token(tmp_path):
    settings = ShortBases(**SMALL, pooled_steps=1)
    bases.make(Base(0, "4"), settings, tmp_path)
    assert bases.is_made(Base(0, "4"), settings, tmp_path)
    single, pooled = arms.load_base(), arms.load_base(bases.folder(Base(0, "4"), settings, tmp_path))
    before, after = (model.model.multi_modal_projector.linear_1.weight for model in (single, pooled))
    assert 0 < (before - after).abs().max() < 0.01
    assert bases.folder(Base(0, "1"), settings, tmp_path) == BASE_DIR


def test_the_ceiling_of_two_depths_is_printed(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    arguments = ["--base-steps", "2", "--decay-steps", "1", "--work", str(tmp_path)]
    result = CliRunner().invoke(ceiling.main, arguments, catch_exceptions=False)
    torch.set_num_threads(threads)
    assert "| 2 layers | 4 layers |" in result.output
    for type in QUESTION_TYPES:
        assert f"| {type} |" in result.output
    for layers in (2, 4):
        settings = TrainedOutBases(base_steps=2, decay_steps=1, language_layers=layers)
        folder = bases.folder(Base(0, "16"), settings, tmp_path)
        assert len(arms.load_base(folder).model.language_model.layers) == layers


def test_untrained_models_know_what_the_towers_know():
    vision_tower = arms.load_base().model.vision_tower
    model = pretrain.untrained(vision_tower.state_dict(), "16", 3)
    assert torch.equal(parameters(model.model.vision_tower), parameters(vision_tower))
    assert not any(parameter.requires_grad for parameter in model.model.vision_tower.parameters())
    assert len(model.model.language_model.layers) == 3
