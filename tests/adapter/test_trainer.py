from __future__ import annotations

import gc
import json
import logging
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import LoraConfig
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset
from transformers import LlavaForConditionalGeneration, Trainer, TrainingArguments
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import check_peft_version

from emma_adapter import (
    EmmaConfig,
    InstructionError,
    get_adapter,
    load_adapter,
    patch_model,
    register_fusion,
    unpatch_model,
)
from emma_adapter.alignment.fusion import registry
from emma_adapter.modules import private
from tests.support import tiny

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FUSIONS = {
    "attention": EmmaConfig(fusion="attention", inner_dim=8, num_heads=2),
    "linear": EmmaConfig(fusion="linear", max_instruction_tokens=16),
    "modulation": EmmaConfig(fusion="modulation", inner_dim=8, num_heads=2),
}
VOCABULARY = len(tiny.tokenizer())
PROCESSOR = tiny.processor()


@pytest.fixture(autouse=True, scope="module")
def _fast():
    """Models this small only wait for OpenMP's other threads, and for Trainer, which collects garbage each time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(before)


class Questions(Dataset):
    """Pictures with a question and an answer; the labels supervise the answer only."""

    TEXTS = (
        ("how many dogs are there?", "two"),
        ("what colour is the left one?", "red"),
        ("is there a cat?", "no, three"),
        ("describe the image in detail.", "a red bird on a green tree."),
        ("what is in the picture?", "a tree"),
        ("is there a bird?", "yes"),
        ("how many?", "three"),
        ("what colour is the tree?", "green"),
    )

    def __init__(self):
        talks = [[tiny.user(question), tiny.assistant(answer)] for question, answer in self.TEXTS]
        self.batch = tiny.chat_inputs(talks, generate=False)
        self.batch["labels"] = torch.full_like(self.batch["input_ids"], -100)
        for row, talk in enumerate(talks):
            alone = tiny.chat_inputs([talk], generate=False)["input_ids"].shape[1]
            prompt = tiny.chat_inputs([talk[:1]], generate=True)["input_ids"].shape[1]
            answer = slice(prompt - alone, None)  # padded on the left
            self.batch["labels"][row, answer] = self.batch["input_ids"][row, answer]

    def __len__(self):
        return len(self.TEXTS)

    def __getitem__(self, index):
        return {name: values[index] for name, values in self.batch.items()}


def collate(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


QUESTIONS = Questions()


def base_model():
    return tiny.llava(vocab_size=VOCABULARY, image_token=4)


def patched(config=FUSIONS["attention"], processor=PROCESSOR):
    model = base_model()
    torch.manual_seed(3)  # the same initialisation of the adapter each time
    patch_model(model, config, processor=processor)
    return model


def trainer_for(model, folder, *, optimizer=None, **options):
    """``optimizer``: a class and its arguments."""
    settings = {
        "max_steps": 6,
        "save_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "optim": "adamw_torch",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    arguments = TrainingArguments(output_dir=str(folder), **{**settings, **options})
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=QUESTIONS,
        eval_dataset=QUESTIONS,
        data_collator=collate,
        optimizer_cls_and_kwargs=optimizer,
    )


def losses(trainer):
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def logits(model):
    model.eval()
    inputs = {name: value for name, value in QUESTIONS.batch.items() if name != "labels"}
    with torch.no_grad():
        return model(**inputs).logits


def copied(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_values(one, other):
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def adapter_names(model):
    return {name for name in model.state_dict() if ".emma." in name}


def projector_names(model):
    return {name for name in model.state_dict() if ".emma-projector." in name}


def changed(before, model):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


@pytest.fixture
def warnings():
    """What transformers' loggers say from warning level up; they don't propagate to pytest's."""
    said = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)


# ---------------------------------------------------------------------------------------------- what is trainable


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("projector", [False, True])
def test_train_only_freezes_everything_else(fusion, projector):
    model = patched(FUSIONS[fusion])
    adapter = get_adapter(model)
    assert adapter.train_only(projector=projector).alignment is adapter.alignment
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == adapter_names(model) | (projector_names(model) if projector else set())
    assert adapter_names(model)


def test_train_only_again_freezes_the_projector_again():
    model = patched()
    get_adapter(model).train_only(projector=True)
    get_adapter(model).train_only()
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == adapter_names(model)


def ids(parameters):
    return [id(parameter) for parameter in parameters]


