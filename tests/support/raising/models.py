"""Errors about the model: patching it, what sits on it, and the tools around it."""

from __future__ import annotations

import gc
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import AutoConfig, LlamaForCausalLM

from emma_adapter import (
    ConfigError,
    EmmaConfig,
    InstructionError,
    PatchError,
    UnsupportedModelError,
    get_adapter,
    load_adapter,
    patch_model,
    register_family,
    register_fusion,
    unpatch_model,
)
from emma_adapter.alignment.fusion import registry
from emma_adapter.integrations.llava import LlavaFamily
from emma_adapter.models import registry as family_registry
from tests.support import tiny
from tests.support.zoo import ZOO

from .triggers import Bench, question, raises

ON_THE_PROJECTOR = LoraConfig(r=2, target_modules=["linear_1"])


@contextmanager
def sharded(model: nn.Module, *parts: nn.Module):
    """FSDP2 in one process: the parts, and then the model, if none is named."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for part in parts or (model,):
            fully_shard(part, mesh=mesh)
        yield model
    finally:
        dist.destroy_process_group()


@contextmanager
def data_parallel(model: nn.Module):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield nn.parallel.DistributedDataParallel(model)
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------- patching


@raises(UnsupportedModelError, "models/registry.py:require_model", "a model is needed")
def patching_the_name_of_a_model(bench: Bench) -> None:
    patch_model("llava-hf/llava-1.5-7b-hf")


@raises(UnsupportedModelError, "models/registry.py:require_model", "a model is needed")
def loading_into_a_handle(bench: Bench) -> None:
    load_adapter(bench.adapter(), bench.folder)


@raises(UnsupportedModelError, "models/registry.py:find_family", "has no config.model_type")
def patching_a_layer(bench: Bench) -> None:
    patch_model(nn.Linear(2, 2))


@raises(UnsupportedModelError, "models/unsupported.py:raise_unsupported", "is a language model and sees no images")
def patching_a_language_model(bench: Bench) -> None:
    patch_model(LlamaForCausalLM(tiny.llama_config(50)))


def patch_by_config_alone(model_type: str) -> None:
    model = nn.Module()
    model.config = AutoConfig.for_model(model_type)
    patch_model(model)


@raises(UnsupportedModelError, "models/unsupported.py:raise_unsupported", "alone, without its vision tower")
def patching_the_language_model_of_a_checkpoint(bench: Bench) -> None:
    patch_by_config_alone("gemma3_text")


@raises(UnsupportedModelError, "models/unsupported.py:raise_unsupported", "between vision tower and projector")
def patching_a_model_that_turns_images_into_codes(bench: Bench) -> None:
    patch_by_config_alone("chameleon")


@raises(UnsupportedModelError, "models/unsupported.py:raise_unsupported", "it hears audio and sees no images")
def patching_a_model_that_only_hears(bench: Bench) -> None:
    patch_by_config_alone("qwen2_audio")


@raises(UnsupportedModelError, "models/unsupported.py:raise_unsupported", "is not supported; supported are")
def patching_a_model_without_a_family(bench: Bench) -> None:
    patch_by_config_alone("idefics2")


@raises(UnsupportedModelError, "models/families.py:ModelFamily.inner", "no inner model")
def patching_the_inner_model(bench: Bench) -> None:
    patch_model(tiny.llava().model)


@raises(UnsupportedModelError, "models/registry.py:_load", "can't be loaded")
def patching_a_model_whose_integration_is_broken(bench: Bench) -> None:
    class Broken:
        name, value, dist = "broken", "nowhere:Family", None

        def load(self) -> None:
            raise ImportError("no module named nowhere")

    bench.monkeypatch.setattr(family_registry, "entry_points", lambda group: [Broken()])
    model = tiny.llava()
    model.config.model_type = "broken"
    patch_model(model)


@raises(UnsupportedModelError, "models/registry.py:_check", "takes an instance")
def registering_the_class_of_a_family(bench: Bench) -> None:
    register_family(LlavaFamily)


@raises(UnsupportedModelError, "models/registry.py:_check", "must be a tuple of strings")
def registering_a_family_for_a_string(bench: Bench) -> None:
    register_family(type("Family", (LlavaFamily,), {"model_types": "my_llava"})())


@contextmanager
def family(bench: Bench, **members: object):
    """In the block, models of LLaVA's class have a family of other members."""
    bench.monkeypatch.setattr(family_registry, "_FAMILIES", {})
    register_family(type("Family", (LlavaFamily,), {"model_types": ("llava",), **members})())
    yield tiny.llava()


