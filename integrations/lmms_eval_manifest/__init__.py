"""What lmms-eval reads to know of ``--model emma``. Imported as ``emma_adapter_lmms_eval``.

lmms-eval loads every entry point as it starts, also for ``lmms-eval tasks``. Hence a package of its own: a module of
``emma_adapter`` would import that, and with it torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """Of the entry point ``lmms_eval.models``: the name, and where the class is."""
    # Not at the top: importing anything of lmms_eval.models loads the entry points, this one too.
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="emma",
        chat_class_path="emma_adapter.integrations.lmms_eval.Emma",
        aliases=("emma_adapter",),
    )