def test_parameter_groups_of_the_adapter_alone():
    model = patched()
    adapter = get_adapter(model).train_only()
    [group] = adapter.parameter_groups(1e-3, projector_lr=1e-5, weight_decay=0.1)
    assert ids(group["params"]) == ids(adapter.parameters())
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.1)


@pytest.mark.parametrize(("given", "expected"), [(1e-5, 1e-5), (None, 1e-3), (0.0, 0.0)])
def test_parameter_groups_with_the_projector(given, expected):
    model = patched()
    adapter = get_adapter(model).train_only(projector=True)
    own, projector = adapter.parameter_groups(1e-3, projector_lr=given)
    assert ids(own["params"]) == ids(adapter.parameters())
    named = dict(model.named_parameters())
    assert sorted(ids(projector["params"])) == sorted(id(named[name]) for name in projector_names(model))
    assert (own["lr"], projector["lr"]) == (1e-3, expected)
    assert own["weight_decay"] == projector["weight_decay"] == 0.0
    torch.optim.AdamW([own, projector])


# ---------------------------------------------------------------------------------------------- a loop of one's own


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("projector", [False, True])
def test_plain_loop_trains_the_adapter_only(fusion, projector):
    model = patched(FUSIONS[fusion]).train()
    adapter = get_adapter(model).train_only(projector=projector)
    before = copied(model)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(3e-2, projector_lr=1e-3))
    history = []
    for _ in range(12):
        loss = model(**QUESTIONS.batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert changed(before, model) == adapter_names(model) | (projector_names(model) if projector else set())
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
    assert history[-1] < history[0] - 1e-3


def test_first_step_has_the_loss_of_the_base():
    model, base = patched().train(), base_model().train()
    get_adapter(model).train_only()
    assert model(**QUESTIONS.batch).loss.item() == base(**QUESTIONS.batch).loss.item()


@pytest.mark.parametrize("projector", [False, True])
def test_trained_model_goes_back_to_the_base(projector):
    model, base = patched().train(), base_model()
    adapter = get_adapter(model).train_only(projector=projector)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(1e-2))
    for _ in range(2):
        model(**QUESTIONS.batch).loss.backward()
        optimizer.step()
    assert not torch.equal(logits(model), logits(base))
    with adapter.disabled():
        assert torch.equal(logits(model), logits(base))
    unpatch_model(model)
    assert same_values(model.state_dict(), base.state_dict())


# ---------------------------------------------------------------------------------------------- Trainer, adapter only


def checkpoint_folder(folder, step):
    return Path(folder) / f"checkpoint-{step}"


@pytest.fixture(scope="module", params=[*FUSIONS, "projector"])
def run(request, tmp_path_factory):
    """A short run: the model, what of it was trained, and the folder with ``checkpoint-2``."""
    projector = request.param == "projector"
    model = patched(FUSIONS["attention" if projector else request.param])
    get_adapter(model).train_only(projector=projector)
    before = copied(model)
    folder = tmp_path_factory.mktemp("run")
    trainer = trainer_for(model, folder, max_steps=2, save_steps=2)
    trainer.train()
    trainer.save_model(str(folder / "final"))
    expected = adapter_names(model) | (projector_names(model) if projector else set())
    assert changed(before, model) == expected
    return model, expected, folder


@pytest.mark.parametrize("name", ["checkpoint-2", "final"])
def test_checkpoint_holds_the_adapter_only(name, run):
    model, trained, root = run
    folder = root / name
    size = sum(model.state_dict()[name].nbytes for name in trained)
    files = list(folder.rglob("*.safetensors"))
    assert {file.name for file in files} == {WEIGHTS, "model.safetensors"}
    for file in files:
        tensors = safetensors.torch.load_file(file)
        assert sum(tensor.nbytes for tensor in tensors.values()) == size
        assert file.stat().st_size < size + 8_000
    assert set(safetensors.torch.load_file(folder / "model.safetensors")) == trained
    assert all(key.startswith(("alignment.", "projector.")) for key in safetensors.torch.load_file(folder / WEIGHTS))
    assert not list(folder.rglob("pytorch_model*"))
    assert json.loads((folder / CONFIG).read_text())["config"] == get_adapter(model).config.to_dict()


def test_optimizer_state_is_of_the_adapter_only(run):
    """AdamW's two moments of each trained parameter."""
    model, trained, root = run
    state = torch.load(root / "checkpoint-2" / "optimizer.pt")["state"]
    size = sum(model.state_dict()[name].nbytes for name in trained)
    assert sum(entry[key].nbytes for entry in state.values() for key in ("exp_avg", "exp_avg_sq")) == 2 * size


