"""The places of experts: the blocks of a vision tower that the model uses, and the MLP of each."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError, PatchError, UnsupportedModelError
from ..modules import sharding
from ..modules.views import SEPARATOR, base_parts, is_linear, is_quantized

#: The names that configs give to the layer whose output the projector gets, counted as in ``hidden_states``.
_FEATURE_LAYERS = ("vision_feature_layer", "vision_feature_layers", "select_layer", "mm_vision_select_layer")


def routed_blocks(model: Any, inner: nn.Module, layers: int) -> list[tuple[nn.Module, nn.Module]]:
    """Return the last ``layers`` blocks of the vision tower that the model uses, in order, each with its MLP.

    Raises:
        UnsupportedModelError: if there is no tower of such blocks.
        ConfigError: if the model uses fewer.
    """
    blocks = used_blocks(model, inner)
    if layers > len(blocks):
        raise ConfigError(
            f"layers={layers} is more than the {len(blocks)} blocks of the vision tower that the model uses: ask for "
            "fewer"
        )
    return [(block, _require_mlp(block)) for block in blocks[len(blocks) - layers :]]


def used_blocks(model: Any, inner: nn.Module) -> list[nn.Module]:
    """Return the blocks of the vision tower whose output reaches the projector.

    Raises:
        UnsupportedModelError: if there isn't exactly one stack of blocks beside the language model's.
    """
    stacks = list(_stacks(inner, model.get_input_embeddings()))
    if len(stacks) != 1:
        raise UnsupportedModelError(
            f"{type(inner).__name__} has {len(stacks)} stacks of blocks with an MLP beside the language model's, and "
            "vision experts need exactly one, the vision tower: use a model with a tower such as CLIP's, SigLIP's, or "
            "that of Qwen-VL, InternVL or Pixtral"
        )
    [blocks] = stacks
    layers = next((value for name in _FEATURE_LAYERS if (value := _config_of(inner, name)) is not None), -1)
    # hidden_states begin with the embeddings.
    states = len(blocks) + 1
    return list(blocks)[: max(layer % states for layer in ([layers] if isinstance(layers, int) else layers))]


def _config_of(inner: Any, name: str) -> Any:
    return getattr(inner.config, name, None)


def _stacks(module: nn.Module, embeddings: nn.Module) -> Iterator[nn.ModuleList]:
    is_decoder = any(child is embeddings for child in module.children())
    for child in module.children():
        if not isinstance(child, nn.ModuleList):
            yield from _stacks(child, embeddings)
        elif not is_decoder and len(child) and all(len(_mlps(block)) == 1 for block in child):
            yield child


def _mlps(block: nn.Module) -> list[nn.Module]:
    return [child for child in block.children() if _is_mlp(child)]


def _require_mlp(block: nn.Module) -> nn.Module:
    [mlp] = _mlps(block)
    return mlp


def _is_mlp(module: nn.Module) -> bool:
    """Return whether a module takes nothing but tokens, and widens and narrows them again by linear layers."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    linears = [part for _, part in base_parts(module) if is_linear(part)]
    widths = {linear.in_features for linear in linears}
    return len(named) == 1 and len(linears) > 1 and widths == {linear.out_features for linear in linears}


def token_width(mlp: nn.Module) -> int:
    """Return the width D of the tokens ``[..., D]`` that an MLP takes."""
    first: Any = next(part for _, part in base_parts(mlp) if is_linear(part))
    return int(first.in_features)


def base_parameters(mlp: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of an MLP that an expert copies, by path, without a LoRA's.

    Raises:
        PatchError: if they are not in this process.
        UnsupportedModelError: if they are quantized.
    """
    parameters: dict[str, Tensor] = {}
    for path, module in base_parts(mlp):
        for name, value in module.named_parameters(recurse=False):
            if sharding.is_elsewhere(value):
                raise PatchError(
                    "weights of the vision tower are sharded (tensor parallel, FSDP, ZeRO-3) or offloaded, and experts "
                    "begin as copies of them: add or load experts first, then shard; don't offload the vision tower"
                )
            if is_quantized(module, value):
                raise UnsupportedModelError(
                    f"{'.'.join((*path, name))} of the vision tower is quantized ({type(module).__name__}), and an "
                    "expert needs a copy that can be trained: leave the tower in 16 bits, as "
                    'BitsAndBytesConfig(llm_int8_skip_modules=["lm_head", "model.visual"]) does with the part so named'
                )
            parameters[SEPARATOR.join((*path, name))] = value
    return parameters
