"""The model that TRL's trainers compare with is the one that training starts from, its adapter included."""

from __future__ import annotations

import contextlib
import math
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model

from emma_adapter import EmmaConfig, PatchError, patch_model
from emma_adapter.integrations.trl import keep_reference, reference_model
from tests.support import tiny

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
from trl.trainer.utils import use_adapter  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:labels supervise the instruction too"),
]
CONFIG = EmmaConfig(inner_dim=8, num_heads=2)
LORA = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
FRESH_LORA = LoraConfig(r=2, target_modules=["q_proj"])
QUESTIONS = ["how many dogs are there?", "what colour is the left one?", "is there a cat?", "what is in the picture?"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base model that can be loaded by its name."""
    folder = tmp_path_factory.mktemp("base")
    tiny.llava(vocab_size=len(tiny.tokenizer()), image_token=4).save_pretrained(folder)
    return folder


def patched(base, *, projector=False, trained=True):
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(base)
    torch.manual_seed(3)
    adapter = patch_model(model, CONFIG, processor=tiny.processor()).train_only(projector=projector)
    if trained:
        tiny.train_randomly(adapter.alignment)
        if projector:
            tiny.train_randomly(adapter.projector.linear_1, scale=0.1)
    return model, adapter


def preferences():
    said = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    rows = [
        {
            "prompt": [{"role": "user", "content": question}],
            "chosen": said("two red birds"),
            "rejected": said("a tree"),
            "images": [tiny.picture(number)],
        }
        for number, question in enumerate(QUESTIONS)
    ]
    return datasets.Dataset.from_list(rows)


SETTINGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 5e-2,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "save_strategy": "no",
    "gradient_checkpointing": False,
}


def dpo(model, folder, **options):
    settings = {**SETTINGS, "max_length": None, "output_dir": str(folder)}
    arguments = {name: options.pop(name) for name in ("ref_model", "peft_config") if name in options}
    return trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(**{**settings, **options}),
        train_dataset=preferences(),
        processing_class=tiny.processor(),
        **arguments,
    )


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def reference_logps(trainer):
    """What the trainer's own reference pass says of one batch, as numbers of this moment."""
    batch = next(iter(trainer.get_train_dataloader()))
    mode = trainer.model.training
    trainer.model.train()
    with torch.no_grad():
        found = torch.cat(trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch))
    trainer.model.train(mode)
    return found