@pytest.mark.parametrize("name", ["checkpoint-2", "final"])
def test_checkpoint_loads_into_a_fresh_model(name, run):
    model, _, root = run
    other, base = base_model(), base_model()
    adapter = load_adapter(other, root / name, processor=PROCESSOR)
    assert torch.equal(logits(other), logits(model))
    assert not torch.equal(logits(other), logits(base))
    with adapter.disabled():
        assert torch.equal(logits(other), logits(base))


def about_keys(said):
    return [line for line in said if "missing keys" in line or "unexpected keys" in line]


@pytest.mark.parametrize(
    ("fusion", "projector"), [("attention", False), ("linear", False), ("modulation", False), ("attention", True)]
)
def test_resume_is_exact(fusion, projector, tmp_path, warnings):
    whole = patched(FUSIONS[fusion])
    get_adapter(whole).train_only(projector=projector)
    uninterrupted = trainer_for(whole, tmp_path)
    uninterrupted.train()

    resumed = patched(FUSIONS[fusion])
    get_adapter(resumed).train_only(projector=projector)
    tiny.train_randomly(get_adapter(resumed).alignment)  # all that counts must come from the checkpoint
    continued = trainer_for(resumed, tmp_path / "again")
    continued.train(resume_from_checkpoint=str(checkpoint_folder(tmp_path, 3)))

    assert losses(continued) == losses(uninterrupted)
    assert sorted(losses(continued)) == [1, 2, 3, 4, 5, 6]
    assert same_values(resumed.state_dict(), whole.state_dict())
    assert not about_keys(warnings)


def test_resumed_steps_are_computed_again(tmp_path):
    """Losses of the first steps come from the checkpoint's log; the later ones must not."""
    whole = patched()
    get_adapter(whole).train_only()
    uninterrupted = trainer_for(whole, tmp_path)
    uninterrupted.train()
    resumed = patched()
    get_adapter(resumed).train_only()
    continued = trainer_for(resumed, tmp_path / "again", learning_rate=1e-1)
    shutil.rmtree(checkpoint_folder(tmp_path, 6))
    (checkpoint_folder(tmp_path, 3) / "optimizer.pt").unlink()
    continued.train(resume_from_checkpoint=str(checkpoint_folder(tmp_path, 3)))
    before, after = losses(uninterrupted), losses(continued)
    assert before[4] == after[4], "the weights are those of step 3"
    assert before[6] != after[6], "and are trained on"


def test_resume_says_when_keys_are_missing(tmp_path, warnings):
    """So that their absence elsewhere means something."""
    model = patched()
    get_adapter(model).train_only()
    trainer_for(model, tmp_path).train()
    file = checkpoint_folder(tmp_path, 3) / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors.pop(next(iter(tensors)))
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    trainer_for(model, tmp_path).train(resume_from_checkpoint=str(checkpoint_folder(tmp_path, 3)))
    assert about_keys(warnings)


def test_resume_after_loading_an_adapter_with_projector(tmp_path, warnings):
    """A second run starts from a saved adapter that has a projector of its own."""
    first = patched()
    get_adapter(first).train_only(projector=True)
    trainer_for(first, tmp_path / "first", max_steps=2).train()
    get_adapter(first).save_pretrained(tmp_path / "adapter")

    def second():
        model = patched()
        get_adapter(model).train_only()
        load_adapter(model, tmp_path / "adapter")
        return model

    whole, resumed = second(), second()
    uninterrupted = trainer_for(whole, tmp_path)
    uninterrupted.train()
    continued = trainer_for(resumed, tmp_path / "again")
    continued.train(resume_from_checkpoint=str(checkpoint_folder(tmp_path, 3)))
    assert losses(continued) == losses(uninterrupted)
    assert same_values(resumed.state_dict(), whole.state_dict())
    assert not about_keys(warnings)


