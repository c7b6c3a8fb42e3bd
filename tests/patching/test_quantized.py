"""A base of 4 or 8 bits with the adapter on it: trained by Trainer and TRL, saved, and what can't be done with it."""

from __future__ import annotations

import copy
import pickle

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration
from transformers.trainer_utils import validate_quantization_for_training

from emma_adapter import CheckpointError, PatchError, get_adapter, load_adapter, patch_model, unpatch_model
from tests.adapter.test_trainer import (
    PROCESSOR,
    QUESTIONS,
    VOCABULARY,
    checkpoint_folder,
    copied,
    losses,
    same_values,
    trainer_for,
)
from tests.support import tiny

pytestmark = pytest.mark.filterwarnings("ignore")

KINDS = {
    "8 bit": {"load_in_8bit": True},
    "4 bit": {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base whose weights bitsandbytes can pack in blocks of 64."""
    text, vision = tiny.llama_config(VOCABULARY), tiny.vision_config()
    for config in (text, vision):
        config.hidden_size = config.intermediate_size = 128
    text.head_dim = 32
    folder = tmp_path_factory.mktemp("wide")
    tiny.llava(text_config=text, vision_config=vision, image_token=4).save_pretrained(folder)
    return folder


def load(folder, kind="8 bit", *, projector_too=True):
    skipped = {} if projector_too else {"llm_int8_skip_modules": ["model.multi_modal_projector", "lm_head"]}
    config = BitsAndBytesConfig(**KINDS[kind], **skipped)
    return LlavaForConditionalGeneration.from_pretrained(folder, quantization_config=config, device_map="cpu")


def patched(folder, kind="8 bit", **options):
    torch.manual_seed(3)
    model = load(folder, kind, **options)
    patch_model(model, processor=PROCESSOR)
    return model


@pytest.mark.parametrize("projector", [False, True])
def test_save_pretrained_writes_the_base_without_the_adapter(projector, folder, tmp_path):
    model = patched(folder, projector_too=not projector)
    adapter = get_adapter(model).train_only(projector=projector)
    tiny.train_randomly(adapter.alignment)
    if projector:
        tiny.train_randomly(adapter.projector.linear_1, scale=0.1)
    model.save_pretrained(tmp_path)
    saved = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert not [name for name in saved if "emma" in name]
    again, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, device_map="cpu", output_loading_info=True)
    assert not info["unexpected_keys"]
    base = load(folder, projector_too=not projector)
    assert same_values(again.state_dict(), base.state_dict())
    load_adapter(again, tmp_path, processor=PROCESSOR)
    assert same_values(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_projector_is_refused_before_anything_changes(kind, folder):
    model = patched(folder, kind)
    adapter = get_adapter(model)
    adapter.alignment.requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(PatchError, match=r"linear_1.weight.*quantized.*\['model.multi_modal_projector', 'lm_head'\]"):
        adapter.train_only(projector=True)
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert model.model.multi_modal_projector._modules.keys() == {"linear_1", "act", "linear_2", "emma"}
    adapter.train_only().unfreeze()


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_projector_is_not_loaded_into_a_quantized_one(kind, folder, tmp_path):
    trained = LlavaForConditionalGeneration.from_pretrained(folder)
    patch_model(trained, processor=PROCESSOR).train_only(projector=True).save_pretrained(tmp_path)
    model = load(folder, kind)
    before = copied(model)
    with pytest.raises(CheckpointError, match=r"linear_1.weight.*quantized.*llm_int8_skip_modules"):
        load_adapter(model, tmp_path, processor=PROCESSOR)
    assert same_values(model.state_dict(), before)
    adapter = load_adapter(load(folder, kind, projector_too=False), tmp_path, processor=PROCESSOR)
    assert adapter.train_only(projector=True).parameter_groups(1e-3)[1]["params"]


class _Packed(torch.nn.Linear):
    """As GPTQ and AWQ have it: integers among the buffers, and no parameter but the bias."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.register_buffer("qweight", torch.zeros(linear.in_features // 8, linear.out_features, dtype=torch.int32))
        del self.weight


@pytest.mark.parametrize("kind", ["buffers", "float8", "int8"])
def test_other_quantizers(kind):
    model = tiny.llava()
    projector = model.model.multi_modal_projector
    if kind == "buffers":
        model.is_quantized = True
        projector.linear_1 = _Packed(projector.linear_1)
    else:
        dtype = {"float8": torch.float8_e4m3fn, "int8": torch.int8}[kind]
        projector.linear_1.weight = torch.nn.Parameter(projector.linear_1.weight.to(dtype), requires_grad=False)
    adapter = patch_model(model)
    with pytest.raises(PatchError, match=r"linear_1.*quantized"):
        adapter.train_only(projector=True)
    assert all(parameter.requires_grad for parameter in model.lm_head.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_trainer_takes_the_adapter_alone(kind, folder, tmp_path):
    model = patched(folder, kind)
    get_adapter(model).train_only()
    before = copied(model)
    uninterrupted = trainer_for(model, tmp_path, max_steps=4, save_steps=2)
    uninterrupted.train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".emma." in name}
    saved = safetensors.torch.load_file(checkpoint_folder(tmp_path, 2) / "model.safetensors")
    assert set(saved) == changed

    resumed = patched(folder, kind)
    get_adapter(resumed).train_only()
    continued = trainer_for(resumed, tmp_path / "again", max_steps=4, save_steps=2)
    continued.train(resume_from_checkpoint=str(checkpoint_folder(tmp_path, 2)))
    assert losses(continued) == losses(uninterrupted)
    assert same_values(resumed.state_dict(), model.state_dict())


def test_trainer_still_refuses_what_it_should(folder, tmp_path):
    """Without an adapter to train, or a quantizer that gradients don't pass, it is a purely quantized model."""
    model = patched(folder)
    adapter = get_adapter(model).train_only()
    validate_quantization_for_training(model)
    validate_quantization_for_training(copy.deepcopy(model))
    assert not model._hf_peft_config_loaded, "there is no adapter of PEFT"
    adapter.alignment.requires_grad_(False)
    with pytest.raises(ValueError, match="purely quantized"):
        trainer_for(model, tmp_path)
    adapter.train_only()
    quantizer = model.hf_quantizer
    model.hf_quantizer = type("Untrainable", (), {"is_trainable": False, "quantization_config": None})()
    with pytest.raises(ValueError, match="purely quantized"):
        trainer_for(model, tmp_path)
    model.hf_quantizer = quantizer
    unpatch_model(model)
    assert "_hf_peft_config_loaded" not in model.__dict__
    with pytest.raises(ValueError, match="purely quantized"):
        trainer_for(model, tmp_path)


def rows():
    import datasets
    from PIL import Image

    return datasets.Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": answer}],
                "images": [Image.new("RGB", (28, 28))],
            }
            for question, answer in QUESTIONS.TEXTS[:2]
        ]
    )


