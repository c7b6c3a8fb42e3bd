"""Errors of vision experts."""

from __future__ import annotations

import json
from typing import Any

import torch
from accelerate import cpu_offload
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from emma_adapter import (
    CheckpointError,
    ConfigError,
    DataError,
    EmmaVisionExperts,
    PatchError,
    RoutingError,
    UnsupportedModelError,
    add_vision_expert,
    load_vision_experts,
)
from emma_adapter.experts import checkpoint
from emma_adapter.experts.config import VisionExpertsConfig
from tests.support import tiny
from tests.support.remote_internvl import internvl_chat

from .triggers import Bench, question, raises

_CONFIG = "experts/config.py:VisionExpertsConfig"
_TRAINING = "experts/training.py"


def with_expert(name: Any = "stem", *arguments: Any, model: Any = None, **settings: Any) -> EmmaVisionExperts:
    return add_vision_expert(tiny.llava() if model is None else model, name, *arguments, **settings)


# ----------------------------------------------------------------------------------------- adding


@raises(ConfigError, f"{_CONFIG}.__post_init__", "the names of 1 to")
def a_config_without_experts(bench: Bench) -> None:
    VisionExpertsConfig(experts=(), layers=1)


@raises(ConfigError, f"{_CONFIG}.__post_init__", "an expert's name is made of")
def an_expert_called_original(bench: Bench) -> None:
    with_expert("original")


@raises(ConfigError, f"{_CONFIG}.__post_init__", "of that name already")
def an_expert_added_twice(bench: Bench) -> None:
    with_expert(model=with_expert().model)


@raises(ConfigError, f"{_CONFIG}.__post_init__", "layers an integer")
def an_expert_in_no_block(bench: Bench) -> None:
    with_expert("stem", 0)


@raises(ConfigError, f"{_CONFIG}.__post_init__", "margin a number")
def a_margin_that_no_probability_exceeds(bench: Bench) -> None:
    with_expert().margin = 1.0


@raises(ConfigError, f"{_CONFIG}.from_dict", "a config of vision experts is an object")
def a_list_for_a_config_of_experts(bench: Bench) -> None:
    VisionExpertsConfig.from_dict([])  # type: ignore[arg-type]


@raises(ConfigError, "experts/attaching.py:add_vision_expert", "all share a router")
def a_second_expert_in_other_blocks(bench: Bench) -> None:
    with_expert("maps", 2, model=with_expert("stem", 1).model)


@raises(PatchError, "experts/attaching.py:wrappable", "never learn of the experts' parameters")
def an_expert_inside_a_wrapper(bench: Bench) -> None:
    with_expert(model=AveragedModel(tiny.llava()))


@raises(ConfigError, "experts/tower.py:routed_blocks", "of the vision tower that the model uses")
def an_expert_in_more_blocks_than_are_used(bench: Bench) -> None:
    with_expert("stem", 3)


@raises(UnsupportedModelError, "experts/tower.py:used_blocks", "stacks of blocks with an MLP")
def an_expert_of_a_tower_without_blocks(bench: Bench) -> None:
    model = tiny.llava()
    model.model.vision_tower = nn.Identity()
    with_expert(model=model)


@raises(PatchError, "experts/tower.py:base_parameters", "experts begin as copies of them")
def an_expert_of_an_offloaded_tower(bench: Bench) -> None:
    with_expert(model=cpu_offload(tiny.llava()))


@raises(UnsupportedModelError, "experts/tower.py:base_parameters", "of the vision tower is quantized")
def an_expert_of_a_quantized_tower(bench: Bench) -> None:
    model = tiny.llava()
    layer = model.model.vision_tower.encoder.layers[1].mlp.fc1
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with_expert(model=model)


@raises(PatchError, "experts/state.py:experts_state", "has no vision experts")
def a_handle_on_a_model_without_experts(bench: Bench) -> None:
    EmmaVisionExperts(tiny.llava())


# ----------------------------------------------------------------------------------------- calls


@raises(RoutingError, "experts/routes.py:require_call", "the vision tower was called by itself")
def a_vision_tower_with_experts_called_by_itself(bench: Bench) -> None:
    with_expert().model.model.vision_tower(question()["pixel_values"])


@raises(PatchError, "experts/module.py:require_here", "weights of vision experts are sharded")
def experts_that_are_offloaded(bench: Bench) -> None:
    cpu_offload(with_expert().model)(**question())


# ----------------------------------------------------------------------------------------- training


@raises(ConfigError, f"{_TRAINING}:train_only", "train one thing at a time")
def an_expert_trained_with_the_router(bench: Bench) -> None:
    with_expert().train_only("stem", router=True)


@raises(ConfigError, f"{_TRAINING}:require_expert", "there is no expert")
def training_an_expert_that_is_not_there(bench: Bench) -> None:
    with_expert().train_only("maps")


@raises(ConfigError, f"{_TRAINING}:router_loss", "labels are names of")
def a_label_that_no_expert_has(bench: Bench) -> None:
    with_expert().router_loss(labels=["maps"], **question())


@raises(DataError, f"{_TRAINING}:router_loss", "labels for")
def more_labels_than_images(bench: Bench) -> None:
    with_expert().router_loss(labels=["stem", "stem"], **question())


@raises(UnsupportedModelError, f"{_TRAINING}:router_loss", "has no get_image_features")
def a_router_of_a_class_of_its_own(bench: Bench) -> None:
    with_expert("stem", 1, model=internvl_chat()).router_loss(labels=["stem"], pixel_values=torch.zeros(1, 3, 32, 32))


@raises(ConfigError, "modules/trainability.py:check_rate", "of parameter_groups must be a number >= 0")
def an_expert_trained_at_a_negative_rate(bench: Bench) -> None:
    with_expert().parameter_groups(-1.0)


# ----------------------------------------------------------------------------------------- files


def described(bench: Bench, **config: Any) -> None:
    """Load experts whose config, in both files, has other values."""
    with_expert().save_pretrained(bench.folder)
    weights = bench.folder / checkpoint.WEIGHTS_NAME
    with safe_open(weights, framework="pt") as file:
        written = json.loads(file.metadata()[checkpoint.FORMAT.name])
    written["config"] |= config
    save_file(load_file(weights), weights, {checkpoint.FORMAT.name: json.dumps(written)})
    (bench.folder / checkpoint.CONFIG_NAME).write_text(json.dumps(written))
    load_vision_experts(tiny.llava(), bench.folder)


@raises(CheckpointError, "experts/checkpoint.py:describe", "{error}; download or copy it again")
def experts_with_a_margin_that_is_a_text(bench: Bench) -> None:
    described(bench, margin="wide")


@raises(CheckpointError, "experts/loading.py:load_vision_experts", "load it into the model it was made for")
def experts_of_a_larger_tower(bench: Bench) -> None:
    described(bench, layers=20)


@raises(PatchError, "experts/loading.py:load_vision_experts", "has vision experts already")
def loading_experts_beside_others(bench: Bench) -> None:
    load_vision_experts(with_expert().model, bench.folder)
