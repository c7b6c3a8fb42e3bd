"""LoRA beside EMMA: each is trained, switched off, saved, loaded and merged without the other noticing."""

from __future__ import annotations

import copy
import json
import warnings as python_warnings

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from torch import nn
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration, Trainer, TrainingArguments

from emma_adapter import CheckpointError, EmmaConfig, PatchError, get_adapter, load_adapter, patch_model, unpatch_model
from tests.support import tiny

INPUTS = tiny.chat_inputs([[tiny.user("is there a cat?")], [tiny.user("what colour is the bird?", images=2)]])
TARGETS = {
    "language model": {"target_modules": ["q_proj", "v_proj"]},
    "projector": {"target_modules": ["linear_1", "linear_2"]},
    "everything": {"target_modules": "all-linear"},
    "a copy of the projector": {"target_modules": ["q_proj"], "modules_to_save": ["multi_modal_projector"]},
}


TARGETS_OF_A_COPY = LoraConfig(r=2, init_lora_weights=False, **TARGETS["a copy of the projector"])


@pytest.fixture(params=TARGETS)
def lora(request):
    return LoraConfig(r=2, init_lora_weights=False, **TARGETS[request.param])


@pytest.fixture(params=["patched first", "wrapped first"])
def order(request):
    return request.param


@torch.no_grad()
def logits(model):
    return model(**INPUTS).logits


def generated(model):
    return model.generate(**INPUTS, max_new_tokens=5, do_sample=False)


def make(lora, order, *, trained=True):
    """A ``PeftModel`` with a trained EMMA adapter and a LoRA that does something, in either order."""
    torch.manual_seed(0)
    model = tiny.llava()
    if order == "patched first":
        patch_model(model, processor=tiny.processor())
        wrapped = get_peft_model(model, lora)
    else:
        wrapped = get_peft_model(model, lora)
        patch_model(wrapped, processor=tiny.processor())
    adapter = get_adapter(wrapped)
    if trained:
        tiny.train_randomly(adapter.alignment)
    return wrapped.eval(), adapter


def assert_same(found, expected):
    """PyTorch may round a product otherwise where the weights need no gradient, as those of a loaded LoRA."""
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def training_inputs():
    talk = [tiny.user("is there a cat?"), tiny.assistant("no")]
    inputs = tiny.chat_inputs([talk], generate=False)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]
    return {**inputs, "labels": labels}


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# ------------------------------------------------------------------------------------------ training


def test_both_are_trained(lora, order):
    wrapped, adapter = make(lora, order)
    names = trainable(wrapped)
    assert {id(parameter) for parameter in adapter.parameters()} <= {id(wrapped.get_parameter(name)) for name in names}
    assert all(".emma." in name or "lora_" in name or ".modules_to_save." in name for name in names)
    before = copy.deepcopy({name: wrapped.get_parameter(name).detach() for name in names})
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=1.0)
    wrapped.train()(**training_inputs()).loss.backward()
    optimizer.step()
    unchanged = [name for name in names if torch.equal(wrapped.get_parameter(name), before[name])]
    # The key projection of CLIP's last layer, for one, is not read by LLaVA.
    assert not [name for name in unchanged if ".emma." in name]
    assert len(unchanged) < len(names) / 2
    assert adapter.parameter_groups(lr=1.0)[0]["params"] == list(adapter.parameters())


def test_an_adapter_that_was_frozen_stays_so():
    model = tiny.llava()
    adapter = patch_model(model)
    adapter.alignment.requires_grad_(False)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert not [name for name in trainable(wrapped) if "emma" in name]


def test_a_second_lora_does_not_freeze_the_adapter(order):
    wrapped, adapter = make(LoraConfig(target_modules=["q_proj"]), order)
    with adapter.disabled():
        off = logits(wrapped)
    wrapped.add_adapter("second", LoraConfig(target_modules=["v_proj"], modules_to_save=["multi_modal_projector"]))
    assert all(parameter.requires_grad for parameter in adapter.parameters())
    wrapped.set_adapter("second")
    assert all(parameter.requires_grad for parameter in adapter.parameters())
    on = logits(wrapped)
    assert not torch.allclose(on, off)
    wrapped.delete_adapter("second")
    wrapped.set_adapter("default")
    assert torch.equal(logits(wrapped), on)


