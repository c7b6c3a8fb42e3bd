"""accelerate's dispatch and offloading, before and after patching: the adapter runs where its projector runs."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from transformers import LlavaForConditionalGeneration

from emma_adapter import EmmaConfig, PatchError, get_adapter, load_adapter, patch_model, unpatch_model
from tests.support import tiny
from tests.support.budget import some
from tests.support.zoo import ZOO, Row

CPU = torch.device("cpu")
CONFIG = EmmaConfig(fusion="attention", inner_dim=8, num_heads=2)
ROWS = [Row(("how many?",), images=((56, 56),)), Row(("what colour?",), images=((56, 56), (56, 84)))]
FAMILIES = ("llava", "qwen2_vl")  # one visual token sequence an image, and packed ones
FUSIONS = {
    "attention": CONFIG,
    "linear": EmmaConfig(fusion="linear", max_instruction_tokens=16),
    "modulation": EmmaConfig(fusion="modulation", inner_dim=8, num_heads=2),
    "moda": EmmaConfig.moda(inner_dim=8, num_heads=2),
}


def device_map(model, **entries):
    """Everything on the CPU but what is named."""
    names = [name for name, _ in model.model.named_children()] + ["lm_head"]
    return {name if name == "lm_head" else f"model.{name}": entries.get(name, "cpu") for name in names}


PLACEMENTS = {
    "dispatch": lambda model, folder: dispatch_model(
        model, device_map(model), main_device="cpu", force_hooks=True, offload_dir=folder
    ),
    "cpu_offload": lambda model, folder: cpu_offload(model, execution_device=CPU),
    "disk_offload": lambda model, folder: disk_offload(model, folder, execution_device=CPU),
    "projector on disk": lambda model, folder: dispatch_model(
        model,
        device_map(model, multi_modal_projector="disk", visual="disk"),
        main_device="cpu",
        force_hooks=True,
        offload_dir=folder,
    ),
}


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def adapter_values(adapter):
    return {name: parameter.detach().clone() for name, parameter in adapter.named_parameters()}


@pytest.fixture(scope="module", params=[(name, fusion) for name in FAMILIES for fusion in FUSIONS], ids="-".join)
def case(request, tmp_path_factory):
    """A zoo entry, the folder of its trained adapter, its inputs, and what the undispatched model makes of them."""
    name, fusion = request.param
    entry, folder = ZOO[name], tmp_path_factory.mktemp("adapter")
    model = entry.model()
    adapter = patch_model(model, FUSIONS[fusion], processor=entry.processor())
    tiny.train_randomly(adapter.alignment)
    adapter.save_pretrained(folder)
    inputs = entry.batch(ROWS)
    with adapter.disabled():
        base = logits(model, inputs)
    aligned = logits(model, inputs)
    assert (aligned - base).abs().max() > 1e-3
    return entry, folder, inputs, base, aligned


@pytest.mark.parametrize(("placement", "order"), some(1, PLACEMENTS, ["patched first", "dispatched first"]))
def test_outputs_are_those_of_the_model_in_one_place(case, order, placement, tmp_path):
    entry, folder, inputs, base, aligned = case
    model = entry.model()
    if order == "patched first":
        load_adapter(model, folder, processor=entry.processor())
    PLACEMENTS[placement](model, tmp_path / "offload")
    if order == "dispatched first":
        load_adapter(model, folder, processor=entry.processor())
    adapter = get_adapter(model)
    assert torch.equal(logits(model, inputs), aligned)
    with adapter.disabled():
        assert torch.equal(logits(model, inputs), base)

    adapter.save_pretrained(tmp_path / "again")
    again = load_adapter(entry.model(), tmp_path / "again", processor=entry.processor())
    assert torch.equal(logits(again.model, inputs), aligned)

    remove_hook_from_submodules(model)
    if placement != "disk_offload":  # which leaves what was on disk there
        unpatch_model(model)


@pytest.fixture
def projector_folder(tmp_path):
    """An adapter whose projector was trained with it."""
    model = tiny.llava()
    adapter = patch_model(model, CONFIG, processor=tiny.processor()).train_only(projector=True)
    tiny.train_randomly(adapter.projector)
    adapter.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_trained_projector_is_kept(placement, projector_folder, tmp_path):
    inputs = tiny.token_inputs([1, 2])
    single, model = tiny.llava(), tiny.llava()
    base = logits(single, inputs)
    load_adapter(single, projector_folder, processor=tiny.processor())
    adapter = load_adapter(model, projector_folder, processor=tiny.processor())
    PLACEMENTS[placement](model, tmp_path / "offload")
    for _ in range(2):  # going back to the trained projector must work too
        assert torch.equal(logits(model, inputs), logits(single, inputs))
        with adapter.disabled():
            assert torch.equal(logits(model, inputs), base)
    adapter.save_pretrained(tmp_path / "again")
    again = load_adapter(tiny.llava(), tmp_path / "again", processor=tiny.processor())
    assert torch.equal(logits(again.model, inputs), logits(single, inputs))


def test_from_pretrained_with_a_device_map(tmp_path):
    tiny.llava().save_pretrained(tmp_path / "model")
    inputs = tiny.token_inputs([1, 2])
    single = tiny.llava()
    tiny.train_randomly(patch_model(single, CONFIG, processor=tiny.processor()).alignment)
    get_adapter(single).save_pretrained(tmp_path / "adapter")
    entries = device_map(single, multi_modal_projector="disk", language_model="disk")
    model = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=entries, offload_folder=tmp_path / "offload"
    )
    load_adapter(model, tmp_path / "adapter", processor=tiny.processor())
    assert torch.equal(logits(model, inputs), logits(single, inputs))
    generated = [m.generate(**inputs, max_new_tokens=3, do_sample=False) for m in (model, single)]
    assert torch.equal(*generated)


def test_what_cannot_take_values_says_so(projector_folder):
    adapter_only = projector_folder.with_name("adapter-only")
    patch_model(tiny.llava(), CONFIG, processor=tiny.processor()).save_pretrained(adapter_only)

    model = tiny.llava()
    patch_model(model, CONFIG, processor=tiny.processor())
    cpu_offload(model, execution_device=CPU)
    with pytest.raises(PatchError, match="load_adapter first, then dispatch"):
        load_adapter(model, adapter_only)

    model = tiny.llava()
    cpu_offload(model, execution_device=CPU)
    with pytest.raises(PatchError, match="load_adapter first, then dispatch"):
        load_adapter(model, projector_folder, processor=tiny.processor())


def test_an_offloaded_model_is_unpatched_though_its_projector_was_trained(projector_folder):
    model, inputs = tiny.llava(), tiny.token_inputs([1, 2])
    before = logits(model, inputs)
    load_adapter(model, projector_folder, processor=tiny.processor())
    cpu_offload(model, execution_device=CPU)
    assert not torch.equal(logits(model, inputs), before)
    unpatch_model(model)
    assert torch.equal(logits(model, inputs), before)


def test_weights_that_nothing_can_gather_are_not_saved(tmp_path):
    model = tiny.llava()
    adapter = patch_model(model, CONFIG, processor=tiny.processor())
    adapter.alignment.to("meta")
    with pytest.raises(PatchError, match="not in this process"):
        adapter.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_weights_that_deepspeed_partitioned_are_taken_from_what_it_gathered(tmp_path):
    """ZeRO-3 leaves empty tensors with a ``ds_id``, and gathers a state dict."""
    model = tiny.llava()
    adapter = patch_model(model, CONFIG, processor=tiny.processor()).train_only()
    tiny.train_randomly(adapter.alignment)
    gathered = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = tiny.token_inputs([1])
    expected = logits(model, inputs)
    for number, parameter in enumerate(adapter.parameters()):
        parameter.data = torch.empty(0)
        parameter.ds_id = number
    with pytest.raises(PatchError, match="get_state_dict"):
        adapter.save_pretrained(tmp_path)
    with pytest.raises(PatchError, match="get_state_dict"):
        model.save_pretrained(tmp_path, state_dict={})
    model.save_pretrained(tmp_path / "by the model", state_dict=gathered)
    adapter.save_pretrained(tmp_path / "by the handle", state_dict=gathered)
    for folder in ("by the model", "by the handle"):
        loaded = load_adapter(tiny.llava(), tmp_path / folder, processor=tiny.processor())
        assert torch.equal(logits(loaded.model, inputs), expected)


@pytest.mark.parametrize("part", ["projector", "its layers"])
def test_the_input_follows_the_projector(part):
    """As where the vision tower is on one GPU and the projector on the next; "meta" stands for the latter."""
    model = tiny.llava()
    projector = model.model.multi_modal_projector
    for module in [projector] if part == "projector" else projector.children():
        hook = AlignDevicesHook(execution_device=torch.device("meta"), offload=part != "projector", weights_map={})
        add_hook_to_module(module.to("meta"), hook)
    adapter = patch_model(model, CONFIG, processor=tiny.processor())
    assert {parameter.device.type for parameter in adapter.parameters()} == {"meta"}
    seen = []

    def stop(module, args):
        seen.append(args[0].device.type)
        raise InterruptedError  # nothing can be computed there

    adapter.alignment.register_forward_pre_hook(stop)
    with adapter.instruction("how many?"), pytest.raises(InterruptedError):
        projector(torch.randn(1, tiny.TOKENS_PER_IMAGE, tiny.WIDTH))
    assert seen == ["meta"]