@raises(UnsupportedModelError, "models/families.py:ModelFamily.projector", "could be one of")
def a_projector_path_that_leads_nowhere(bench: Bench) -> None:
    with family(bench, projector_path="projector") as model:
        patch_model(model)


@raises(
    UnsupportedModelError,
    "models/families.py:ModelFamily.placeholder_id",
    "the token that stands for a visual token",
)
def a_config_without_the_placeholder(bench: Bench) -> None:
    with family(bench) as model:
        adapter = patch_model(model)
        # Not by assignment, which transformers checks.
        vars(model.config)["image_token_index"] = None
        adapter.model(**question())


@raises(UnsupportedModelError, "models/placeholders.py:placeholder_ids", "must return the id of a token for")
def a_placeholder_of_none(bench: Bench) -> None:
    with family(bench, placeholder_id=lambda self, inner, modality: None) as model:
        patch_model(model).model(**question())


@raises(UnsupportedModelError, "models/placeholders.py:find_placeholders", "for each of")
def placeholders_of_no_modality(bench: Bench) -> None:
    with family(bench, placeholders=lambda self, inner, input_ids: {}) as model:
        patch_model(model).model(**question())


@raises(UnsupportedModelError, "models/feature_calls.py:checked_layout", "must return an emma_adapter.MediaLayout")
def a_layout_that_is_a_list(bench: Bench) -> None:
    with family(bench, layout=lambda self, call: [1]) as model:
        patch_model(model).model(**question())


@raises(UnsupportedModelError, "adapter/config_from_model.py:resolve_sizes", "fixed number of visual tokens")
def a_fixed_size_for_a_model_without_one(bench: Bench) -> None:
    class Fixed(tiny.BufferedFusion):
        fixed_num_visual_tokens = True

    bench.monkeypatch.setattr(registry, "FUSIONS", {})
    register_fusion("fixed")(Fixed)
    patch_model(ZOO["qwen2_vl"].model(), EmmaConfig(fusion="fixed"))


@raises(ConfigError, "adapter/config_from_model.py:resolve_sizes", "config must be an EmmaConfig")
def a_dict_for_the_config(bench: Bench) -> None:
    patch_model(tiny.llava(), {"fusion": "linear"})


@raises(ConfigError, "adapter/config_from_model.py:resolve_sizes", "config must be an EmmaConfig")
def the_processor_in_the_place_of_the_config(bench: Bench) -> None:
    patch_model(tiny.llava(), tiny.processor())


@raises(ConfigError, "adapter/config_from_model.py:resolve_sizes", "align_deepstack is True")
def deepstack_where_there_is_none(bench: Bench) -> None:
    patch_model(tiny.llava(), EmmaConfig(align_deepstack=True))


@raises(ConfigError, "adapter/config_from_model.py:resolve_sizes", "its own number")
def a_number_of_visual_tokens_where_each_image_has_its_own(bench: Bench) -> None:
    patch_model(ZOO["qwen2_vl"].model(), EmmaConfig(num_visual_tokens=16))


@raises(ConfigError, "adapter/config_from_model.py:_require_agreement", "leave it None")
def another_width_than_the_vision_tower_has(bench: Bench) -> None:
    patch_model(tiny.llava(), EmmaConfig(visual_dim=7))


@raises(ConfigError, "adapter/config_from_model.py:_with_encoder_sizes", "reads at most")
def more_instruction_tokens_than_the_encoder_reads(bench: Bench) -> None:
    clip = tiny.clip_text_folder(bench.folder)
    patch_model(tiny.llava(), EmmaConfig(max_instruction_tokens=99), instruction_encoder=str(clip))


@raises(ConfigError, "adapter/config_from_model.py:make_reader", "must be the model's processor")
def the_name_of_a_processor(bench: Bench) -> None:
    patch_model(tiny.llava(), processor="llava-hf/llava-1.5-7b-hf")


@raises(ConfigError, "adapter/config_from_model.py:make_reader", "must be the model's processor")
def an_image_processor(bench: Bench) -> None:
    patch_model(tiny.llava(), processor=tiny.processor().image_processor)