def check_run(trainer):
    """The first loss of DPO with the right reference is ln 2, and the reference is the same after training."""
    before = reference_logps(trainer)
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, start[name])}
    assert any(".emma." in name for name in changed)
    assert not any("reference" in name or ".ref." in name for name in changed)
    assert logged(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert torch.equal(reference_logps(trainer), before)
    return changed


@pytest.mark.parametrize("projector", [False, True])
@pytest.mark.parametrize("way", ["reference_model", "keep_reference"])
def test_dpo_starts_at_ln_2_and_its_reference_stays(way, projector, base, tmp_path):
    model, _ = patched(base, projector=projector)
    if way == "reference_model":
        trainer = dpo(model, tmp_path, ref_model=reference_model(model))
    else:
        trainer = dpo(model, tmp_path)
        keep_reference(trainer)
    changed = check_run(trainer)
    assert any("linear_1" in name for name in changed) is projector
    mine, its = dict(model.named_parameters()), dict(trainer.ref_model.named_parameters())
    for name, parameter in mine.items():
        assert (its[name] is parameter) is (not parameter.requires_grad), name


@pytest.mark.parametrize("projector", [False, True])
@pytest.mark.parametrize("lora", ["peft_config", "fresh", "trained", "beside"])
def test_dpo_of_a_lora_beside_the_adapter(lora, projector, base, tmp_path):
    model, adapter = patched(base, projector=projector)
    options = {}
    if lora == "peft_config":
        options["peft_config"] = FRESH_LORA
    elif lora == "beside":
        options.update(peft_config=FRESH_LORA, ref_model=reference_model(model))
    else:
        model = get_peft_model(model, FRESH_LORA if lora == "fresh" else LORA)
    trainer = dpo(model, tmp_path, **options)
    if lora != "beside":
        keep_reference(trainer)
        assert adapter.names == ("default", "reference")
    check_run(trainer)
    assert adapter.active == "default"
    if lora != "beside":
        adapter.remove("reference")


def test_without_a_reference_of_its_own_dpo_is_told(base, tmp_path):
    model, _ = patched(base)
    with pytest.warns(UserWarning, match="base model without the EMMA adapter"):
        dpo(model, tmp_path).train()
    trainer = dpo(patched(base)[0], tmp_path, peft_config=FRESH_LORA)
    with pytest.raises(PatchError, match="reference would change with it"):
        trainer.train()


def test_where_the_bare_base_is_right_nothing_is_said(base, tmp_path):
    model, _ = patched(base, trained=False)
    trainer = dpo(model, tmp_path, max_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*reference")
        trainer.train()
    assert logged(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    # A frozen adapter doesn't drift.
    model, adapter = patched(base)
    adapter.alignment.requires_grad_(False)
    trainer = dpo(model, tmp_path, max_steps=1, peft_config=FRESH_LORA)
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)


def prompts():
    rows = [
        {"prompt": [{"role": "user", "content": question}], "images": [tiny.picture(number)]}
        for number, question in enumerate(QUESTIONS)
    ]
    return datasets.Dataset.from_list(rows)


def rewarded(kind, model, folder, **options):
    """GRPO or RLOO, which take no ``ref_model=``."""
    trainer, config = {"grpo": (trl.GRPOTrainer, trl.GRPOConfig), "rloo": (trl.RLOOTrainer, trl.RLOOConfig)}[kind]
    settings = {
        **SETTINGS,
        "output_dir": str(folder),
        "num_generations": 2,
        "max_completion_length": 3,
        "beta": 0.1,
        "temperature": 1.0,
    }
    arguments = {name: options.pop(name) for name in ("peft_config",) if name in options}
    return trainer(
        model=model,
        reward_funcs=lambda completions, **_: [float(len(str(said)) % 5) for said in completions],
        args=config(**{**settings, **options}),
        train_dataset=prompts(),
        processing_class=tiny.processor(),
        **arguments,
    )


def reference_logits(trainer):
    """What these trainers take as their reference, called as they do."""
    inputs = tiny.chat_inputs([[tiny.user(question)] for question in QUESTIONS])
    model = trainer.ref_model or trainer.model
    lora = getattr(model, "peft_config", None)
    reference = use_adapter(model, "ref" if "ref" in lora else None) if lora else contextlib.nullcontext()
    with torch.no_grad(), reference:
        return model(**inputs).logits


@pytest.mark.parametrize("lora", [None, "peft_config", "trained"])
@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_the_divergence_of_rewarded_training_starts_at_zero(kind, lora, base, tmp_path):
    model, _ = patched(base)
    options = {"peft_config": FRESH_LORA} if lora == "peft_config" else {}
    if lora == "trained":
        model = get_peft_model(model, LORA)
    trainer = rewarded(kind, model, tmp_path, **options)
    keep_reference(trainer)
    before = reference_logits(trainer)
    trainer.train()
    assert torch.equal(reference_logits(trainer), before)
    assert logged(trainer, "kl")[0] == pytest.approx(0, abs=1e-6)
    assert logged(trainer, "kl")[1] > 1e-6


def test_a_rewarded_training_without_a_divergence_needs_no_reference(base, tmp_path):
    model, adapter = patched(base)
    trainer = rewarded("grpo", model, tmp_path, beta=0.0, max_steps=1)
    keep_reference(trainer)
    assert trainer.ref_model is None
    assert adapter.names == ("default",)


def test_a_reference_can_follow_the_model(base, tmp_path):
    """``sync_ref_model``: the callback mixes what is trained; what both share stays, to the bit."""
    for way in ("reference_model", "keep_reference"):
        model, _ = patched(base)
        options = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.25, "max_steps": 1}
        if way == "reference_model":
            options["ref_model"] = reference_model(model)
        trainer = dpo(model, tmp_path, **options)
        if way == "keep_reference":
            keep_reference(trainer)
        start = {name: value.clone() for name, value in model.state_dict().items()}
        trainer.train()
        followed = trainer.ref_model.state_dict()
        for name, value in model.state_dict().items():
            mixed = start[name] * 0.75 + value * 0.25 if ".emma." in name else start[name]
            assert torch.allclose(followed[name], mixed, rtol=0, atol=1e-7 if ".emma." in name else 0), name


def test_kto_takes_one(base, tmp_path):
    model, _ = patched(base)
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": number % 2 == 0, "images": row["images"]}
        for number, row in enumerate(preferences())
    ]
    arguments = trl.KTOConfig(**{**SETTINGS, "max_length": None, "output_dir": str(tmp_path), "max_steps": 2})
    trainer = trl.KTOTrainer(
        model=model,
        ref_model=reference_model(model),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tiny.processor(),
    )
    trainer.train()
    assert logged(trainer, "kl")[0] == pytest.approx(0, abs=1e-6)
    assert logged(trainer)[0] == pytest.approx(0.5, abs=1e-6)
