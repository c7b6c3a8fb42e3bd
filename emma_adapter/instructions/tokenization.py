"""Token ids of texts, without changing the tokenizer that the user works with."""

from __future__ import annotations

import copy
import threading
from typing import Any


class Tokenization:
    """Calls a tokenizer, or a copy of it where a call would change the tokenizer.

    A tokenizer of the ``tokenizers`` library keeps the padding and truncation of the last call: a call in one thread,
    between another thread's setting them and using them, changes that thread's result. The first call makes the copy,
    which takes half a second for a large vocabulary.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._own: Any = None
        self._lock = threading.Lock()

    def ids(self, text: str) -> list[int]:
        with self._lock:
            if self._own is None:
                self._own = (
                    copy.deepcopy(self.tokenizer) if getattr(self.tokenizer, "is_fast", False) else self.tokenizer
                )
            ids: list[int] = self._own(text, add_special_tokens=False)["input_ids"]
        return ids

    def __deepcopy__(self, memo: dict[int, Any]) -> Tokenization:
        return type(self)(copy.deepcopy(self.tokenizer, memo))

    def __reduce__(self) -> tuple[type[Tokenization], tuple[Any]]:
        return type(self), (self.tokenizer,)
