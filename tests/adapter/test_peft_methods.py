"""PEFT's methods beside LoRA: the adapter stays trainable, reads the prompt, and is in its own files."""

from __future__ import annotations

import copy
import json
import warnings as python_warnings
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from safetensors.torch import load_file

from emma_adapter import get_adapter, load_adapter, patch_model, unpatch_model
from tests.adapter.test_peft import trainer, training_inputs
from tests.support import tiny
from tests.support.zoo import ZOO, Row, answered

VIRTUAL = {
    "prompt tuning": (peft.PromptTuningConfig, {}),
    "multitask prompt tuning": (peft.MultitaskPromptTuningConfig, {"num_tasks": 2, "num_ranks": 1}),
    "prefix tuning": (peft.PrefixTuningConfig, {}),
    "prefix tuning, projected": (peft.PrefixTuningConfig, {"prefix_projection": True, "encoder_hidden_size": 8}),
    "p-tuning": (peft.PromptEncoderConfig, {"encoder_hidden_size": 8}),
    "cartridge": (peft.CartridgeConfig, {}),
    "context-aware prompt tuning": (
        peft.CPTConfig,
        {"cpt_token_ids": [10, 11, 12], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]},
    ),
}
virtual = pytest.mark.parametrize("method", VIRTUAL)
TASKS = {"multitask prompt tuning": {"task_ids": torch.tensor([0, 1])}}
INPUTS = tiny.chat_inputs([[tiny.user("is there a cat?")], [tiny.user("what colour is the bird?", images=2)]])


def with_virtual_tokens(model, method):
    torch.manual_seed(1)
    config, options = VIRTUAL[method]
    return get_peft_model(model, config(task_type="CAUSAL_LM", num_virtual_tokens=3, **options)).eval()


def trained(model=None, processor=None):
    adapter = patch_model(model or tiny.llava(), processor=processor or tiny.processor())
    tiny.train_randomly(adapter.alignment)
    return adapter


def seen_by(adapter, call):
    """What the adapter makes of the visual tokens in a call."""
    found = []
    hook = adapter.alignment.register_forward_hook(lambda module, args, output: found.append(output.detach().clone()))
    with torch.no_grad():
        call()
    hook.remove()
    return torch.cat(found)


@torch.no_grad()
def logits(model, **more):
    return model(**INPUTS, **more).logits


def generate(model, inputs=INPUTS, **more):
    return model.generate(**inputs, **more, max_new_tokens=3, do_sample=False)


# ------------------------------------------------------------------------------------- virtual tokens


@virtual
def test_virtual_tokens_leave_the_adapter_as_trainable_as_it_was(method):
    adapter = trained()
    wrapped = with_virtual_tokens(adapter.model, method)
    own = {id(parameter) for parameter in adapter.parameters()}
    assert all(parameter.requires_grad for parameter in adapter.parameters())
    others = [n for n, p in wrapped.named_parameters() if p.requires_grad and id(p) not in own]
    assert others
    assert all(name.startswith("prompt_encoder") for name in others)
    frozen = trained()
    frozen.alignment.requires_grad_(False)
    with_virtual_tokens(frozen.model, method)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@virtual
def test_virtual_tokens_are_no_part_of_the_instruction(method):
    """With them before the prompt, an image meets what it meets without: in training, too, where labels tell."""
    adapter = trained()
    wrapped, model, task = with_virtual_tokens(adapter.model, method), adapter.model, TASKS.get(method, {})
    expected = seen_by(adapter, lambda: model(**INPUTS))
    assert torch.equal(seen_by(adapter, lambda: wrapped(**INPUTS, **task)), expected)
    assert torch.equal(seen_by(adapter, lambda: generate(wrapped, **task)), expected)
    with wrapped.disable_adapter():
        assert torch.equal(seen_by(adapter, lambda: wrapped(**INPUTS)), expected)
    task = {name: value[:1] for name, value in task.items()}
    inputs = training_inputs()
    expected = seen_by(adapter, lambda: model.train()(**inputs))
    assert torch.equal(seen_by(adapter, lambda: wrapped.train()(**inputs, **task)), expected)
    with wrapped.disable_adapter():
        assert torch.equal(seen_by(adapter, lambda: wrapped(**inputs)), expected)
    # Nothing of such a call is left for one that goes round the wrapper.
    other = tiny.chat_inputs([[tiny.user("how many dogs are there?")]])
    embeds = {**other, "inputs_embeds": model.get_input_embeddings()(other["input_ids"]).detach()}
    del embeds["input_ids"]
    with pytest.raises(ValueError, match="can't be read from inputs_embeds"):
        model(**embeds)


