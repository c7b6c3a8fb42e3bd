"""load_vision_experts: loading experts from a folder or the hub onto a model."""

from __future__ import annotations

from os import PathLike
from typing import Any

from torch import nn

from ..errors import CheckpointError, ConfigError, PatchError
from ..files import tensor_folder
from ..files.hub import local_folder
from ..models.registry import find_family
from ..modules import omni, wrappers
from ..modules.torch_modes import undisturbed
from . import checkpoint
from .attaching import attach, wrappable
from .detaching import is_on, take_off
from .handle import EmmaVisionExperts
from .module import expected_tensors
from .tower import base_parameters, routed_blocks, token_width


@undisturbed()
def load_vision_experts(
    model: nn.Module,
    source: str | PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> EmmaVisionExperts:
    """Give a model the experts that ``save_pretrained`` wrote. If this raises, the model is as it was.

    The folder may come from anybody: nothing in it is run, and nothing outside of it is read.

    Args:
        model: as for :func:`add_vision_expert`; it must not have experts yet.
        source: the folder, or a hub id.
        revision: branch, tag or commit on the hub.
        subfolder: of the folder or repository, where the experts are; it can't lead out of it.
        token: of the hub, for a private repository; default, and with True: the one that ``hf auth login`` stored, or
            ``HF_TOKEN``; False sends none.
        local_files_only: don't ask the hub; use what was downloaded before.

    Raises:
        CheckpointError: if the files are incomplete, damaged, of a newer format, or made for another model.
        PatchError: if the model has experts already.
    """
    base: Any = wrappable(model)
    if is_on(base):
        raise PatchError("this model has vision experts already: EmmaVisionExperts(model).remove() first")
    names = (checkpoint.CONFIG_NAME, checkpoint.WEIGHTS_NAME)
    folder = local_folder(
        source, names, revision=revision, subfolder=subfolder, token=token, local_files_only=local_files_only
    )
    saved, config, file = checkpoint.describe(folder)
    with file:
        tensor_folder.check_model_type(saved, getattr(getattr(base, "config", None), "model_type", None))
        try:
            blocks = routed_blocks(base, find_family(base).inner(base), config.layers)
        except ConfigError as error:
            raise CheckpointError(f"{saved.config_path}: {error}; load it into the model it was made for") from error
        mlps = [base_parameters(mlp) for _, mlp in blocks]
        # Checked before the config makes anything large.
        tensor_folder.check_fits(saved, expected_tensors(config.experts, mlps, token_width(blocks[0][1])))
        state = attach(base, config)
        try:
            tensor_folder.read_into(saved, file, state.module.state_dict(keep_vars=True))
        except BaseException:
            take_off(base)
            raise
    omni.guard_wrappers(wrappers.around(model))
    return EmmaVisionExperts(base)
