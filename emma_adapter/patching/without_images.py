"""Calls without images, which keep processes that train together in step.

A batch without images uses neither the adapter nor the projector. The other processes would wait for this one's
gradients and, where the embeddings are sharded, for its part of them. So such a call

- ties the trainable parameters of the projectors, the adapter's among them, to the embedded prompt: its values stay as
  they are, and the parameters get a gradient of zero. They are tied to the prompt, not to the output, so that the
  language model's layers run backward on all processes;
- looks up an embedding where calls with images do.

Processes need not communicate for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..instructions.pipeline import embedded, embedder
from ..modules import private
from ..modules.gradients import with_zero_gradient
from ..modules.method_guard import STATE_ATTRIBUTE
from ..modules.sharding import is_partitioned, is_sharded
from .state import AdapterState, state_of


def tie(state: AdapterState, values: Tensor) -> Tensor:
    """Return ``values`` with the trainable parameters of the projectors in their graph."""
    parameters = [
        parameter
        for projector in state.current.sites().values()
        for parameter in projector.parameters()
        if parameter.requires_grad and not is_partitioned(parameter)
    ]
    return with_zero_gradient(values, parameters)


def before_call_without_images(state: AdapterState, inner: nn.Module, arguments: dict[str, Any]) -> None:
    """Prepare a call of ``forward`` whose batch holds no image."""
    if not state.context.generates_without_images:
        look_up(state, inner, arguments)
    if not torch.is_grad_enabled():
        return
    embeds = arguments.get("inputs_embeds")
    if embeds is not None:
        arguments["inputs_embeds"] = tie(state, embeds)
        return
    embed: Any = embedder(inner)
    install_embedding_hook(state, embed)
    state.context.ties_embeddings = True


def look_up(state: AdapterState, inner: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Take part in gathering sharded embeddings, which other processes need for their instructions."""
    embed: Any = embedder(inner)
    ids = arguments.get("input_ids")
    reads_embeddings = state.pipeline.encoder is None and state.scope.named is None
    if ids is None or not reads_embeddings or not any(is_sharded(weight) for weight in embed.parameters()):
        return
    embedded(embed, torch.zeros_like(ids[:1, :1]))


def install_embedding_hook(state: AdapterState, embed: nn.Module) -> None:
    """Install our hook on the embeddings so that it runs after all others.

    FSDP's hook has weights gathered again in backward for outputs that need a gradient, which on other processes this
    output doesn't: FSDP must not see the tie.
    """
    # At each call, since models may share their embeddings.
    setattr(embed, STATE_ATTRIBUTE, state)
    if not private.is_last_hook(embed, after_embedding):
        private.remove_hooks(embed, [after_embedding])
        embed.register_forward_hook(after_embedding)


def after_embedding(embed: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    state = state_of(embed)
    context = state.context
    if not context.ties_embeddings:
        return None
    context.ties_embeddings = False
    return tie(state, output)
