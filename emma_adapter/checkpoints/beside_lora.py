"""Notes for people, and for PEFT, that an adapter of this library lies beside what they load.

To PEFT, a folder with a LoRA and an adapter looks like one with a LoRA alone, even where this library isn't installed:
so the folder's model card says what is missing. The LoRA's own config says it too, in a mapping that PEFT keeps and
doesn't read, so that this library can warn where it is imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from ..files.atomic import replace_files
from ..messages import warn_caller
from ..patching.sites import DEFAULT
from ..patching.state import state_of
from .format import CARD_NAME, CONFIG_NAME, FORMAT, SUBFOLDER
from .model_card import beside_section

_BEGIN, _END = "<!-- emma_adapter: begin -->", "<!-- emma_adapter: end -->"
_MAPPING = "auto_mapping"
#: Packages whose frames lie between the user's line and ours.
_THROUGH = ("peft", "torch")


def tell_in_card(model: nn.Module, directory: Path, location: str = "path/to/this/folder") -> None:
    """Say in the folder's model card, if it has one, that an adapter lies beside the model or the LoRA.

    A card whose author has written about it stays as it is.
    """
    path = directory / CARD_NAME
    if not path.is_file():
        return
    card = path.read_text(encoding="utf-8")
    state = state_of(model)
    described_adapter = DEFAULT if DEFAULT in state.adapters else state.active
    section = beside_section(
        getattr(state.model.config, "name_or_path", ""),
        location,
        state.adapters[described_adapter].config.instruction_encoder,
        with_peft=model is not state.model,
    )
    before, begin, rest = card.partition(_BEGIN)
    after = rest.partition(_END)[2]
    if not begin and "load_adapter" in card:
        return
    new_card = f"{before.rstrip()}\n\n{_BEGIN}\n{section.strip()}\n{_END}\n{after.lstrip()}"
    if new_card != card:
        replace_files(directory, {CARD_NAME: new_card.encode()})


def tell_in_config(directory: Path) -> None:
    """Note in the config that PEFT has just written that an adapter was trained with the LoRA."""
    path = directory / CONFIG_NAME
    if not path.is_file():
        return
    description = json.loads(path.read_text(encoding="utf-8"))
    description[_MAPPING] = {**(description.get(_MAPPING) or {}), FORMAT.name: SUBFOLDER}
    replace_files(directory, {CONFIG_NAME: json.dumps(description, indent=2, sort_keys=True).encode()})


def warn_if_told(configs: Iterable[Any]) -> None:
    """Warn if one of these PEFT configs, of a model that isn't patched, says that an adapter belongs to it."""
    if any(FORMAT.name in (getattr(config, _MAPPING, None) or ()) for config in configs):
        warn_caller(
            "PEFT loads a part of what was trained together: an EMMA adapter lies beside it, in "
            f"{SUBFOLDER}/ of the same folder or repository, and the model isn't patched. Load it too: "
            "load_adapter(model, folder, processor=processor), best before PeftModel.from_pretrained",
            *_THROUGH,
        )
