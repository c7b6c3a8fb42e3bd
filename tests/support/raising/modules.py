"""Errors of the parts that can be used on their own: configs, the alignment, fusions and kernels."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from emma_adapter import (
    ConfigError,
    EmmaAlignment,
    EmmaConfig,
    Fusion,
    KernelError,
    Packing,
    ShapeError,
    load_adapter,
    register_fusion,
)

from .triggers import Bench, question, raises

SIZES = {"visual_dim": 8, "instruction_dim": 6}
FIXED = {**SIZES, "num_visual_tokens": 4, "max_instruction_tokens": 5}
VISUAL, INSTRUCTION = torch.ones(2, 4, 8), torch.ones(2, 3, 6)


def alignment(**changes) -> EmmaAlignment:
    return EmmaAlignment(EmmaConfig(**{**SIZES, **changes}))


# ----------------------------------------------------------------------------------------------- configs


@raises(ConfigError, "alignment/config.py:EmmaConfig.__post_init__", "a multiple of num_heads")
def an_inner_width_that_heads_can_not_share(bench: Bench) -> None:
    EmmaConfig(inner_dim=10, num_heads=4)


@raises(ConfigError, "alignment/config.py:EmmaConfig.__post_init__", "at most num_visual_tokens")
def a_rank_above_the_number_of_visual_tokens(bench: Bench) -> None:
    EmmaConfig(fusion="linear", rank=9, num_visual_tokens=4)


@raises(ConfigError, "alignment/config.py:EmmaConfig.__post_init__", "True or False")
def a_text_for_a_switch(bench: Bench) -> None:
    EmmaConfig(align_deepstack="yes")


@raises(ConfigError, "alignment/config.py:EmmaConfig.__post_init__", "a non-empty string")
def an_encoder_without_a_name(bench: Bench) -> None:
    EmmaConfig(instruction_encoder="")


@raises(ConfigError, "alignment/config.py:EmmaConfig.from_dict", "must be a JSON object")
def a_config_from_a_list(bench: Bench) -> None:
    EmmaConfig.from_dict(["linear"])


@raises(ConfigError, "alignment/config.py:EmmaConfig.from_dict", "unknown config field")
def a_config_field_that_does_not_exist(bench: Bench) -> None:
    EmmaConfig.from_dict({"fuzion": "linear"})


@raises(ConfigError, "alignment/config.py:EmmaConfig.from_json", "must be JSON")
def a_config_that_is_cut_off(bench: Bench) -> None:
    EmmaConfig.from_json('{"fusion": ')


@raises(ConfigError, "alignment/config.py:EmmaConfig._require_int", "an integer >=")
def a_fraction_for_a_size(bench: Bench) -> None:
    EmmaConfig(visual_dim=1.5)


@raises(ConfigError, "alignment/config.py:EmmaConfig._require_text", "one of")
def a_fusion_that_does_not_exist(bench: Bench) -> None:
    EmmaConfig(fusion="addition")


@raises(ConfigError, "alignment/config.py:EmmaConfig._require_text", "one of")
def a_kernel_that_does_not_exist(bench: Bench) -> None:
    load_adapter(bench.adapter().model, bench.saved(), kernel="fast")


@raises(ConfigError, "alignment/config.py:EmmaConfig._check_grid", "two integers")
def a_grid_of_three_sides(bench: Bench) -> None:
    EmmaConfig(visual_grid=(2, 2, 2))


@raises(ConfigError, "alignment/config.py:EmmaConfig._check_grid", "num_visual_tokens")
def a_grid_of_another_number_of_tokens(bench: Bench) -> None:
    EmmaConfig(visual_grid=(2, 2), num_visual_tokens=5)


@raises(ConfigError, "alignment/config.py:EmmaConfig._check_fusion_options", "a mapping")
def a_list_of_fusion_options(bench: Bench) -> None:
    EmmaConfig(fusion_options=["scale"])


@raises(ConfigError, "alignment/config.py:EmmaConfig._json_value", "levels deep")
def fusion_options_without_an_end(bench: Bench) -> None:
    nested: dict = {}
    nested["again"] = nested
    EmmaConfig(fusion_options=nested)


@raises(ConfigError, "alignment/config.py:EmmaConfig._require_int", "an integer <=")
def a_size_beyond_all_memory(bench: Bench) -> None:
    EmmaConfig(visual_dim=2**40)


@raises(ConfigError, "alignment/config.py:EmmaConfig.__post_init__", "characters")
def a_book_for_an_encoder(bench: Bench) -> None:
    EmmaConfig(instruction_encoder="a" * 5000)


@raises(ConfigError, "alignment/config.py:EmmaConfig._check_fusion_options", "4300 digits")
def a_fusion_option_of_many_digits(bench: Bench) -> None:
    EmmaConfig(fusion_options={"scale": 10**5000})


@raises(ConfigError, "alignment/config.py:EmmaConfig._check_fusion_options", "characters in the config file")
def fusion_options_that_fill_the_file(bench: Bench) -> None:
    EmmaConfig(fusion_options={"text": "a" * 2**20})


@raises(ConfigError, "alignment/config.py:EmmaConfig._json_value", "infinities")
def an_infinite_fusion_option(bench: Bench) -> None:
    EmmaConfig(fusion_options={"scale": float("inf")})


@raises(ConfigError, "alignment/config.py:EmmaConfig._json_value", "made of JSON values$")
def a_fusion_option_that_json_does_not_know(bench: Bench) -> None:
    EmmaConfig(fusion_options={"scale": {1, 2}})


# --------------------------------------------------------------------------------------------- alignment


@raises(ConfigError, "alignment/module.py:EmmaAlignment.__init__", "is built from an EmmaConfig")
def an_alignment_from_a_dict(bench: Bench) -> None:
    EmmaAlignment(SIZES)


@raises(ConfigError, "alignment/module.py:EmmaAlignment.__init__", "must be given")
def an_alignment_without_sizes(bench: Bench) -> None:
    EmmaAlignment(EmmaConfig())


@raises(ShapeError, "alignment/module.py:EmmaAlignment.forward", "should be the (height, width)")
def a_grid_of_another_image(bench: Bench) -> None:
    alignment()(VISUAL, INSTRUCTION, grid=(2, 3))


@raises(ShapeError, "alignment/module.py:EmmaAlignment.forward", "should be the (height, width)")
def a_number_for_a_grid(bench: Bench) -> None:
    alignment()(VISUAL, INSTRUCTION, grid=4)


@raises(ShapeError, "alignment/module.py:EmmaAlignment._check", "must be a tensor")
def visual_tokens_in_a_list(bench: Bench) -> None:
    alignment()(VISUAL.tolist(), INSTRUCTION)


@raises(ShapeError, "alignment/module.py:EmmaAlignment._check", "visual_tokens must be {shape}")
def visual_tokens_of_another_width(bench: Bench) -> None:
    alignment()(torch.ones(2, 4, 9), INSTRUCTION)


@raises(ShapeError, "alignment/module.py:EmmaAlignment._check", "must be floating-point")
def visual_tokens_that_are_integers(bench: Bench) -> None:
    alignment()(VISUAL.long(), INSTRUCTION)


@raises(ShapeError, "alignment/module.py:EmmaAlignment._check", "instruction_tokens must be")
def instruction_tokens_of_another_width(bench: Bench) -> None:
    alignment()(VISUAL, torch.ones(2, 3, 7))


@raises(ShapeError, "alignment/module.py:EmmaAlignment._check", "the same batch size")
def two_images_for_three_instructions(bench: Bench) -> None:
    alignment()(VISUAL, torch.ones(3, 3, 6))


@raises(ShapeError, "alignment/module.py:EmmaAlignment._check", "instruction_mask must be")
def a_mask_of_another_length(bench: Bench) -> None:
    alignment()(VISUAL, INSTRUCTION, torch.ones(2, 4))


@raises(ShapeError, "alignment/module.py:_check_packing", "must be an emma_adapter.Packing")
def a_number_for_a_packing(bench: Bench) -> None:
    alignment()(VISUAL[0], INSTRUCTION, packing=4)


@raises(ShapeError, "alignment/module.py:_check_packing", "announces")
def a_packing_of_more_tokens(bench: Bench) -> None:
    alignment()(VISUAL[0], INSTRUCTION, packing=Packing([(2, 3)], torch.tensor([0])))


@raises(ShapeError, "alignment/module.py:_check_packing", "must name the instruction of")
def a_packing_of_one_image_with_two_rows(bench: Bench) -> None:
    alignment()(VISUAL[0], INSTRUCTION, packing=Packing([(2, 2)], torch.tensor([0, 1])))


@raises(ShapeError, "alignment/module.py:_check_packing", "must name instructions from 0")
def a_packing_with_a_row_that_does_not_exist(bench: Bench) -> None:
    alignment()(VISUAL[0], INSTRUCTION, packing=Packing([(2, 2)], torch.tensor([2])))


# ----------------------------------------------------------------------------------------------- fusions


@raises(ConfigError, "alignment/fusion/base.py:register_fusion", "the name of a fusion")
def a_fusion_registered_without_a_name(bench: Bench) -> None:
    register_fusion(Fusion)


@raises(ConfigError, "alignment/fusion/base.py:register_fusion.register", "a subclass of emma_adapter.Fusion")
def a_fusion_that_is_a_function(bench: Bench) -> None:
    register_fusion("mine")(lambda config: None)


@raises(ConfigError, "alignment/fusion/base.py:register_fusion.register", "registered already")
def a_fusion_whose_name_is_taken(bench: Bench) -> None:
    @register_fusion("linear")
    class Mine(Fusion):
        pass


@raises(ConfigError, "alignment/fusion/base.py:Fusion.use_kernel", "has no Triton kernel")
def a_kernel_for_a_fusion_without_one(bench: Bench) -> None:
    from tests.support.tiny import BufferedFusion

    BufferedFusion(EmmaConfig(**SIZES)).use_kernel(EmmaConfig(**SIZES, kernel="triton"))


@raises(ConfigError, "alignment/fusion/linear.py:LinearFusion.__init__", "its weights have that size")
def a_linear_fusion_without_a_number_of_visual_tokens(bench: Bench) -> None:
    alignment(fusion="linear")


@raises(ShapeError, "alignment/fusion/linear.py:LinearFusion.forward", "reads at most")
def more_instruction_tokens_than_a_linear_fusion_has_columns(bench: Bench) -> None:
    alignment(fusion="linear", **FIXED)(VISUAL, torch.ones(2, 6, 6))


@raises(ShapeError, "alignment/fusion/linear.py:LinearFusion._own_grid", "without EmmaConfig.visual_grid")
def another_grid_for_a_linear_fusion_that_knows_none(bench: Bench) -> None:
    alignment(fusion="linear", **FIXED)(torch.ones(2, 6, 8), INSTRUCTION, grid=(2, 3))


@raises(ShapeError, "alignment/fusion/linear.py:LinearFusion._own_grid", "was made for")
def more_visual_tokens_than_a_linear_fusion_was_made_for(bench: Bench) -> None:
    alignment(fusion="linear", **FIXED)(torch.ones(2, 6, 8), INSTRUCTION)


@raises(ShapeError, "alignment/fusion/cross_attention.py:CrossAttention.positions", "learned positions")
def more_visual_tokens_than_positions(bench: Bench) -> None:
    alignment(**FIXED)(torch.ones(2, 6, 8), INSTRUCTION)


@raises(ShapeError, "alignment/fusion/cross_attention.py:CrossAttention.positions", "without EmmaConfig.visual_grid")
def another_grid_for_positions_without_one(bench: Bench) -> None:
    alignment(**FIXED)(torch.ones(2, 6, 8), INSTRUCTION, grid=(2, 3))


# ----------------------------------------------------------------------------------------------- kernels


@raises(KernelError, "alignment/fusion/dispatch.py:Dispatch.takes_triton", "can't run fusion=")
def triton_on_the_cpu(bench: Bench) -> None:
    bench.adapter(EmmaConfig(kernel="triton")).model(**question())


def token_mixing(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
    pytest.importorskip("triton")
    from emma_adapter.kernels.token_mixing import token_mixing as kernel

    x, projected, *weights = (torch.ones(shape) for shape in shapes)
    kernel(x, projected.to(dtype), *weights)


@raises(ShapeError, "kernels/token_mixing/op.py:token_mixing", "must be [B, N, D]")
def token_mixing_without_a_batch(bench: Bench) -> None:
    token_mixing((4, 16), (2, 3, 16), (4, 4), (4, 3), (4,))


@raises(ShapeError, "kernels/token_mixing/op.py:token_mixing", "should be")
def token_mixing_with_a_bias_too_long(bench: Bench) -> None:
    token_mixing((2, 4, 16), (2, 3, 16), (4, 4), (4, 3), (5,))


@raises(ShapeError, "kernels/token_mixing/op.py:token_mixing", "the same dtype")
def token_mixing_of_two_dtypes(bench: Bench) -> None:
    token_mixing((2, 4, 16), (2, 3, 16), (4, 4), (4, 3), (4,), dtype=torch.bfloat16)


@raises(KernelError, "kernels/token_mixing/op.py:token_mixing", "{reason}")
def token_mixing_on_the_cpu(bench: Bench) -> None:
    token_mixing((2, 4, 16), (2, 3, 16), (4, 4), (4, 3), (4,))


def cross_attention(bench: Bench | None = None, **changes) -> None:
    """With a bench, as if there were a GPU: shapes are looked at before anything is launched."""
    pytest.importorskip("triton")
    from emma_adapter.kernels.cross_attention import op

    if bench is not None:
        bench.monkeypatch.setattr(op, "unsupported_reason", lambda *args: None)
    norm = nn.LayerNorm(16)
    query, output = nn.Linear(16, 32), nn.Linear(32, 16)
    arguments = {
        "visual_tokens": torch.ones(2, 4, 16),
        "key": torch.ones(2, 3, 32),
        "value": torch.ones(2, 3, 32),
        "key_mask": None,
        "num_heads": 2,
        "norm_weight": norm.weight,
        "norm_bias": norm.bias,
        "query_weight": query.weight,
        "query_bias": query.bias,
        "output_weight": output.weight,
        "output_bias": output.bias,
    }
    op.cross_attention(**{**arguments, **changes})


IN_CROSS_ATTENTION = "kernels/cross_attention/op.py:cross_attention"


@raises(ConfigError, IN_CROSS_ATTENTION, "epilogue must be")
def an_epilogue_that_does_not_exist(bench: Bench) -> None:
    cross_attention(epilogue="subtract")


@raises(ShapeError, IN_CROSS_ATTENTION, "visual_tokens must be [S, N, D]")
def cross_attention_without_segments(bench: Bench) -> None:
    cross_attention(visual_tokens=torch.ones(4, 16))


@raises(ShapeError, IN_CROSS_ATTENTION, "at least one key")
def cross_attention_without_a_key(bench: Bench) -> None:
    cross_attention(key=torch.ones(2, 0, 32))


@raises(KernelError, IN_CROSS_ATTENTION, "{reason}")
def cross_attention_on_the_cpu(bench: Bench) -> None:
    cross_attention()


@raises(ShapeError, IN_CROSS_ATTENTION, "at least one segment")
def cross_attention_over_no_segment(bench: Bench) -> None:
    cross_attention(bench, visual_tokens=torch.ones(4, 16), cu_seqlens=torch.tensor([0]))


@raises(ShapeError, IN_CROSS_ATTENTION, "need instruction_rows")
def cross_attention_of_two_segments_with_three_instructions(bench: Bench) -> None:
    cross_attention(bench, key=torch.ones(3, 3, 32), value=torch.ones(3, 3, 32))


@raises(ShapeError, IN_CROSS_ATTENTION, "need as many positions")
def cross_attention_with_too_few_positions(bench: Bench) -> None:
    cross_attention(bench, position=torch.ones(3, 32))


@raises(ShapeError, IN_CROSS_ATTENTION, "{name} must be")
def cross_attention_with_values_of_another_shape(bench: Bench) -> None:
    cross_attention(bench, value=torch.ones(2, 4, 32))


@raises(ShapeError, IN_CROSS_ATTENTION, "cast_weights must have the dtype")
def weights_cast_to_another_dtype(bench: Bench) -> None:
    cross_attention(bench, cast_weights=torch.ones(2, 512, dtype=torch.float16))


@raises(ShapeError, "kernels/cross_attention/instruction.py:keys_and_values", "{name} must be")
def keys_of_a_mask_of_another_length(bench: Bench) -> None:
    pytest.importorskip("triton")
    from emma_adapter.kernels.cross_attention import keys_and_values

    norm, key, value = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(8, 16)
    query, output = nn.Linear(4, 16), nn.Linear(16, 4)
    keys_and_values(
        torch.ones(2, 3, 8),
        torch.ones(2, 4, dtype=torch.bool),
        norm_weight=norm.weight,
        norm_bias=norm.bias,
        key_weight=key.weight,
        value_weight=value.weight,
        value_bias=value.bias,
        query_weight=query.weight,
        output_weight=output.weight,
    )


@raises(KernelError, "kernels/launch.py:refuse_forward_mode", "forward-mode")
def a_forward_mode_derivative(bench: Bench) -> None:
    with forward_ad.dual_level():
        cross_attention(visual_tokens=forward_ad.make_dual(torch.ones(2, 4, 16), torch.ones(2, 4, 16)))