def test_lora_by_transformers_own_method():
    wanted = getattr(transformers.integrations.peft, "MIN_PEFT_VERSION", "0")
    if Version(peft.__version__) < Version(wanted):
        pytest.skip(f"add_adapter of transformers {transformers.__version__} wants peft {wanted}")
    model = tiny.llava()
    adapter = patch_model(model, processor=tiny.processor())
    tiny.train_randomly(adapter.alignment)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert all(parameter.requires_grad for parameter in adapter.parameters())
    assert {name.split(".")[-2] for name in trainable(model) if "emma" not in name} == {"default"}


@pytest.mark.parametrize(
    "freeze",
    [
        lambda model: model.requires_grad_(False) and model.lm_head.requires_grad_(True),
        lambda model: get_peft_model(prepare_model_for_kbit_training(model), LoraConfig(target_modules=["q_proj"])),
    ],
)
def test_an_adapter_that_is_left_out_is_missed(freeze):
    model = tiny.llava()
    adapter = patch_model(model, processor=tiny.processor())
    freeze(model)
    with pytest.warns(UserWarning, match="frozen and has learned nothing"):
        model.train()(**training_inputs())
    with python_warnings.catch_warnings():
        python_warnings.simplefilter("error")
        model(**training_inputs())
    # Trained, and then frozen: on purpose.
    model = tiny.llava()
    adapter = patch_model(model, processor=tiny.processor())
    tiny.train_randomly(adapter.alignment)
    freeze(model)
    with python_warnings.catch_warnings():
        python_warnings.simplefilter("error")
        model.train()(**training_inputs())


# ----------------------------------------------------------------------------------------- switching


def test_each_is_switched_off_alone(lora, order):
    wrapped, adapter = make(lora, order)
    base = logits(tiny.llava())
    both = logits(wrapped)
    with wrapped.disable_adapter():
        emma = logits(wrapped)
        with adapter.disabled():
            assert torch.equal(logits(wrapped), base)
    with adapter.disabled():
        only_lora = logits(wrapped)
    assert torch.equal(logits(wrapped), both)
    outputs = [base, both, emma, only_lora]
    for i, one in enumerate(outputs):
        for other in outputs[i + 1 :]:
            assert (one - other).abs().max() > 1e-3
    # Without the LoRA, the adapter is what it is on the base.
    plain = tiny.llava()
    twin = patch_model(plain, processor=tiny.processor())
    twin.alignment.load_state_dict(adapter.alignment.state_dict())
    assert torch.equal(logits(plain), emma)


def test_generate_through_the_peft_model(lora, order):
    wrapped, adapter = make(lora, order)
    on = generated(wrapped)
    assert torch.equal(on, wrapped.get_base_model().generate(**INPUTS, max_new_tokens=5, do_sample=False))
    explicit = wrapped.generate(**INPUTS, max_new_tokens=5, do_sample=False, instruction="how many dogs?")
    assert explicit.shape == on.shape
    with adapter.disabled(), wrapped.disable_adapter():
        assert torch.equal(generated(wrapped), generated(tiny.llava()))


def test_unpatching_leaves_the_lora(lora, order):
    wrapped, adapter = make(lora, order)
    with adapter.disabled():
        expected = logits(wrapped)
    unpatch_model(wrapped)
    assert torch.equal(logits(wrapped), expected)
    assert not [name for name in wrapped.state_dict() if "emma" in name]
    again = patch_model(wrapped, processor=tiny.processor())
    assert torch.equal(logits(wrapped), expected)
    tiny.train_randomly(again.alignment)
    assert not torch.allclose(logits(wrapped), expected)


# ------------------------------------------------------------------------------------ saving, loading


