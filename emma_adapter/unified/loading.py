"""load_unified: loading a branch from a folder or the hub onto a model."""

from __future__ import annotations

import warnings
from os import PathLike
from typing import Any

from torch import nn

from ..errors import AutoencoderError, PatchError
from ..files import tensor_folder
from ..files.hub import is_hub_id, is_local, local_folder
from ..messages import shown
from ..models.registry import require_model
from ..modules.torch_modes import undisturbed
from ..modules.wrappers import base_of
from . import branches, checkpoint
from .attaching import unify_model
from .autoencoder import LatentCoder
from .detaching import take_off
from .handle import EmmaUnified
from .state import DEFAULT, STATE_ATTRIBUTE, unified_state


@undisturbed()
def load_unified(
    model: nn.Module,
    source: str | PathLike[str],
    *,
    processor: Any = None,
    autoencoder: str | PathLike[str] | nn.Module | None = None,
    name: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> EmmaUnified:
    """Let a model draw with a branch that ``save_pretrained`` wrote. If this raises, the model is as it was.

    The folder may come from anybody. Nothing in it is run. Its files can make this read only one thing outside of it,
    the autoencoder that its config names: on the hub or, if the folder wasn't downloaded here, at a path on this
    machine.

    Args:
        model: as for :func:`unify_model`; it must not draw yet, or ``name`` must be given.
        source: the folder, or a hub id.
        processor: as for :func:`unify_model`. A model that draws already has one, and keeps it.
        autoencoder: as for :func:`unify_model`: the one that the branch was trained with. Default: what the file names.
        name: of a further branch on a model that draws already. ``set_adapter(name)`` then makes it the active one.
        revision: branch, tag or commit on the hub.
        subfolder: of the folder or repository, where the branch is; it can't lead out of it.
        token: of the hub, for a private repository; default, and with True: the one that ``hf auth login`` stored, or
            ``HF_TOKEN``; False sends none.
        local_files_only: don't ask the hub; use what was downloaded before.

    Raises:
        AutoencoderError: if no autoencoder is given, and the file names none, or comes from the hub and names a path.
        CheckpointError: if the files are incomplete, damaged, of a newer format, or made for another model.
        ConfigError: if the autoencoder has another compression or other channels.
        PatchError: if the model draws already, and no new name is given.
    """
    require_model(model)
    names = (checkpoint.CONFIG_NAME, checkpoint.WEIGHTS_NAME)
    folder = local_folder(
        source, names, revision=revision, subfolder=subfolder, token=token, local_files_only=local_files_only
    )
    saved, file = checkpoint.describe(folder)
    with file:
        base: Any = base_of(model)
        tensor_folder.check_model_type(saved.folder, getattr(getattr(base, "config", None), "model_type", None))
        earlier_names = set(unified_state(base).branches) if STATE_ATTRIBUTE in base.__dict__ else set()
        _check_name(earlier_names, name)
        if autoencoder is None and not (earlier_names and _is_autoencoder_of(unified_state(base).coder, saved)):
            autoencoder = _autoencoder_of(saved, downloaded=not is_local(source))
        try:
            if earlier_names:
                unified = EmmaUnified(base).add_adapter(str(name), saved.config, autoencoder=autoencoder)
            else:
                assert autoencoder is not None
                unified = unify_model(model, saved.config, processor=processor, autoencoder=autoencoder)
            branch = unified_state(base).branches[name or DEFAULT]
            new_tensors = branch.module.state_dict(keep_vars=True)
            tensor_folder.check_fits(saved.folder, new_tensors)
            tensor_folder.read_into(saved.folder, file, new_tensors)
        except BaseException:
            _undo(base, earlier_names)
            raise
    if branch.coder.fingerprint() != saved.autoencoder:
        saved_autoencoder = saved.autoencoder_source or "a module"
        warnings.warn(
            f"by its config, {saved.folder.source} was trained with another autoencoder ({saved_autoencoder}) than the "
            "one given: pictures will not be what it learned, unless the two differ only in names",
            stacklevel=3,
        )
    return unified


def _check_name(earlier_names: set[str], name: str | None) -> None:
    """Check that a branch of this name can be loaded beside the ones on the model.

    Raises:
        PatchError: if it can't.
    """
    if earlier_names and name is None:
        raise PatchError(
            "this model was made to draw already: load_unified(model, …, name=…) puts another branch beside it, and "
            "unpatch_model(model) takes all off"
        )
    if not earlier_names and name not in (None, DEFAULT):
        raise PatchError(f"the first branch of a model is called {DEFAULT!r}: load without name=")


def _is_autoencoder_of(coder: LatentCoder, saved: checkpoint.SavedUnified) -> bool:
    """Return whether a branch was trained with this autoencoder, as far as its file says."""
    return coder.fingerprint() == saved.autoencoder and saved.autoencoder_source in (None, coder.source)


def _undo(base: nn.Module, earlier_names: set[str]) -> None:
    """Take off the branches that were not there before."""
    if not earlier_names and STATE_ATTRIBUTE in base.__dict__:
        take_off(base)
    elif earlier_names:
        for name in set(unified_state(base).branches) - earlier_names:
            branches.remove(base, name)


def _autoencoder_of(saved: checkpoint.SavedUnified, *, downloaded: bool) -> str:
    """Return the hub id or path of the autoencoder that a branch was trained with.

    Raises:
        AutoencoderError: if the file doesn't name it, or was downloaded and names a path.
    """
    name = saved.autoencoder_source
    if name is None:
        raise AutoencoderError(
            f"{saved.folder.source} was trained with an autoencoder that was a module: give it, "
            "load_unified(model, …, autoencoder=…)"
        )
    if downloaded and not is_hub_id(name):
        raise AutoencoderError(
            f"{saved.folder.source} comes from the hub, and names the path {shown(name)} as its autoencoder. Only a "
            "folder that lies on this machine may lead to a path on it: say where the autoencoder is, "
            "load_unified(model, …, autoencoder=…)"
        )
    return name