@pytest.mark.parametrize("lora", [False, True])
def test_trl_leaves_the_adapter_in_float32(lora, folder, tmp_path):
    """In bfloat16 a norm's weight of 1 doesn't move at 1e-3."""
    from trl import SFTConfig, SFTTrainer

    model = patched(folder)
    adapter = get_adapter(model).train_only()
    tiny.train_randomly(adapter.alignment)
    for name, parameter in adapter.named_parameters():
        if "norm.weight" in name:
            parameter.data.fill_(1)
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    before = {name: parameter.detach().clone() for name, parameter in adapter.named_parameters()}
    arguments = SFTConfig(
        str(tmp_path),
        max_steps=1,
        learning_rate=1e-3,
        max_length=None,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": False},
    )
    trainer = SFTTrainer(model, arguments, train_dataset=rows(), processing_class=PROCESSOR)
    now = dict(adapter.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in before.items()), "the weights that were cast are back"
    trainer.train()
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
    moved = [name for name, value in before.items() if not torch.equal(now[name], value)]
    assert [name for name in moved if "norm.weight" in name]


def test_a_cast_in_a_loop_of_ones_own_is_undone_when_training_starts(folder):
    """As TRL does it; also after the weights were trained, when the first ones are no longer right."""
    model = patched(folder)
    adapter = get_adapter(model).train_only()
    tiny.train_randomly(adapter.alignment, seed=1)
    exact = [parameter.detach().clone() for parameter in adapter.parameters()]
    for parameter in adapter.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.train()
    assert all(torch.equal(one, other) for one, other in zip(adapter.parameters(), exact, strict=True))
    for parameter in adapter.parameters():
        parameter.data = parameter.data.to(torch.bfloat16) * 2
    doubled = [parameter.detach().float() for parameter in adapter.parameters()]
    model.train()
    assert all(torch.equal(one, other) for one, other in zip(adapter.parameters(), doubled, strict=True))
    pickle.dumps(adapter.alignment)


def test_an_adapter_that_was_cast_with_its_model_stays_so():
    """A model in bfloat16 that isn't quantized is trained as whoever cast it wants."""
    model = tiny.llava()
    adapter = patch_model(model)
    model.to(torch.bfloat16)
    adapter.train_only()
    model.train()
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
def test_more_than_the_adapter_is_trained_and_resumed(kind, folder, tmp_path):
    """What isn't quantized can be trained too: the head, which bitsandbytes leaves alone."""

    def with_head():
        model = patched(folder, kind)
        get_adapter(model).train_only()
        model.lm_head.requires_grad_(True)
        return model

    whole, resumed = with_head(), with_head()
    uninterrupted = trainer_for(whole, tmp_path, max_steps=4, save_steps=2)
    uninterrupted.train()
    continued = trainer_for(resumed, tmp_path / "again", max_steps=4, save_steps=2)
    continued.train(resume_from_checkpoint=str(checkpoint_folder(tmp_path, 2)))
    assert losses(continued) == losses(uninterrupted)
    assert same_values(resumed.state_dict(), whole.state_dict())
    other = LlavaForConditionalGeneration.from_pretrained(checkpoint_folder(tmp_path, 4), device_map="cpu")
    load_adapter(other, checkpoint_folder(tmp_path, 4), processor=PROCESSOR)
    assert same_values(other.state_dict(), whole.state_dict())