def test_saved_once_and_loaded_back(lora, order, tmp_path):
    wrapped, adapter = make(lora, order)
    expected = logits(wrapped)
    wrapped.save_pretrained(tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert written
    assert not [name for name in written if "emma" in name]
    own = load_file(tmp_path / "emma_adapter" / "default" / "adapter_model.safetensors")
    assert {name.removeprefix("alignment.") for name in own} == {name for name, _ in adapter.named_parameters()}

    # One after the other,
    model = PeftModel.from_pretrained(tiny.llava(), tmp_path)
    load_adapter(model, tmp_path, processor=tiny.processor())
    assert_same(logits(model.eval()), expected)
    # the other way round,
    model = tiny.llava()
    load_adapter(model, tmp_path, processor=tiny.processor())
    model = PeftModel.from_pretrained(model, tmp_path)
    assert_same(logits(model.eval()), expected)
    # or both at once, into a model that has an adapter.
    model = tiny.llava()
    patch_model(model, processor=tiny.processor())
    model = PeftModel.from_pretrained(model, tmp_path)
    assert_same(logits(model.eval()), expected)


def test_an_adapter_that_is_loaded_into_a_peft_model_is_saved_and_kept_with_it(tmp_path):
    wrapped, _ = make(TARGETS_OF_A_COPY, "patched first")
    expected = logits(wrapped)
    wrapped.save_pretrained(tmp_path / "first")
    model = PeftModel.from_pretrained(tiny.llava(), tmp_path / "first")
    load_adapter(model, tmp_path / "first", processor=tiny.processor())
    model.save_pretrained(tmp_path / "second")
    weights = "emma_adapter/default/adapter_model.safetensors"
    first, second = (load_file(tmp_path / folder / weights) for folder in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in {*first, *second})
    assert_same(logits(model.merge_and_unload().eval()), expected)


def test_the_later_of_two_saves_to_one_folder_is_loaded(tmp_path):
    """A base model's save, and a LoRA's, lay the adapter in other places."""
    model = tiny.llava()
    adapter = patch_model(model, processor=tiny.processor())
    tiny.train_randomly(adapter.alignment, seed=1)
    model.save_pretrained(tmp_path)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    tiny.train_randomly(adapter.alignment, seed=2)
    expected = logits(wrapped)
    wrapped.save_pretrained(tmp_path)
    found = load_adapter(tiny.llava(), tmp_path, processor=tiny.processor())
    assert_same(logits(found.model.eval()), expected)
    tiny.train_randomly(adapter.alignment, seed=3)
    expected = logits(wrapped)
    wrapped.unload().save_pretrained(tmp_path)
    found = load_adapter(tiny.llava(), tmp_path, processor=tiny.processor())
    assert_same(logits(found.model.eval()), expected)


def test_several_of_each_are_saved_together(tmp_path):
    wrapped, adapter = make(LoraConfig(r=2, target_modules=["q_proj"]), "patched first")
    adapter.add("other", EmmaConfig(fusion="attention")).set_active("other")
    tiny.train_randomly(adapter.alignment)
    expected = logits(wrapped)
    wrapped.save_pretrained(tmp_path)
    base = load_adapter(tiny.llava(), tmp_path, processor=tiny.processor())
    assert base.config.fusion == "modulation"
    base.add("other", EmmaConfig(fusion="attention")).set_active("other")
    assert_same(logits(PeftModel.from_pretrained(base.model, tmp_path).eval()), expected)
    (tmp_path / "emma_adapter" / "default").rename(tmp_path / "emma_adapter" / "first")
    with pytest.raises(CheckpointError, match=r"\['first', 'other'\]"):
        load_adapter(tiny.llava(), tmp_path)


def test_another_lora_leaves_the_adapter_alone(tmp_path):
    wrapped, adapter = make(LoraConfig(r=2, target_modules=["q_proj"]), "patched first")
    wrapped.save_pretrained(tmp_path)
    tiny.train_randomly(adapter.alignment, seed=7)
    before = copy.deepcopy(adapter.alignment.state_dict())
    wrapped.load_adapter(tmp_path, "second")
    assert all(torch.equal(value, before[name]) for name, value in adapter.alignment.state_dict().items())
    wrapped.load_adapter(tmp_path, "default")
    assert not all(torch.equal(value, before[name]) for name, value in adapter.alignment.state_dict().items())


def test_a_lora_that_was_saved_with_another_kind_of_adapter(tmp_path):
    wrapped, _ = make(LoraConfig(r=2, target_modules=["q_proj"]), "patched first")
    wrapped.save_pretrained(tmp_path)
    model = tiny.llava()
    patch_model(model, EmmaConfig(fusion="attention"))
    with pytest.raises(PatchError, match="another kind"):
        PeftModel.from_pretrained(model, tmp_path)


def test_only_the_main_process_writes(tmp_path):
    wrapped, _ = make(LoraConfig(r=2, target_modules=["q_proj"]), "patched first")
    wrapped.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "emma_adapter").exists()