@raises(PatchError, "adapter/patch.py:patch_model", "already patched")
def patching_twice(bench: Bench) -> None:
    patch_model(bench.adapter().model)


@raises(PatchError, "adapter/patch.py:patch_model", "DistributedDataParallel")
def patching_a_wrapped_model(bench: Bench) -> None:
    with data_parallel(tiny.llava()) as model:
        patch_model(model)


@raises(PatchError, "adapter/patch.py:patch_model", "AveragedModel")
def patching_an_average(bench: Bench) -> None:
    patch_model(AveragedModel(tiny.llava()))


@raises(PatchError, "patching/sites.py:check_unshared", "with another model that is patched")
def patching_a_model_that_shares_its_projector(bench: Bench) -> None:
    adapter, other = bench.adapter(), tiny.llava()
    other.model.multi_modal_projector = adapter.model.model.multi_modal_projector
    patch_model(other)


@raises(PatchError, "adapter/patch.py:take_off_adapters", "can't be taken out")
def unpatching_a_sharded_model(bench: Bench) -> None:
    with sharded(bench.adapter().model) as model:
        unpatch_model(model)


@raises(PatchError, "patching/state.py:state_of", "is not patched")
def the_adapter_of_an_unpatched_model(bench: Bench) -> None:
    get_adapter(tiny.llava())


@raises(PatchError, "patching/state.py:AdapterState.model", "only a part of it was kept")
def a_part_of_a_deleted_model(bench: Bench) -> None:
    model = bench.adapter().model
    inner = model.model
    del model
    gc.collect()
    inner(**tiny.token_inputs([0]))


# ------------------------------------------------------------------------------------- several adapters


@raises(PatchError, "adapter/named_adapters.py:_check_addable", "already")
def adding_a_name_that_is_taken(bench: Bench) -> None:
    bench.adapter().add("default")


@raises(PatchError, "adapter/named_adapters.py:_check_addable", "letters, digits and underscores")
def adding_a_name_that_can_be_none(bench: Bench) -> None:
    bench.adapter().add("the-other")


@raises(PatchError, "adapter/named_adapters.py:_check_addable", "letters, digits and underscores")
def adding_a_list_of_names(bench: Bench) -> None:
    bench.adapter().add(["other"])


@raises(PatchError, "adapter/named_adapters.py:_check_addable", "sharded by FSDP")
def adding_to_a_sharded_model(bench: Bench) -> None:
    adapter = bench.adapter()
    with sharded(adapter.model):
        adapter.add("other")


@raises(PatchError, "adapter/named_adapters.py:_known", "has no adapter")
def activating_an_adapter_that_is_not_there(bench: Bench) -> None:
    bench.adapter().set_active(3)


@raises(PatchError, "adapter/named_adapters.py:_known", "has no adapter")
def removing_an_adapter_that_is_not_there(bench: Bench) -> None:
    bench.adapter().remove(["other"])


@raises(PatchError, "adapter/named_adapters.py:remove", "is the active adapter")
def removing_the_active_adapter(bench: Bench) -> None:
    bench.adapter().remove("default")


@raises(InstructionError, "patching/state.py:AdapterState.named_instruction", "call set_adapter() before")
def another_adapter_within_an_instruction(bench: Bench) -> None:
    adapter = bench.adapter().add("other")
    with adapter.instruction("is there a cat?"):
        adapter.set_active("other").model(**question())


# ---------------------------------------------------------------------------------------------- training


@raises(ConfigError, "modules/trainability.py:check_rate", "must be a number")
def a_text_for_the_learning_rate(bench: Bench) -> None:
    bench.adapter().parameter_groups(lr="1e-3")


@raises(ConfigError, "modules/trainability.py:check_rate", "must be a number")
def a_learning_rate_below_zero(bench: Bench) -> None:
    bench.adapter().parameter_groups(1e-3, projector_lr=-1e-5)


@raises(PatchError, "patching/trainable_parameters.py:train_only", "wrapped by PEFT")
def training_a_projector_that_peft_trains(bench: Bench) -> None:
    patch_model(get_peft_model(tiny.llava(), ON_THE_PROJECTOR)).train_only(projector=True)


