"""What is private or unstable in other libraries and can't be done without, one function each.

Where a release of theirs has another name for it, nothing is done, and the test that a docstring names fails.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

#: Of transformers' ``PushToHubMixin``, PEFT's models too: what uploads the folder that was saved. It uploads the files
#: of a folder and of its folders, and fails at folders in those. Test: test_hub_pushes.py, test_pushed_by_the_model.
UPLOAD = "_upload_modified_files"


def add_trainer_callback(make: Callable[[], type]) -> None:
    """Have every ``Trainer`` made from now on call a callback of the class that ``make`` returns.

    transformers has a list of the classes, ``transformers.trainer.DEFAULT_CALLBACKS``, for its own callbacks, and no
    other way to be told of a push to the hub. Importing it takes seconds, so this waits until somebody else does.
    Test: test_hub_pushes.py, test_pushed_by_trainer.
    """

    def add(trainer: Any) -> None:
        callbacks = getattr(trainer, "DEFAULT_CALLBACKS", None)
        if isinstance(callbacks, list) and (callback := make()) not in callbacks:
            callbacks.append(callback)

    _when_imported("transformers.trainer", add)


def _when_imported(name: str, then: Callable[[ModuleType], None]) -> None:
    if name in sys.modules:
        then(sys.modules[name])
    elif not any(isinstance(finder, _Waiting) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting(name, then))


class _Waiting:
    """A finder of modules that finds none: it lets the others find the one it waits for, and is told when that ran."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_tell(module: ModuleType) -> None:
                run(module)
                self.then(module)

            spec.loader.exec_module = run_and_tell  # type: ignore[method-assign]
        return spec