def test_a_folder_of_a_lora_alone_is_none_of_ours(tmp_path):
    get_peft_model(tiny.llava(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert not (tmp_path / "emma_adapter").exists()
    with pytest.raises(CheckpointError, match=r"an adapter of PEFT \(LORA\)"):
        load_adapter(tiny.llava(), tmp_path)


# ------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("by", ["merge_and_unload", "unload"])
def test_merging_keeps_the_adapter(lora, order, by):
    wrapped, adapter = make(lora, order)
    parameters = list(adapter.parameters())
    if by == "merge_and_unload":
        expected, base = logits(wrapped), wrapped.merge_and_unload()
    else:
        with wrapped.disable_adapter():
            expected = logits(wrapped)
        base = wrapped.unload()
    torch.testing.assert_close(logits(base), expected, atol=1e-5, rtol=0)
    assert [id(one) for one in get_adapter(base).parameters()] == [id(one) for one in parameters]
    assert not [name for name in base.state_dict() if "lora" in name or "base_layer" in name]
    with get_adapter(base).disabled():
        assert (logits(base) - expected).abs().max() > 1e-3
    unpatch_model(base)
    assert list(base.state_dict()) == list(tiny.llava().state_dict())


def test_a_merged_model_is_saved_as_any_other(tmp_path):
    wrapped, _ = make(LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "linear_1"]), "patched first")
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(tmp_path)
    base = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    with get_adapter(merged).disabled():
        assert torch.equal(logits(base), logits(merged))
    load_adapter(base, tmp_path, processor=tiny.processor())
    assert torch.equal(logits(base), logits(merged))


# ------------------------------------------------------------------------------------ with a projector


def test_a_projector_has_one_owner():
    """What PEFT wraps can't be saved with the adapter, so either says so."""
    lora = LoraConfig(target_modules=["linear_1"])
    wrapped = get_peft_model(tiny.llava(), lora)
    with pytest.raises(PatchError, match="wrapped by PEFT"):
        patch_model(wrapped).train_only(projector=True)
    model = tiny.llava()
    patch_model(model).train_only(projector=True)
    with pytest.raises(PatchError, match="exclude_modules"):
        get_peft_model(model, lora)
    model = tiny.llava()
    adapter = patch_model(model).train_only(projector=True)
    wrapped = get_peft_model(model, LoraConfig(target_modules="all-linear", exclude_modules=r".*projector.*"))
    assert all(parameter.requires_grad for parameter in adapter.parameters())


# ------------------------------------------------------------------------------------------- Trainer


class Repeated(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return index


def collate(rows):
    answers = ("no", "yes", "two", "a red bird")
    talks = [[tiny.user("is there a cat?"), tiny.assistant(answers[row % 4])] for row in rows]
    inputs = tiny.chat_inputs(talks, generate=False, first_picture=rows[0])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]
    return {**inputs, "labels": labels}


def trainer(model, folder, **options):
    settings = {"save_steps": 2, "logging_steps": 1, "max_steps": 4, "per_device_train_batch_size": 2, **options}
    arguments = TrainingArguments(
        folder, learning_rate=1e-2, use_cpu=True, report_to=[], disable_tqdm=True, seed=3, **settings
    )
    return Trainer(model=model, args=arguments, train_dataset=Repeated(), data_collator=collate)


