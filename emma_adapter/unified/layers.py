"""The second decoder stack: views of the base's layers with decoupled weights, over a read-only cache of the prompt.

A view shares with the base every tensor that isn't decoupled. It consists of nothing but Python objects, which are made
anew for each loss or drawing; the base is never changed, and other threads may run it meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..modules import private
from ..modules.views import SEPARATOR, base_parts, is_linear, is_quantized, unwrapped, wide

#: The modules of attention that the first layers share with the base.
SHARED_NAMES = ("q_proj", "k_proj", "q_norm", "k_norm")
_DOWN, _UP = "down", "up"
_KNOWN_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}

Parameters = Mapping[str, Tensor]


def text_model_of(inner: Any) -> Any:
    """Return the decoder of a model: a module with ``layers``, ``norm`` and ``embed_tokens``.

    Raises:
        UnsupportedModelError: if it has none, is an encoder-decoder, or has layers of which no second stack can be
            made.
    """
    config: Any = inner.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(inner).__name__} is an encoder-decoder: pictures are drawn against the cache of a decoder that has "
            "read the prompt, so that a decoder-only model is needed, such as Qwen3-VL"
        )
    text: Any = inner.get_decoder() if hasattr(inner, "get_decoder") else None
    # A ForCausalLM model has the decoder as its .model.
    text = text if hasattr(text, "layers") else getattr(text, "model", None)
    if not isinstance(getattr(text, "layers", None), nn.ModuleList) or not hasattr(text, "norm"):
        raise UnsupportedModelError(
            f"{type(inner).__name__} has no decoder with .layers and .norm that a second stack could be made of: use a "
            "model of a family in docs/unified.md"
        )
    if getattr(text.config, "hidden_size_per_layer_input", None):
        raise UnsupportedModelError(
            f"{type(text).__name__} reads an embedding of each token id in every layer "
            "(config.hidden_size_per_layer_input), and the tokens of a picture that is drawn have no ids: use a model "
            "of a family in docs/unified.md"
        )
    types = set(getattr(text.config, "layer_types", None) or ()) - _KNOWN_ATTENTION
    if types or not all(_attention_names(layer) for layer in text.layers):
        raise UnsupportedModelError(
            f"{type(text).__name__} has layers without q_proj, k_proj and v_proj of their own "
            f"({sorted(types) or 'fused, shared, or none'}). A picture is drawn by a second stack, with projections of "
            "its own, that reads the prompt's keys and values; linear attention keeps none. Use a model with ordinary "
            "attention in every layer"
        )
    return text


def _attention_names(layer: nn.Module) -> set[str]:
    """Return the names of a layer's child modules that are attention."""
    return {
        name
        for name, child in layer.named_children()
        if {"q_proj", "k_proj", "v_proj"} <= {part for part, _ in child.named_children()}
    }


def decoupled_parameters(
    layer: nn.Module, decoupling: Literal["full"] | int, *, shares_queries: bool
) -> dict[str, nn.Parameter]:
    """Return new parameters that a layer's view owns, by their path in the layer, on the layer's device.

    Full copies have the base's values and dtype. With a rank r, weights of linear layers become ``down`` ``[r, in]``
    (normal, 1 / sqrt(in)) and ``up`` ``[out, r]`` (zeros), vectors (norms, biases) are copied, and all else, such as
    the experts of a mixture, stays the base's; new parameters are in float32 at least.

    Raises:
        UnsupportedModelError: if full copies are asked for, and weights are quantized.
    """
    attention = _attention_names(layer)
    new_parameters: dict[str, nn.Parameter] = {}
    for path, module in base_parts(layer):
        if shares_queries and len(path) > 1 and path[0] in attention and path[1] in SHARED_NAMES:
            continue
        offloaded_values = private.offloaded_values(module)
        for name, parameter in module.named_parameters(recurse=False):
            value = offloaded_values.get(name, parameter)
            key = SEPARATOR.join((*path, name))
            is_weight = is_linear(module) and name == "weight"
            if decoupling != "full" and is_weight:
                new_parameters |= _low_rank(SEPARATOR.join(path), module, decoupling, value.device)
            elif decoupling == "full" or parameter.ndim < 2:
                if is_quantized(module, parameter):
                    raise UnsupportedModelError(
                        f"{'.'.join((*path, name))} is quantized ({type(module).__name__}) and has no full copy: use "
                        "low-rank ones, UnifiedConfig(decoupling=64), or load the model in bfloat16"
                    )
                dtype = parameter.dtype if decoupling == "full" else wide(parameter.dtype)
                new_parameters[key] = nn.Parameter(value.detach().clone().to(dtype), requires_grad=True)
    return new_parameters


def _low_rank(path: str, module: Any, rank: int, device: torch.device) -> dict[str, nn.Parameter]:
    into, out = module.in_features, module.out_features
    rank = min(rank, into, out)  # a higher rank adds nothing
    down = torch.randn(rank, into, device=device) / into**0.5
    return {
        f"{path}{SEPARATOR}{_DOWN}": nn.Parameter(down),
        f"{path}{SEPARATOR}{_UP}": nn.Parameter(torch.zeros(out, rank, device=device)),
    }