def test_load_best_model_at_end(tmp_path, warnings):
    """The best is made to be the first checkpoint: the one with the highest loss."""
    model = patched()
    adapter = get_adapter(model).train_only()
    trainer = trainer_for(
        model,
        tmp_path,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    trainer.train()
    best, last = Path(trainer.state.best_model_checkpoint), checkpoint_folder(tmp_path, 6)
    assert best != last

    def loaded(folder):
        other = base_model()
        return load_adapter(other, folder, processor=PROCESSOR), logits(other)

    assert same_values(adapter.alignment.state_dict(), loaded(best)[0].alignment.state_dict())
    assert torch.equal(logits(model), loaded(best)[1])
    assert not torch.equal(logits(model), loaded(last)[1])
    assert not about_keys(warnings)


@pytest.mark.parametrize("given_as", ["class", "optimizer"])
def test_resume_with_a_rate_for_the_projector(given_as, tmp_path, warnings):
    def run(folder, checkpoint=None):
        model = patched()
        adapter = get_adapter(model).train_only(projector=True)
        groups = adapter.parameter_groups(1e-2, projector_lr=1e-4)
        trainer = trainer_for(model, folder, optimizer=(torch.optim.AdamW, {"params": groups}))
        if given_as == "optimizer":
            trainer = trainer_for(model, folder)
            trainer.optimizer = torch.optim.AdamW(groups)
        trainer.train(resume_from_checkpoint=checkpoint)
        return model, trainer

    whole, uninterrupted = run(tmp_path)
    resumed, continued = run(tmp_path / "again", str(checkpoint_folder(tmp_path, 3)))
    assert losses(continued) == losses(uninterrupted)
    assert same_values(resumed.state_dict(), whole.state_dict())
    assert [group["initial_lr"] for group in continued.optimizer.param_groups] == [1e-2, 1e-4]
    own, projector = continued.optimizer.param_groups
    assert own["lr"] == pytest.approx(100 * projector["lr"])
    assert not about_keys(warnings)


# ---------------------------------------------------------------------------------------------- checkpointed layers


class CheckpointedProjector(torch.nn.Module):
    def __init__(self, projector, reentrant):
        super().__init__()
        self.projector, self.reentrant = projector, reentrant

    def forward(self, visual_tokens):
        if self.reentrant:
            # PyTorch's condition for recomputing a module in this mode: an input that wants a gradient.
            visual_tokens = visual_tokens.detach().requires_grad_()
        return checkpoint(self.projector, visual_tokens, use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("layers", ["model", "projector", "both"])
@pytest.mark.parametrize("projector", [False, True])
def test_checkpointed_layers_give_the_gradients_of_the_plain_run(reentrant, layers, projector):
    """With everything else frozen: what the adapter puts out is what makes reentrant recomputation learn."""

    def gradients(checkpointed):
        model = patched().train()
        adapter = get_adapter(model)
        tiny.train_randomly(adapter.alignment)
        adapter.train_only(projector=projector)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if checkpointed and layers != "projector":
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if checkpointed and layers != "model":
            model.model.multi_modal_projector = CheckpointedProjector(model.model.multi_modal_projector, reentrant)
        model(**QUESTIONS.batch).loss.backward()
        return [parameter.grad for parameter in trained]

    plain = gradients(False)
    assert all(gradient.any() for gradient in plain[-2:])
    for one, other in zip(plain, gradients(True), strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_trainer_with_gradient_checkpointing(reentrant, tmp_path):
    histories = []
    for options in (
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}},
    ):
        model = patched()
        get_adapter(model).train_only()
        trainer = trainer_for(model, tmp_path, save_strategy="no", **options)
        trainer.train()
        histories.append((trainer.state.log_history[:-1], model.state_dict()))
    assert histories[0][0] == histories[1][0]
    assert same_values(histories[0][1], histories[1][1])


# ---------------------------------------------------------------------------------------------- half precision


def test_bf16_leaves_autocast_on_the_model_until_it_is_unwrapped(tmp_path):
    """The outputs then are those of the reloaded model under autocast; unwrapped, those of the reloaded model."""
    model = patched()
    get_adapter(model).train_only()
    trainer = trainer_for(model, tmp_path, max_steps=2, save_steps=2, bf16=True)
    trainer.train()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    other = base_model()
    load_adapter(other, checkpoint_folder(tmp_path, 2), processor=PROCESSOR)
    assert not torch.equal(logits(model), logits(other))
    with torch.autocast("cpu", torch.bfloat16):
        reloaded = logits(other)
    assert torch.equal(logits(model), reloaded.float())
    assert trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False) is model
    assert torch.equal(logits(model), logits(other))


def test_resume_in_bf16_is_exact(tmp_path):
    def run(folder, checkpoint=None):
        model = patched()
        get_adapter(model).train_only()
        trainer = trainer_for(model, folder, bf16=True)
        trainer.train(resume_from_checkpoint=checkpoint)
        return losses(trainer), model.state_dict()

    whole = run(tmp_path)
    resumed = run(tmp_path / "again", str(checkpoint_folder(tmp_path, 3)))
    assert resumed[0] == whole[0]
    assert same_values(resumed[1], whole[1])


