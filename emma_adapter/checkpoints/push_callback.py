"""Trainer's pushes to the hub. This imports transformers, and is imported only once a Trainer runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..modules.method_guard import STATE_ATTRIBUTE
from . import pushing


class AdapterPushCallback(TrainerCallback):
    """Adds the adapters to what Trainer is about to push of a patched model."""

    def on_push_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and hasattr(model, STATE_ATTRIBUTE):
            pushing.complete(model, Path(args.output_dir), state.global_step)
