"""load_adapter: from an adapter folder to a patched model."""

from __future__ import annotations

import warnings
from os import PathLike
from typing import Any

from torch import nn

from . import checkpoint, hub, restoring, sharding
from .errors import PatchError
from .families import require_model
from .fusion.dispatch import Kernel
from .patching import EmmaAdapter, base_of, patch_model
from .state import DEFAULT, STATE_ATTRIBUTE


def load_adapter(
    model: nn.Module,
    source: str | PathLike[str],
    *,
    name: str | None = None,
    processor: Any = None,
    instruction_encoder: str | nn.Module | None = None,
    kernel: Kernel | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> EmmaAdapter:
    """Load a saved adapter into a model, which is patched if it isn't yet.

    Args:
        model: as for :func:`patch_model`.
        source: a folder that ``save_pretrained`` wrote, or a hub id.
        name: of the adapter on the model that is loaded into, and added if the model is patched and has none of this
            name; it is not made the active one. Default: the active one, or ``"default"`` if the model is patched now.
        processor: as for :func:`patch_model`; an already patched model keeps the one it has, if none is given.
        instruction_encoder: where the adapter's instruction encoder is found now, if elsewhere than when it was
            saved; needed for an encoder module of your own.
        kernel: what computes the adapter, as in :class:`EmmaConfig`; default: ``"auto"``, or what an already patched
            model was told.
        revision: branch, tag or commit on the hub.
        local_files_only: don't ask the hub; use what was downloaded before.

    Raises:
        CheckpointError: if the files are incomplete, damaged, of a newer format, or made for another model. The
            model is then as it was.
        EncoderError: if the instruction encoder can't be loaded.
        PatchError: if the model is patched with another kind of adapter, or sharded by FSDP.
    """
    require_model(model)
    if sharding.is_fully_sharded(model):
        raise PatchError("the model is sharded by FSDP: load_adapter first, then shard")
    given, model = model, base_of(model)
    patched = hasattr(model, STATE_ATTRIBUTE)
    if name not in (None, DEFAULT) and not patched:
        raise PatchError(
            f"the first adapter of a model is called {DEFAULT!r}: load without name=, or patch_model(model) first"
        )
    saved = checkpoint.read(hub.local_folder(source, revision=revision, local_files_only=local_files_only))
    restoring.check_fit(model, saved)
    restoring.check_not_offloaded(model, saved, name)
    if not patched:
        restoring.check_encoder_fit(model, saved)
        if saved.reads_turns and processor is None:
            warnings.warn(
                f"{saved.source} was used with a processor, which tells the user's turns from the rest of the prompt; "
                "without one, the whole prompt is the instruction: load_adapter(model, …, processor=processor)",
                stacklevel=2,
            )
        config = saved.config if kernel is None else saved.config.replace(kernel=kernel)
        patch_model(given, config, processor=processor, instruction_encoder=instruction_encoder)
        restoring.assign(model, saved)
    else:
        restoring.restore(
            model, saved, name=name, processor=processor, instruction_encoder=instruction_encoder, kernel=kernel
        )
    return EmmaAdapter(model)