@pytest.mark.parametrize("when", ["loaded", "cast after patching"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_model_in_bfloat16(when, bf16, tmp_path):
    model = base_model()
    model = model.to(torch.bfloat16) if when == "loaded" else model
    adapter = patch_model(model, FUSIONS["attention"], processor=PROCESSOR)
    model.to(torch.bfloat16) if when != "loaded" else None
    adapter.train_only()
    dtype = torch.float32 if when == "loaded" else torch.bfloat16
    assert {parameter.dtype for parameter in adapter.parameters()} == {dtype}
    before = copied(model)
    trainer = trainer_for(model, tmp_path, max_steps=2, save_steps=2, bf16=bf16)
    trainer.train()
    assert changed(before, model) == adapter_names(model)
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    other = base_model().to(torch.bfloat16)
    load_adapter(other, checkpoint_folder(tmp_path, 2), processor=PROCESSOR)
    assert torch.equal(logits(other), logits(model))


# ---------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.nightly
def test_trainer_with_torch_compile(tmp_path):
    """Each batch meets its own instructions, and the losses are those of the uncompiled run."""
    histories = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        model = patched()
        get_adapter(model).train_only()
        tiny.train_randomly(get_adapter(model).alignment)
        trainer = trainer_for(model, tmp_path, max_steps=3, save_strategy="no", **options)
        trainer.train()
        histories.append(list(losses(trainer).values()))
    torch.testing.assert_close(*map(torch.tensor, histories))
    model.eval()
    compiled = torch.compile(model, backend="eager")
    outputs = []
    for question in ("how many dogs are there?", "what colour is it?"):
        inputs = tiny.chat_inputs([[tiny.user("why?")]])
        with torch.no_grad():
            outputs.append(compiled(**inputs, instruction=[question]).logits)
            torch.testing.assert_close(outputs[-1], model(**inputs, instruction=[question]).logits)
    assert not torch.allclose(*outputs)


# ---------------------------------------------------------------------------------------------- Trainer, everything


def test_checkpoint_without_train_only_holds_everything(tmp_path):
    model = patched()
    before = copied(model)
    trainer_for(model, tmp_path, max_steps=2, save_steps=2).train()
    assert {name.split(".")[1] for name in changed(before, model)} > {"language_model", "multi_modal_projector"}
    folder = checkpoint_folder(tmp_path, 2)
    saved = safetensors.torch.load_file(folder / "model.safetensors")
    assert len(saved) == len(model.state_dict())
    assert sum(value.numel() for value in saved.values()) == sum(value.numel() for value in model.state_dict().values())
    assert len([name for name in saved if "emma." in name]) == len(adapter_names(model))
    other = base_model()
    adapter = load_adapter(other, folder, processor=PROCESSOR)
    assert same_values(adapter.alignment.state_dict(), get_adapter(model).alignment.state_dict())


def test_resume_without_train_only_is_exact(tmp_path, warnings):
    whole = patched()
    uninterrupted = trainer_for(whole, tmp_path)
    uninterrupted.train()
    resumed = patched()
    continued = trainer_for(resumed, tmp_path / "again")
    continued.train(resume_from_checkpoint=str(checkpoint_folder(tmp_path, 3)))
    assert losses(continued) == losses(uninterrupted)
    assert same_values(resumed.state_dict(), whole.state_dict())
    assert not about_keys(warnings)


def test_checkpoint_of_everything_reloads_as_a_model(tmp_path):
    """Its keys include the adapter's, which a plain reload reports; the base tensors are all found."""
    model = patched()
    trainer_for(model, tmp_path, max_steps=2, save_steps=2).train()
    folder = checkpoint_folder(tmp_path, 2)
    other, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert all("emma." in name for name in info["unexpected_keys"])
    load_adapter(other, folder, processor=PROCESSOR)
    assert torch.equal(logits(other), logits(model))


# ---------------------------------------------------------------------------------------------- the adapter and more


def everything(model):
    model.requires_grad_(True)


def lm_head(model):
    model.lm_head.requires_grad_(True)


def projector_by_hand(model):
    model.model.multi_modal_projector.requires_grad_(True)


def unfreeze(model):
    get_adapter(model).unfreeze()


MORE = [everything, lm_head, projector_by_hand, unfreeze]


def with_more(more, processor=PROCESSOR):
    model = patched(processor=processor)
    get_adapter(model).train_only()
    more(model)
    return model


def assert_resumes_exactly(resumed, uninterrupted, folder, warnings) -> None:
    """From the third step of a run in ``folder``."""
    continued = trainer_for(resumed, folder / "again")
    continued.train(resume_from_checkpoint=str(checkpoint_folder(folder, 3)))
    assert losses(continued) == losses(uninterrupted)
    assert same_values(resumed.state_dict(), uninterrupted.model.state_dict())
    assert not about_keys(warnings)


@pytest.mark.parametrize("more", MORE)
def test_what_is_trained_beside_the_adapter_is_in_the_checkpoint(more, tmp_path, warnings):
    """Resuming is exact, and the checkpoint is a model that transformers loads."""
    whole = with_more(more)
    before = copied(whole)
    uninterrupted = trainer_for(whole, tmp_path)
    uninterrupted.train()
    assert changed(before, whole) > adapter_names(whole)

    assert_resumes_exactly(with_more(more), uninterrupted, tmp_path, warnings)

    folder = checkpoint_folder(tmp_path, 6)
    other, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    load_adapter(other, folder, processor=PROCESSOR)
    assert torch.equal(logits(other), logits(whole))


def test_all_that_changed_is_saved_whatever_the_order(tmp_path):
    """Trainable before ``train_only`` and again after it, while a Trainer is there already."""
    model = patched()
    model.requires_grad_(False)
    lm_head(model)
    get_adapter(model).train_only()
    trainer = trainer_for(model, tmp_path, max_steps=2, save_steps=2)
    lm_head(model)
    before = copied(model)
    trainer.train()
    assert "lm_head.weight" in changed(before, model)
    saved = safetensors.torch.load_file(checkpoint_folder(tmp_path, 2) / "model.safetensors")
    assert all(torch.equal(saved[name], model.state_dict()[name]) for name in changed(before, model))


def test_what_a_run_has_trained_and_then_frozen_is_saved(tmp_path):
    model = with_more(lm_head)
    trainer = trainer_for(model, tmp_path, max_steps=2, save_strategy="no")
    trainer.train()
    get_adapter(model).train_only()
    trainer.save_model(str(tmp_path / "final"))
    other = LlavaForConditionalGeneration.from_pretrained(tmp_path / "final")
    load_adapter(other, tmp_path / "final", processor=PROCESSOR)
    assert torch.equal(logits(other), logits(model))


def test_frozen_by_hand_the_checkpoint_holds_the_adapter_only(tmp_path, warnings):
    def frozen():
        model = patched()
        model.requires_grad_(False)
        get_adapter(model).alignment.requires_grad_(True)
        return model

    whole, resumed = frozen(), frozen()
    trainer_for(whole, tmp_path).train()
    saved = safetensors.torch.load_file(checkpoint_folder(tmp_path, 3) / "model.safetensors")
    assert set(saved) == adapter_names(whole)
    trainer_for(resumed, tmp_path / "again").train(resume_from_checkpoint=str(checkpoint_folder(tmp_path, 3)))
    assert same_values(resumed.state_dict(), whole.state_dict())
    assert not about_keys(warnings)


def test_resuming_more_than_a_checkpoint_holds_is_said(tmp_path, warnings):
    """A second stage that goes on from a checkpoint of the first: the head isn't in it."""
    first = patched()
    get_adapter(first).train_only()
    trainer_for(first, tmp_path, max_steps=3).train()
    shutil.rmtree(tmp_path / "second", ignore_errors=True)
    (checkpoint_folder(tmp_path, 3) / "optimizer.pt").unlink()
    second = with_more(lm_head)
    trainer_for(second, tmp_path / "second").train(resume_from_checkpoint=str(checkpoint_folder(tmp_path, 3)))
    assert about_keys(warnings)


def test_the_best_model_has_all_that_was_trained(tmp_path, warnings):
    """The best is made to be the first checkpoint."""
    model = with_more(lm_head)
    trainer = trainer_for(
        model,
        tmp_path,
        max_steps=4,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        save_only_model=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint) == checkpoint_folder(tmp_path, 2)
    saved = safetensors.torch.load_file(checkpoint_folder(tmp_path, 2) / "model.safetensors")
    assert same_values(saved, {name: model.state_dict()[name] for name in saved})
    assert "lm_head.weight" in saved
    assert not about_keys(warnings)


def test_unfreeze_makes_trainable_what_was(tmp_path):
    model = patched()
    model.model.vision_tower.requires_grad_(False)
    before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapter = get_adapter(model)
    adapter.train_only(projector=True).train_only()
    assert adapter.unfreeze() is not None
    # Its own projector too, which stays the adapter's.
    before |= projector_names(model)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == before
    adapter.unfreeze()
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == before
    lm_head(model)
    adapter.train_only()
    unpatch_model(model)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        name for name in before if ".emma" not in name
    }


def lora(model):
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))


