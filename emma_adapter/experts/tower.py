"""Where experts sit: the blocks of a vision tower that the model uses, and the MLP of each."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError, PatchError, UnsupportedModelError
from ..modules import sharding
from ..modules.views import SEPARATOR, base_parts, is_linear, is_quantized

#: By which names configs say which layer's output the projector gets, counted as in ``hidden_states``.
_FEATURE_LAYERS = ("vision_feature_layer", "vision_feature_layers", "select_layer", "mm_vision_select_layer")


def routed_blocks(model: Any, inner: nn.Module, layers: int) -> list[tuple[nn.Module, nn.Module]]:
    """Return the last ``layers`` blocks of the vision tower that the model uses, in order, each with its MLP.

    Raises:
        UnsupportedModelError: if there is no tower of such blocks.
        ConfigError: if it uses fewer.
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
        UnsupportedModelError: if it can't be told which these are.
    """
    found = list(_stacks(inner, model.get_input_embeddings()))
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{type(inner).__name__} has {len(found)} stacks of blocks with an MLP beside the language model's, and "
            "vision experts need one, the vision tower: as CLIP's and SigLIP's, and those of Qwen-VL, InternVL and "
            "Pixtral, have"
        )
    [blocks] = found
    chosen = next((value for name in _FEATURE_LAYERS if (value := _config_of(inner, name)) is not None), -1)
    # hidden_states begin with the embeddings.
    states = len(blocks) + 1
    return list(blocks)[: max(layer % states for layer in ([chosen] if isinstance(chosen, int) else chosen))]


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
    """Whether a module takes nothing but tokens, and makes them wider and narrow again."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    linears = [part for _, part in base_parts(module) if is_linear(part)]
    wide = {linear.in_features for linear in linears}
    return len(named) == 1 and len(linears) > 1 and wide == {linear.out_features for linear in linears}


def token_width(mlp: nn.Module) -> int:
    """Return D of the tokens ``[..., D]`` that an MLP takes."""
    first: Any = next(part for _, part in base_parts(mlp) if is_linear(part))
    return int(first.in_features)


def base_parameters(mlp: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of an MLP that an expert has copies of, by path: without a LoRA's.

    Raises:
        PatchError: if they are not in this process.
        UnsupportedModelError: if they are quantized.
    """
    found: dict[str, Tensor] = {}
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
            found[SEPARATOR.join((*path, name))] = value
    return found