class _LowRank(nn.Module):
    """The map x → base(x) + B·A·x, whose base stays out of the module tree."""

    def __init__(self, base: nn.Module, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self._held = (base, down, up)

    def forward(self, x: Tensor) -> Tensor:
        base, down, up = self._held
        result: Tensor = base(x)
        return result + F.linear(F.linear(x, down), up)


def view(module: nn.Module, parameters: Parameters, dtype: torch.dtype, **attributes: Any) -> nn.Module:
    """Return a view of a module with these parameters, by path, in place of its own.

    Args:
        module: of the base.
        parameters: named as by :func:`decoupled_parameters`; for computation they are cast to ``dtype``.
        dtype: the base's, for computation.
        attributes: of the view itself.
    """
    module = unwrapped(module)
    direct_parameters = {name: value.to(dtype) for name, value in parameters.items() if SEPARATOR not in name}
    down, up = direct_parameters.pop(_DOWN, None), direct_parameters.pop(_UP, None)
    child_parameters: dict[str, dict[str, Tensor]] = {}
    for name, value in parameters.items():
        if SEPARATOR in name:
            child, rest = name.split(SEPARATOR, 1)
            child_parameters.setdefault(child, {})[rest] = value
    children = {name: view(module.get_submodule(name), values, dtype) for name, values in child_parameters.items()}
    result = private.view_of(module, children, direct_parameters, **attributes)
    if any(value.is_meta for value in result._parameters.values() if value is not None):
        result.__dict__["forward"] = partial(_run_offloaded, module, children, direct_parameters, attributes)
    return result if down is None or up is None else _LowRank(result, down, up)


def _run_offloaded(
    module: nn.Module,
    children: dict[str, nn.Module],
    parameters: dict[str, Tensor],
    attributes: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run a view of a module whose parameters accelerate's hooks load only for the module's own calls."""
    loaded = private.view_of(module, children, private.offloaded_values(module) | parameters, **attributes)
    return loaded(*args, **kwargs)


def generation_view(
    text: nn.Module, layers: Sequence[Parameters], norm: Parameters, dtype: torch.dtype, *, training: bool | None = None
) -> nn.Module:
    """Return the decoder stack of the generation branch, a text model of the same class as ``text``.

    Its attention is eager if the base's is, and else PyTorch's ``scaled_dot_product_attention``: it needs masks that
    FlashAttention and FlexAttention don't take.

    Args:
        text: the base's.
        layers: the parameters of each layer.
        norm: those of the final norm.
        dtype: the base's, for computation.
        training: as in ``module.train(…)``; None: as in the base.
    """
    base: Any = text
    eager = private.attention_of(base.config) == "eager"
    config = private.with_attention(base.config, "eager" if eager else "sdpa")
    mode = {} if training is None else {"training": training}
    layer_views = []
    for layer, parameters in zip(base.layers, layers, strict=True):
        layer_view = view(layer, parameters, dtype)
        attention = {
            name: private.view_of(layer_view.get_submodule(name), {}, {}, config=config, **mode)
            for name in _attention_names(layer)
        }
        layer_views.append(private.view_of(layer_view, attention, {}, **private.checkpointed_with_cache(), **mode))
    children = {"layers": nn.ModuleList(layer_views), "norm": view(base.norm, norm, dtype)}
    return private.view_of(base, children, {}, config=config, **mode)


@dataclass(frozen=True)
class Prefix:
    """Prompts as the base has read them: keys and values of each layer, padded on the left. Nothing writes to them."""

    #: For each layer, keys and values ``[B, heads, P, head_dim]``.
    states: tuple[tuple[Tensor, Tensor], ...]
    #: ``[B, P]``, True at tokens of the prompt.
    mask: Tensor
    #: ``[B]``, the first position after the prompt.
    start: Tensor

    @property
    def length(self) -> int:
        return self.mask.shape[1]

    def rows(self, index: Tensor) -> Prefix:
        """Return the rows at these indices, which may repeat."""
        states = tuple(
            (keys.index_select(0, index.to(keys.device)), values.index_select(0, index.to(values.device)))
            for keys, values in self.states
        )
        return Prefix(states, self.mask[index], self.start[index])

    @staticmethod
    def joined(prefixes: list[Prefix]) -> Prefix:
        """Return the rows of all prefixes, padded on the left to the longest."""
        if len(prefixes) == 1:
            return prefixes[0]
        longest = max(prefix.length for prefix in prefixes)
        padded = [prefix._padded(longest - prefix.length) for prefix in prefixes]
        states = tuple(
            (torch.cat([keys for keys, _ in layer]), torch.cat([values for _, values in layer]))
            for layer in zip(*(prefix.states for prefix in padded), strict=True)
        )
        return Prefix(states, torch.cat([p.mask for p in padded]), torch.cat([p.start for p in padded]))

    def _padded(self, by: int) -> Prefix:
        states = tuple((F.pad(keys, (0, 0, by, 0)), F.pad(values, (0, 0, by, 0))) for keys, values in self.states)
        return Prefix(states, F.pad(self.mask, (by, 0)), self.start)

    def cache(self) -> Any:
        """Return a cache that gives each layer the prompt's states before the new ones.

        It stores nothing, so that steps, branches and threads can share it.
        """
        return _ReadOnlyCache(self.states)


class _ReadOnlyCache:
    """The part of transformers' ``Cache`` that decoder layers use; it stores nothing."""

    def __init__(self, states: tuple[tuple[Tensor, Tensor], ...]) -> None:
        self._states = states

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        prompt_keys, prompt_values = self._states[layer_idx]
        return torch.cat([prompt_keys, keys], -2), torch.cat([prompt_values, values], -2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._states[layer_idx][0].shape[-2]