def losses(made):
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore")
def test_trainer_resumes_both(order, tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])

    def fresh():
        torch.manual_seed(0)
        return make(lora, order, trained=False)

    wrapped, adapter = fresh()
    start = copy.deepcopy(adapter.alignment.state_dict())
    whole = trainer(wrapped, tmp_path / "whole")
    whole.train()
    assert not all(torch.equal(value, start[name]) for name, value in adapter.alignment.state_dict().items())
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert sorted(path.name for path in checkpoint.iterdir() if path.suffix == ".safetensors") == [
        "adapter_model.safetensors"
    ]
    assert json.loads((checkpoint / "adapter_config.json").read_text())["peft_type"] == "LORA"
    resumed, again = fresh()
    resumed_trainer = trainer(resumed, tmp_path / "resumed")
    resumed_trainer.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed_trainer)[-2:] == losses(whole)[-2:]
    for name, value in again.alignment.state_dict().items():
        assert torch.equal(value, adapter.alignment.state_dict()[name])


# --------------------------------------------------------------------------------------- other models


def test_other_models_are_none_of_our_business():
    """The process-wide hook does nothing where there is no patched model."""
    patch_model(tiny.llava())
    wrapped = get_peft_model(tiny.llava(), LoraConfig(target_modules=["q_proj"]))
    for module in (wrapped, wrapped.base_model):
        assert not {"save_pretrained", "load_adapter", "inject_adapter"} & set(vars(module))
    assert not [name for name in trainable(wrapped) if "lora_" not in name]
    nn.Sequential(nn.Linear(2, 2))


def test_copies_of_a_peft_model_are_independent(order):
    wrapped, adapter = make(LoraConfig(r=2, init_lora_weights=False, target_modules=["linear_1"]), order)
    expected = logits(wrapped)
    twin = copy.deepcopy(wrapped)
    tiny.train_randomly(adapter.alignment, seed=4)
    assert torch.equal(logits(twin), expected)
    merged = twin.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=0)
    assert hasattr(wrapped.base_model.model.model.multi_modal_projector.linear_1, "lora_A")


# --------------------------------------------------------------------------------------- quantized base


QUANTIZED = {
    "8 bit": BitsAndBytesConfig(load_in_8bit=True),
    "4 bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
}


@pytest.fixture(scope="module")
def wide_llava(tmp_path_factory):
    """bitsandbytes packs blocks of 64 weights."""
    text, vision = tiny.llama_config(380), tiny.vision_config()
    for config in (text, vision):
        config.hidden_size = config.intermediate_size = 128
    text.head_dim = 32
    folder = tmp_path_factory.mktemp("wide")
    tiny.llava(text_config=text, vision_config=vision).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantized", QUANTIZED)
def test_qlora(quantized, wide_llava, tmp_path):
    def load():
        return LlavaForConditionalGeneration.from_pretrained(
            wide_llava, quantization_config=QUANTIZED[quantized], device_map="cpu"
        )

    model = prepare_model_for_kbit_training(load(), use_gradient_checkpointing=False)
    # On a CPU, bitsandbytes repacks 4-bit weights at the first call in eval mode, and can't train them after that.
    base = logits(model.train())
    adapter = patch_model(model, processor=tiny.processor())
    assert torch.equal(logits(model), base)
    tiny.train_randomly(adapter.alignment)
    assert not torch.allclose(logits(model), base)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "linear_1"], init_lora_weights=False))
    wrapped(**training_inputs()).loss.backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    assert all(p.grad is not None for n, p in wrapped.named_parameters() if "language_model" in n and "lora_A" in n)
    expected = logits(wrapped.eval())
    wrapped.save_pretrained(tmp_path)
    again = prepare_model_for_kbit_training(load(), use_gradient_checkpointing=False)
    load_adapter(again, tmp_path, processor=tiny.processor())
    again = PeftModel.from_pretrained(again, tmp_path).eval()
    torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=0)
