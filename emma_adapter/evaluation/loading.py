"""Loading the models that judge: one error for whatever transformers says of a source."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import ConfigError


@contextmanager
def explained_loading(source: str, task: str) -> Iterator[None]:
    """Turn whatever the block, which loads a model for a task, raises into an error that names the source.

    Raises:
        ConfigError: in place of any other.
    """
    try:
        yield
    except Exception as error:
        # For a damaged or foreign folder, transformers, safetensors and tokenizers may raise anything.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise ConfigError(
            f"{source} can't be loaded for {task}: check the folder or hub id, and that transformers has it for this "
            f"task ({reason})"
        ) from error