def test_lora_by_add_adapter(tmp_path, warnings):
    """transformers' own way to a LoRA, which plain Trainer can't resume: the checkpoint holds both."""
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError as error:
        pytest.skip(f"transformers' add_adapter: {error}")

    def make():
        torch.manual_seed(5)
        return with_more(lora)

    whole = make()
    before = copied(whole)
    uninterrupted = trainer_for(whole, tmp_path)
    uninterrupted.train()
    assert {name for name in changed(before, whole) if "lora_" in name}

    torch.manual_seed(6)
    assert_resumes_exactly(with_more(lora), uninterrupted, tmp_path, warnings)

    folder = checkpoint_folder(tmp_path, 6)
    other = base_model()
    load_adapter(other, folder, processor=PROCESSOR)
    other.load_adapter(str(folder))
    torch.testing.assert_close(logits(other), logits(whole), atol=1e-5, rtol=0)


def test_a_save_of_everything_replaces_one_of_the_adapter(tmp_path):
    """Else load_adapter would find the earlier one, and transformers take the model for an adapter of PEFT."""
    model = patched()
    adapter = get_adapter(model).train_only()
    trainer = trainer_for(model, tmp_path, save_strategy="no")
    for save in (
        lambda: trainer.save_model(str(tmp_path / "final")),
        lambda: model.save_pretrained(tmp_path / "final"),
    ):
        tiny.train_randomly(adapter.alignment, seed=1)
        adapter.train_only().save_pretrained(tmp_path / "final")
        tiny.train_randomly(adapter.alignment, seed=2)
        adapter.unfreeze()
        save()
        other = LlavaForConditionalGeneration.from_pretrained(tmp_path / "final")
        load_adapter(other, tmp_path / "final", processor=PROCESSOR)
        assert torch.equal(logits(other), logits(model))
        shutil.rmtree(tmp_path / "final")