@virtual
def test_virtual_tokens_are_those_of_the_plain_model_until_the_adapter_is_trained(method):
    plain, model = with_virtual_tokens(tiny.llava(), method), tiny.llava()
    patch_model(model, processor=tiny.processor())
    wrapped, task = with_virtual_tokens(model, method), TASKS.get(method, {})
    assert torch.equal(logits(wrapped, **task), logits(plain, **task))
    assert torch.equal(generate(wrapped, **task), generate(plain, **task))
    assert torch.equal(logits(copy.deepcopy(wrapped), **task), logits(plain, **task))
    unpatch_model(wrapped)
    assert torch.equal(logits(wrapped, **task), logits(plain, **task))
    assert not wrapped._forward_pre_hooks
    assert not wrapped._forward_hooks
    # The other way round: the wrapper is there before the adapter.
    adapter = patch_model(wrapped, processor=tiny.processor())
    tiny.train_randomly(adapter.alignment)
    assert torch.equal(
        seen_by(adapter, lambda: wrapped(**INPUTS, **task)), seen_by(adapter, lambda: adapter.model(**INPUTS))
    )


@virtual
def test_virtual_tokens_are_trained_and_saved_with_the_adapter(method, tmp_path):
    adapter, task = trained(), TASKS.get(method, {})
    wrapped = with_virtual_tokens(adapter.model, method)
    if method != "context-aware prompt tuning":  # its loss divides by the labelled virtual tokens, of which are none
        first = {name: value[:1] for name, value in task.items()}
        wrapped.train()(**training_inputs(), **first).loss.backward()
        assert all(parameter.grad is not None for parameter in adapter.parameters())
    expected = logits(wrapped.eval(), **task)
    wrapped.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "adapter_model.safetensors") if "emma" in name]
    model = tiny.llava()
    again = load_adapter(model, tmp_path, processor=tiny.processor())
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(model, tmp_path).eval(), **task), expected, atol=1e-5, rtol=0
    )
    assert all(parameter.requires_grad for parameter in again.parameters())
    # Whole, as a state dict that was gathered elsewhere.
    wrapped.save_pretrained(tmp_path / "gathered", state_dict=wrapped.state_dict())
    weights = "emma_adapter/default/adapter_model.safetensors"
    one, other = load_file(tmp_path / weights), load_file(tmp_path / "gathered" / weights)
    assert all(torch.equal(one[name], other[name]) for name in {*one, *other})


@pytest.mark.parametrize("name", ["qwen2_vl", "internvl", "gemma3", "llava_next", "smolvlm"])
@pytest.mark.parametrize("method", ["prompt tuning", "prefix tuning"])
def test_virtual_tokens_before_other_families_images(name, method):
    entry = ZOO[name]
    if (name, method) == ("qwen2_vl", "prefix tuning"):
        pytest.skip("PEFT's prefix doesn't fit this model's positions, patched or not")
    adapter = trained(entry.model(), entry.make_processor())
    wrapped = with_virtual_tokens(adapter.model, method)
    rows = [Row(("is there a cat?",), images=((56, 56),)), Row(("how many?",), images=((56, 56), (56, 84)), seed=3)]
    for inputs in (entry.batch(rows), answered(entry, rows, "no")):
        wrapped.train("labels" in inputs)
        expected = seen_by(adapter, lambda inputs=inputs: adapter.model(**inputs))
        assert torch.equal(seen_by(adapter, lambda inputs=inputs: wrapped(**inputs)), expected)