@raises(PatchError, "adapter/peft.py:_keep_adapters_and_own_projectors", "PEFT would wrap the projector")
def a_lora_on_a_trained_projector(bench: Bench) -> None:
    get_peft_model(bench.adapter().train_only(projector=True).model, ON_THE_PROJECTOR)


@raises(PatchError, "patching/trainable_parameters.py:_check_projector_trainable", "are quantized")
def training_a_projector_of_integers(bench: Bench) -> None:
    adapter = bench.adapter()
    linear = adapter.model.model.multi_modal_projector.linear_1
    linear.weight = torch.nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    adapter.train_only(projector=True)


@raises(ConfigError, "patching/trainable_parameters.py:regroup", "has made no step")
def regrouping_an_optimizer_that_a_scheduler_knows(bench: Bench) -> None:
    adapter = bench.adapter()
    optimizer = torch.optim.AdamW(adapter.parameters())
    torch.optim.lr_scheduler.LinearLR(optimizer)
    adapter.regroup(optimizer, 1e-3)


@raises(PatchError, "patching/projectors.py:give_own_projectors", "FSDP has sharded the projector")
def training_a_sharded_projector(bench: Bench) -> None:
    adapter = bench.adapter()
    with sharded(adapter.model):
        adapter.train_only(projector=True)


@raises(PatchError, "patching/projectors.py:_copy_of", "is offloaded")
def training_an_offloaded_projector(bench: Bench) -> None:
    adapter = bench.adapter()
    cpu_offload(adapter.model, execution_device=torch.device("cpu"))
    adapter.train_only(projector=True)


# ------------------------------------------------------------------------------------------ other tools


@raises(PatchError, "patching/setup_checks.py:check_in_place", "is not the one that was patched")
def a_projector_that_was_replaced(bench: Bench) -> None:
    model = bench.adapter().model
    model.model.multi_modal_projector = tiny.llava().model.multi_modal_projector
    model(**question())


@raises(PatchError, "patching/setup_checks.py:check_in_place", "was wrapped in a")
def a_projector_in_a_wrapper_of_ones_own(bench: Bench) -> None:
    class Wrapper(nn.Module):
        def __init__(self, base_layer: nn.Module) -> None:
            super().__init__()
            self.base_layer = base_layer

    model = bench.adapter().model
    model.model.multi_modal_projector = Wrapper(model.model.multi_modal_projector)
    model(**question())


@raises(PatchError, "patching/sites.py:alignment_at", "was replaced after patch_model")
def a_layer_that_held_the_adapter(bench: Bench) -> None:
    from tests.support.remote_llava import llava_original

    adapter = patch_model(llava_original())
    projector = adapter.model.get_model().mm_projector
    projector[0] = nn.Linear(projector[0].in_features, projector[0].out_features)
    list(adapter.parameters())


@raises(PatchError, "patching/setup_checks.py:check_wrapped_once_patched", "sharded on its own")
def an_adapter_that_was_sharded_alone(bench: Bench) -> None:
    adapter = bench.adapter()
    with sharded(adapter.model, adapter.alignment):
        adapter.model(**question())


@raises(
    PatchError, "patching/setup_checks.py:check_wrapped_once_patched", "after it was wrapped in DistributedDataParallel"
)
def a_model_that_was_wrapped_before_it_was_patched(bench: Bench) -> None:
    model = tiny.llava()
    with data_parallel(model) as wrapped:
        patch_model(model)
        wrapped(**question(), instruction=torch.tensor([[5, 6]]))


@raises(PatchError, "adapter/handle.py:EmmaAdapter.instruction", "embeddings are sharded")
def a_named_instruction_for_a_sharded_model(bench: Bench) -> None:
    adapter = bench.adapter()
    with sharded(adapter.model), adapter.instruction("is there a cat?"):
        pass


@raises(PatchError, "adapter/loading.py:load_adapter", "sharded by FSDP")
def loading_into_a_sharded_model(bench: Bench) -> None:
    folder = bench.saved()
    with sharded(tiny.llava()) as model:
        load_adapter(model, folder)


@raises(PatchError, "modules/sharding.py:gather", "are not in this process")
def saving_weights_that_are_elsewhere(bench: Bench) -> None:
    adapter = bench.adapter()
    adapter.alignment.to("meta")
    adapter.save_pretrained(bench.folder)
