"""The manifest by which lmms-eval knows ``--model emma``. Imported as ``emma_adapter_lmms_eval``.

lmms-eval loads every entry point as it starts, even for ``lmms-eval tasks``. Hence a package of its own: a module of
``emma_adapter`` would import that package, and with it torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """Return the manifest for the entry point ``lmms_eval.models``: the model's name and the path of its class."""
    # Not at the top: importing anything from lmms_eval.models loads the entry points, including this one.
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="emma",
        chat_class_path="emma_adapter.integrations.lmms_eval.Emma",
        aliases=("emma_adapter",),
    )