def test_every_method_of_peft_is_one_that_is_guarded():
    """A method that works otherwise than tuners and virtual tokens would freeze the adapter, or lose it."""
    unguarded = [
        kind.value
        for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()
        if not issubclass(PEFT_TYPE_TO_CONFIG_MAPPING[kind], peft.PromptLearningConfig)
        and not all(hasattr(tuner, name) for name in ("inject_adapter", "merge_and_unload"))
    ]
    # It refuses every model but a few language models.
    assert unguarded in ([], ["ADAPTION_PROMPT"])


# -------------------------------------------------------------------------------- what PEFT's file holds

TARGETS = {"target_modules": ["q_proj", "linear_1"]}
BIASED = {
    "lora": LoraConfig(bias="all", **TARGETS),
    "dora": LoraConfig(bias="all", use_dora=True, **TARGETS),
    "lora, its own": LoraConfig(bias="lora_only", **TARGETS),
    "everything": LoraConfig(bias="all", target_modules="all-linear"),
    "tokens": LoraConfig(bias="all", trainable_token_indices=[5, 6], modules_to_save=["lm_head"], **TARGETS),
    "a copy of the projector": LoraConfig(
        bias="all", target_modules=["q_proj"], modules_to_save=["multi_modal_projector"]
    ),
    "adalora": peft.AdaLoraConfig(bias="all", total_step=10, target_modules=["q_proj"]),
    "oft": peft.OFTConfig(bias="all", oft_block_size=4, target_modules=["q_proj"]),
    "hra": peft.HRAConfig(bias="all", target_modules=["q_proj"]),
    "miss": peft.MissConfig(bias="all", r=2, target_modules=["q_proj"]),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm", "norm", "layer_norm1"]),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": peft.LoHaConfig(target_modules=["q_proj"]),
    "vera": peft.VeraConfig(r=2, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("name", BIASED)
def test_the_file_of_peft_holds_what_it_holds_without_the_adapter(name, tmp_path):
    get_peft_model(tiny.llava(), BIASED[name]).save_pretrained(tmp_path / "alone")
    adapter = trained()
    wrapped = get_peft_model(adapter.model, BIASED[name]).eval()
    expected = logits(wrapped)
    wrapped.save_pretrained(tmp_path / "both")
    wrapped.save_pretrained(tmp_path / "gathered", state_dict=wrapped.state_dict())
    alone = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    for folder in ("both", "gathered"):
        assert set(load_file(tmp_path / folder / "adapter_model.safetensors")) == set(alone)
    assert all(parameter.requires_grad for parameter in adapter.parameters())
    # The model's own state dict is complete, as before.
    assert [key for key in wrapped.state_dict() if ".emma." in key]
    model = tiny.llava()
    load_adapter(model, tmp_path / "both", processor=tiny.processor())
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(model, tmp_path / "both").eval()), expected, atol=1e-5, rtol=0
    )


# -------------------------------------------------------------------------------------- one without the other


