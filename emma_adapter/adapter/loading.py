"""``load_adapter``: loading an adapter folder into a model."""

from __future__ import annotations

import warnings
from os import PathLike
from typing import Any

from torch import nn

from ..alignment.fusion.dispatch import Kernel
from ..checkpoints import hub
from ..errors import PatchError
from ..files.hub import is_local
from ..models.registry import require_model
from ..modules import sharding, wrappers
from ..modules.method_guard import STATE_ATTRIBUTE
from ..modules.torch_modes import undisturbed
from ..modules.wrappers import base_of
from ..patching.sites import DEFAULT
from . import compatibility, restoring
from .handle import EmmaAdapter
from .patch import patch_model, take_off_adapters


@undisturbed()
def load_adapter(
    model: nn.Module,
    source: str | PathLike[str],
    *,
    name: str | None = None,
    processor: Any = None,
    instruction_encoder: str | nn.Module | None = None,
    kernel: Kernel | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> EmmaAdapter:
    """Load a saved adapter into a model, which is patched if it isn't yet.

    The folder may come from anybody. Nothing in it is run, and nothing outside of it is read because a file in it says
    so, except the text tower that its config names: on the hub, in open_clip's list or, if the folder wasn't downloaded
    here, at a path of this machine. Of a text tower neither code nor pickled objects are run. If this raises, the model
    is as it was.

    Args:
        model: as for :func:`patch_model`.
        source: a folder that ``save_pretrained`` wrote, or a hub id.
        name: name of the model's adapter to load into. It is added if the model is patched and has none of this name,
            and is not made the active one. Default: the active one, or ``"default"`` if the model is patched now.
        processor: as for :func:`patch_model`; default: an already patched model keeps the one it has.
        instruction_encoder: where the adapter's instruction encoder is found now, if elsewhere than when it was
            saved. Needed for an encoder module of your own, and where an adapter from the hub names a path.
        kernel: what computes the adapter, as in :class:`EmmaConfig`; default: ``"auto"``, or the choice of an already
            patched model.
        revision: branch, tag or commit on the hub.
        subfolder: where in the folder or repository the adapter is, as ``"last-checkpoint"``; it can't lead out of it.
        token: token for the hub, for a private repository; default, and with True: the one that ``hf auth login``
            stored, or ``HF_TOKEN``; False sends none.
        local_files_only: don't ask the hub; use what was downloaded before.

    Raises:
        CheckpointError: if the files are incomplete, damaged, of a newer format, or made for another model.
        EncoderError: if the instruction encoder can't be loaded, or an adapter from the hub names a path as its own.
        PatchError: if the model is patched with another kind of adapter, or sharded by FSDP.
    """
    require_model(model)
    if sharding.is_fully_sharded(model):
        raise PatchError("the model is sharded by FSDP: load_adapter first, then shard")
    outermost, model = model, base_of(model)
    is_patched = hasattr(model, STATE_ATTRIBUTE)
    if name not in (None, DEFAULT) and not is_patched:
        raise PatchError(
            f"the first adapter of a model is called {DEFAULT!r}: load without name=, or patch_model(model) first"
        )
    folder = hub.local_folder(
        source, revision=revision, subfolder=subfolder, token=token, local_files_only=local_files_only
    )
    downloaded = not is_local(source)
    saved = restoring.read_for(model, folder, name)
    if not is_patched:
        compatibility.check_encoder(model, saved, instruction_encoder, downloaded=downloaded)
        if saved.reads_turns and processor is None:
            warnings.warn(
                f"{saved.source} was used with a processor, which tells the user's turns from the rest of the prompt; "
                "without one, the whole prompt is the instruction: load_adapter(model, …, processor=processor)",
                stacklevel=3,
            )
        config = saved.config if kernel is None else saved.config.replace(kernel=kernel)
        try:
            patch_model(outermost, config, processor=processor, instruction_encoder=instruction_encoder)
            restoring.assign(model, DEFAULT, saved)
        except BaseException:
            if hasattr(model, STATE_ATTRIBUTE):
                take_off_adapters(model, wrappers.around(outermost))
            raise
    else:
        restoring.restore(
            model,
            saved,
            name=name,
            processor=processor,
            instruction_encoder=instruction_encoder,
            kernel=kernel,
            downloaded=downloaded,
        )
    return EmmaAdapter(model)