# ---------------------------------------------------------------------------------------------- model.save_pretrained


def reload(folder):
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    return model.eval()


@pytest.mark.parametrize("train_only", [None, False, True], ids=["untrained", "adapter", "projector"])
@pytest.mark.parametrize("keyword", [False, True])
def test_save_pretrained_writes_the_base(train_only, keyword, tmp_path):
    """``train_only`` is its argument ``projector``; None for a model that was never told."""
    model, base = patched(), base_model()
    tiny.train_randomly(get_adapter(model).alignment)
    if train_only is not None:
        get_adapter(model).train_only(projector=train_only)
    if train_only:
        own = get_adapter(model).projector
        for layer in (own.linear_1, own.linear_2):
            tiny.train_randomly(layer, scale=0.1)
    if keyword:
        model.save_pretrained(save_directory=str(tmp_path))
    else:
        model.save_pretrained(tmp_path)

    other = reload(tmp_path)
    assert same_values(other.state_dict(), base.state_dict())
    assert torch.equal(logits(other), logits(base))

    adapter = load_adapter(other, tmp_path, processor=PROCESSOR)
    assert adapter.config == get_adapter(model).config
    assert torch.equal(logits(other), logits(model))
    with adapter.disabled():
        assert torch.equal(logits(other), logits(base))
    unpatch_model(other)
    assert same_values(other.state_dict(), base.state_dict())


def test_save_pretrained_without_a_folder_says_what_transformers_says():
    model = tiny.llava()
    patch_model(model, processor=tiny.processor())
    with pytest.raises(TypeError, match="save_directory"):
        model.save_pretrained()


def test_save_pretrained_changes_nothing(tmp_path):
    model = patched()
    get_adapter(model).train_only(projector=True)
    before, output = copied(model), logits(model)
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    model.save_pretrained(tmp_path)
    assert same_values(model.state_dict(), before)
    assert torch.equal(logits(model), output)
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable


def test_trainer_still_saves_the_adapter_only_after_save_pretrained(tmp_path):
    model = patched()
    get_adapter(model).train_only()
    model.save_pretrained(tmp_path / "base")
    trainer_for(model, tmp_path, max_steps=2, save_steps=2).train()
    assert set(safetensors.torch.load_file(checkpoint_folder(tmp_path, 2) / "model.safetensors")) == adapter_names(
        model
    )


def test_save_pretrained_after_unpatching_is_the_stock_one(tmp_path):
    model, base = patched(), base_model()
    get_adapter(model).train_only(projector=True)
    unpatch_model(model)
    model.save_pretrained(tmp_path, state_dict=None)
    assert same_values(reload(tmp_path).state_dict(), base.state_dict())
    assert not (tmp_path / "emma_adapter").exists()
    assert not (tmp_path / CONFIG).exists()


@pytest.mark.parametrize("trains", [False, True])
def test_a_gathered_state_dict_says_where_weights_are_and_not_what_is_written(trains, tmp_path):
    """As accelerate's documentation has it: ``state_dict=accelerator.get_state_dict(model)``."""
    model, base = patched(), base_model()
    adapter = get_adapter(model)
    if trains:
        adapter.train_only(projector=True)
    tiny.train_randomly(adapter.alignment)
    gathered = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=gathered)
    other = reload(tmp_path)
    assert same_values(other.state_dict(), base.state_dict())
    load_adapter(other, tmp_path, processor=PROCESSOR)
    assert torch.equal(logits(other), logits(model))


def test_save_pretrained_in_shards(tmp_path):
    model, base = patched(), base_model()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(reload(tmp_path)), logits(base))


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    model = patched()
    model.save_pretrained(tmp_path / "base", is_main_process=False)
    get_adapter(model).train_only()
    model.save_pretrained(tmp_path / "gathered", is_main_process=False, state_dict=model.state_dict())
    monkeypatch.setattr(private, "running_trainer", object)
    model.save_pretrained(tmp_path / "trainer", is_main_process=False, state_dict=None)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_buffers_of_a_fusion_of_ones_own(tmp_path, monkeypatch, warnings):
    """They belong to the adapter as its parameters do: not in the base, but in Trainer's checkpoints."""
    monkeypatch.setattr(registry, "FUSIONS", dict(registry.FUSIONS))
    register_fusion("test-buffered")(tiny.BufferedFusion)
    model, base = patched(EmmaConfig(fusion="test-buffered")), base_model()
    get_adapter(model).alignment.fusion.scale.uniform_(0.5, 2)
    model.save_pretrained(tmp_path / "base")
    assert torch.equal(logits(reload(tmp_path / "base")), logits(base))

    get_adapter(model).train_only()
    trainer_for(model, tmp_path, max_steps=2, save_steps=2).train()
    other = patched(EmmaConfig(fusion="test-buffered"))
    get_adapter(other).train_only()
    trainer_for(other, tmp_path, max_steps=2).train(resume_from_checkpoint=str(checkpoint_folder(tmp_path, 2)))
    assert same_values(other.state_dict(), model.state_dict())
    assert not about_keys(warnings)


# ---------------------------------------------------------------------------------------------- labels taken away


@pytest.mark.parametrize("taken_by", ["label smoothing", "custom loss"])
@pytest.mark.parametrize("processor", [None, PROCESSOR], ids=["without", "with"])
def test_trainer_that_takes_the_labels_away(taken_by, processor, tmp_path):
    """Trainer pops them before forward; then only a chat template tells the question from the answer."""
    model = patched(processor=processor)
    get_adapter(model).train_only()
    options = {"label_smoothing_factor": 0.1} if taken_by == "label smoothing" else {}
    trainer = trainer_for(model, tmp_path, max_steps=2, save_strategy="no", **options)
    if not options:
        trainer.compute_loss_func = lambda outputs, labels, **_: torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        )
    before = copied(model)
    if processor is None:
        with pytest.raises(InstructionError, match=r"(?s)labels.*label smoothing"):
            trainer.train()
        assert changed(before, model) == set()
    else:
        trainer.train()
        assert changed(before, model) == adapter_names(model)


def test_answers_do_not_reach_the_adapter_without_labels():
    """Two batches that differ in the answers only have the same instruction."""
    model = patched().train()
    seen = []
    get_adapter(model).alignment.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1:]))
    for answer in ("two", "red"):
        inputs = tiny.chat_inputs([[tiny.user("how many dogs?"), tiny.assistant(answer)]], generate=False)
        model(**inputs)
    for one, other in zip(*seen, strict=True):
        assert torch.equal(one, other)