@pytest.mark.parametrize("task", [{}, {"task_type": "CAUSAL_LM"}])
@pytest.mark.parametrize("by", [LoraConfig, peft.PromptTuningConfig])
def test_loading_a_half_is_hinted_at(task, by, tmp_path):
    """In the card of the folder, and by a warning where this library is imported."""
    if by is peft.PromptTuningConfig:
        config = by(task_type="CAUSAL_LM", num_virtual_tokens=3)
    else:
        config = by(r=2, target_modules=["q_proj"], **task)
    adapter = trained()
    wrapped = get_peft_model(adapter.model, config)
    wrapped.save_pretrained(tmp_path)
    wrapped.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.count("load_adapter(model") == 1
    assert "`PeftModel.from_pretrained` alone does not load it" in card
    with pytest.warns(UserWarning, match=r"EMMA adapter lies beside it.*load_adapter") as warned:
        half = PeftModel.from_pretrained(tiny.llava(), tmp_path)
    assert {warning.filename for warning in warned if "EMMA" in str(warning.message)} == {__file__}
    assert not {"save_pretrained", "load_adapter", "add_adapter"} & set(vars(half))
    with python_warnings.catch_warnings():
        python_warnings.filterwarnings("error", message=".*EMMA.*")
        model = tiny.llava()
        load_adapter(model, tmp_path, processor=tiny.processor())
        PeftModel.from_pretrained(model, tmp_path)
        get_peft_model(tiny.llava(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
        PeftModel.from_pretrained(tiny.llava(), tmp_path / "lora")
    assert "load_adapter" not in (tmp_path / "lora" / "README.md").read_text()


def test_the_code_of_a_card_loads_both(tmp_path):
    adapter = trained()
    wrapped = get_peft_model(adapter.model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    wrapped.save_pretrained(tmp_path)
    tiny.llava().save_pretrained(tmp_path / "base")
    tiny.processor().save_pretrained(tmp_path / "base")
    code = (tmp_path / "README.md").read_text().split("```python\n")[-1].split("```")[0]
    code = code.replace("path/to/this/folder", str(tmp_path)).replace("your base model", str(tmp_path / "base"))
    scope = {}
    exec(code, scope)
    torch.testing.assert_close(logits(scope["model"].eval()), logits(wrapped), atol=1e-5, rtol=0)


def test_a_card_of_its_author_stays(tmp_path):
    own = "---\nlicense: mit\n---\n# Mine\n\nLoad it with `load_adapter`.\n"
    (tmp_path / "README.md").write_text(own)
    wrapped = get_peft_model(trained().model, LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "Load it with `load_adapter`." in card
    assert "EMMA adapter" not in card
    # What somebody has written around ours stays, and ours is renewed.
    (tmp_path / "README.md").write_text(own.replace("Load it with `load_adapter`.", "Mine."))
    wrapped.save_pretrained(tmp_path)
    before = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(before.replace("It takes", "It took") + "\nThe end.\n")
    wrapped.save_pretrained(tmp_path)
    after = (tmp_path / "README.md").read_text()
    assert (after.count("## EMMA adapter"), "Mine." in after, "The end." in after) == (1, True, True)


def test_peft_reads_its_config_as_before(tmp_path):
    get_peft_model(tiny.llava(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "alone")
    get_peft_model(trained().model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "both")
    alone, both = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("alone", "both"))
    assert both["auto_mapping"].pop("emma_adapter") == "emma_adapter"
    assert both == alone


# ------------------------------------------------------------------------------------ named by their users


def test_a_lora_with_a_name_brings_the_adapter_too(tmp_path):
    """PEFT saves it in a folder of its name, and the adapter lies above."""
    adapter = trained()
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    wrapped = get_peft_model(adapter.model, lora, adapter_name="mine").eval()
    expected = logits(wrapped)
    wrapped.save_pretrained(tmp_path)
    assert "emma_adapter" in json.loads((tmp_path / "mine" / "adapter_config.json").read_text())["auto_mapping"]
    for source, place in ((tmp_path / "mine", {}), (tmp_path, {"subfolder": "mine"})):
        model = tiny.llava()
        patch_model(model, processor=tiny.processor())
        again = PeftModel.from_pretrained(model, source, adapter_name="mine", **place).eval()
        torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_trainer_resumes_a_lora_with_a_name(tmp_path):
    def fresh():
        model = tiny.llava()
        adapter = patch_model(model, processor=tiny.processor())
        torch.manual_seed(0)
        return adapter, get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="mine")

    adapter, wrapped = fresh()
    trainer(wrapped, tmp_path / "whole").train()
    again, resumed = fresh()
    trainer(resumed, tmp_path / "resumed").train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, value in again.alignment.state_dict().items():
        assert torch.equal(value, adapter.alignment.state_dict()[name])


def test_a_tool_that_asks_for_the_state_while_nothing_is_saved():
    """What hides the adapter from PEFT's save is gone after it, also after one that failed."""
    wrapped = get_peft_model(trained().model, LoraConfig(r=2, bias="all", target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="selected_adapters"):
        wrapped.save_pretrained(Path("nowhere"), selected_adapters=["missing"])
    assert [name for name in wrapped.state_dict() if ".emma." in name]
    assert get_adapter(wrapped).names == ("default",)
