"""Errors about MoDA's module, its checkpoints, and what is aligned behind the projector."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import save_file

from emma_adapter import CheckpointError, ConfigError, EmmaAlignment, EmmaConfig, RoutingError
from emma_adapter.models.families import MediaLayout
from emma_adapter.models.projected_tokens import projected_layout

from .triggers import Bench, raises


@raises(RoutingError, "models/projected_tokens.py:projected_layout", "projector_merge()")
def a_projector_that_mixes_its_images(bench: Bench) -> None:
    projected_layout(MediaLayout(tokens=[4, 4], entries=[1, 1]), 1, torch.zeros(1, 8, 3))


def fusion(**changes: Any) -> None:
    EmmaAlignment(EmmaConfig.moda(**{"visual_dim": 8, "instruction_dim": 8, "num_heads": 2, **changes}))


@raises(ConfigError, "alignment/fusion/moda.py:ModaFusion.__init__", "of one width")
def tokens_of_two_widths(bench: Bench) -> None:
    fusion(instruction_dim=16)


@raises(ConfigError, "alignment/fusion/moda.py:ModaFusion.__init__", "EmmaConfig.num_heads is")
def heads_that_do_not_divide_the_channels(bench: Bench) -> None:
    fusion(num_heads=16)


@raises(ConfigError, "alignment/fusion/moda.py:_options", "has no option(s)")
def an_option_that_moda_does_not_have(bench: Bench) -> None:
    fusion(fusion_options={"layers": 2})


@raises(ConfigError, "alignment/fusion/moda.py:_options", "of moda must be from")
def no_layers(bench: Bench) -> None:
    fusion(fusion_options={"num_layers": 0})


def moda(bench: Bench, config: str | None = None, **changes: Any) -> None:
    """A module of one layer of 4 channels, some of it changed, or if None left out."""
    pairs = [(f"{short}_{part}", (4, 4)) for short in ("sa", "ca") for part in ("q", "k", "v", "out")]
    shapes: list[tuple[str, tuple[int, ...]]] = [*pairs, ("ff1", (2, 4)), ("ff2", (4, 2))]
    shapes += [(f"norm{number}", (4,)) for number in (1, 2, 3)]
    made = {f"layers.0.{name}.weight": torch.ones(shape) for name, shape in shapes}
    made |= {f"layers.0.{name}.bias": torch.ones(shape[0]) for name, shape in shapes}
    made |= {"mask_head.weight": torch.ones(4, 4)}
    made |= {name.replace("__", "."): value for name, value in changes.items()}
    bench.folder.joinpath("moda").mkdir()
    tensors = {f"moda_adapter.{name}": value for name, value in made.items() if value is not None}
    save_file(tensors, bench.folder / "moda" / "model.safetensors")
    if config is not None:
        (bench.folder / "moda" / "config.json").write_text(config)
    EmmaAlignment.from_moda(bench.folder / "moda")


@raises(CheckpointError, "alignment/moda_weights.py:read_moda", "lacks its mask_head")
def a_moda_without_its_mask(bench: Bench) -> None:
    moda(bench, mask_head__weight=None)


@raises(CheckpointError, "alignment/moda_weights.py:read_moda", "{error}")
def a_moda_without_heads(bench: Bench) -> None:
    moda(bench, '{"moda_num_heads": 0}')


@raises(CheckpointError, "alignment/module.py:EmmaAlignment.from_moda", "don't fit each other")
def a_moda_whose_tensors_do_not_fit(bench: Bench) -> None:
    moda(bench, '{"moda_num_heads": 2}', layers__0__ff2__bias=torch.ones(5))


@raises(CheckpointError, "alignment/moda_weights.py:_read", "there are no safetensors")
def a_moda_folder_that_is_empty(bench: Bench) -> None:
    EmmaAlignment.from_moda(bench.folder)


@raises(CheckpointError, "alignment/moda_weights.py:_read", "there is no file")
def a_moda_file_that_does_not_exist(bench: Bench) -> None:
    EmmaAlignment.from_moda(bench.folder / "absent.safetensors")


@raises(CheckpointError, "alignment/moda_weights.py:_read", "holds no module")
def a_file_without_a_moda(bench: Bench) -> None:
    save_file({"lm_head.weight": torch.ones(2)}, bench.folder / "model.safetensors")
    EmmaAlignment.from_moda(bench.folder)


@raises(CheckpointError, "alignment/moda_weights.py:_renamed", "finite floats")
def a_moda_with_nan(bench: Bench) -> None:
    moda(bench, mask_head__weight=torch.full((4, 4), torch.nan))


@raises(CheckpointError, "alignment/moda_weights.py:_renamed", "unknown tensor(s)")
def a_moda_with_something_else(bench: Bench) -> None:
    moda(bench, gate__weight=torch.ones(4))


@raises(CheckpointError, "alignment/moda_weights.py:_heads_in_config", "is not valid JSON")
def a_moda_config_that_is_damaged(bench: Bench) -> None:
    moda(bench, "{")


@raises(CheckpointError, "alignment/moda_weights.py:_heads_in_config", "should be a number")
def a_moda_config_with_words(bench: Bench) -> None:
    moda(bench, '{"moda_num_heads": "two"}')
