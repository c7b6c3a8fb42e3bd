"""A collator that adds the instruction of each row to the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..adapter.handle import EmmaAdapter
from ..errors import ConfigError, DataError, InstructionError
from ..instructions.prompt import IGNORE_INDEX
from ..instructions.reader import choose_turns, pad_right
from ..messages import warn_caller
from ..models.prompts import stop_ids
from ..patching.state import state_of

Row = Mapping[str, Any]


class InstructionCollator:
    """Wraps a collator, so that ``model(**batch)`` is given each row's instruction instead of reading it.

    The instruction is what the user says in the row's ``"messages"`` or ``"prompt"``, in the turns that the adapter's
    ``instruction_policy`` selects; answers are never read. A turn's words around an image are joined by a space.

    The batch gets ``instruction``: a text for each row, or with ``as_tokens=True`` its token ids ``[B, T]``, and
    bool ``instruction_mask [B, T]``. Text is what a text tower takes; tensors can also be cut and joined, as
    ``DataParallel`` and accelerate's ``dispatch_batches`` do with a batch. The policy ``shortest_turn`` counts
    characters of a text, and tokens with ``as_tokens=True``.

    The collator warns if the labels of the first batch don't teach the model to end its answers.

    Args:
        collator: makes a batch, a mapping, from a list of rows.
        adapter: the adapter that will be trained. It is not kept, so that the collator can go to worker processes.
        instruction_of: returns the instruction of a row that has other columns.
        as_tokens: give token ids instead of text, in the language model's vocabulary.

    Raises:
        InstructionError: if ``as_tokens`` is true and the model was patched without a processor.
        ConfigError: if ``adapter`` isn't a handle, but the model, for example.
    """

    def __init__(
        self,
        collator: Callable[[list[Any]], Mapping[str, Any]],
        adapter: EmmaAdapter,
        *,
        instruction_of: Callable[[Row], str] | None = None,
        as_tokens: bool = False,
    ) -> None:
        if not isinstance(adapter, EmmaAdapter):
            raise ConfigError(
                f"InstructionCollator takes the handle that patch_model gave, or get_adapter(model); got a "
                f"{type(adapter).__name__}"
            )
        self.collator = collator
        self.instruction_of = instruction_of
        self.policy = adapter.config.instruction_policy
        tokenizer = state_of(adapter.model).pipeline.reader.tokenizer
        self.tokenizer = tokenizer if as_tokens else None
        self._stop_ids = stop_ids(adapter.model, tokenizer)
        if as_tokens and self.tokenizer is None:
            raise InstructionError(
                "as_tokens=True needs the model's tokenizer: patch_model(model, …, processor=processor)"
            )

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        """Return the collator's batch with the instructions.

        Raises:
            InstructionError: if a row doesn't show what the user says.
            DataError: if the user says nothing about the image of a row, so that nothing can be learned from it.
        """
        # Read before the collator runs: some collators replace the columns of the rows they are given.
        turns = [self._turns(row) for row in rows]
        texts = [" ".join(filter(None, choose_turns(row, self.policy))) for row in turns]
        for number, (row, text) in enumerate(zip(rows, texts, strict=True), 1):
            if not text.strip() and _has_images(row):
                raise DataError(
                    f"row {number} of a batch of {len(rows)} has an empty question, so that an adapter would learn "
                    "nothing from its answer: leave such rows out, or write what is asked (instruction_of= says it for "
                    "rows of other columns)"
                )
        batch = dict(self.collator(rows))
        self._warn_if_endless(batch.get("labels"))
        if self.tokenizer is None:
            return {**batch, "instruction": texts}
        tokenized = [[self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in row] for row in turns]
        ids, mask = pad_right([[i for turn in choose_turns(row, self.policy) for i in turn] for row in tokenized])
        return {**batch, "instruction": ids, "instruction_mask": mask}

    def _warn_if_endless(self, labels: Any) -> None:
        if not self._stop_ids or not isinstance(labels, Tensor) or not bool((labels != IGNORE_INDEX).any()):
            return
        if not bool(torch.isin(labels, torch.tensor(self._stop_ids, device=labels.device)).any()):
            warn_caller(
                "no label of a batch is a token at which generate stops, so that the model doesn't learn to end its "
                "answers: some chat templates, as LLaVA-1.5's, don't write one. End the text of answers with "
                "processor.tokenizer.eos_token"
            )
        # Only the first batch is checked: in a later one every answer may have been cut.
        self._stop_ids = []

    def _turns(self, row: Row) -> list[str]:
        if self.instruction_of is not None:
            return [self.instruction_of(row)]
        messages = (row.get("messages") or row.get("prompt")) if isinstance(row, Mapping) else None
        if isinstance(messages, str) or not isinstance(messages, Sequence):
            columns = sorted(row) if isinstance(row, Mapping) else f"no columns: it is a {type(row).__name__}"
            raise InstructionError(
                "InstructionCollator reads rows with a list of messages in 'messages' or 'prompt'; this one has "
                f"{columns}. Say what its instruction is: InstructionCollator(…, instruction_of=lambda row: …); "
                "Trainer keeps other columns with remove_unused_columns=False"
            )
        try:
            turns = [_text_of(message["content"]) for message in messages if message["role"] == "user"]
        except (KeyError, TypeError, AttributeError) as error:
            raise InstructionError(
                'a message needs a "role" and a "content", a text or a list of parts with a "type", as chat templates '
                f"take them; got {messages!r:.300}. Or say what the instruction is: instruction_of="
            ) from error
        if not turns:
            raise InstructionError("a row without a message of the user; say what its instruction is: instruction_of=")
        return turns


def _has_images(row: Any) -> bool:
    """Return whether an image column holds an image.

    Images in other columns can't be recognized here; training warns of them.
    """
    media = [row[name] for name in ("images", "image") if name in row] if isinstance(row, Mapping) else []
    return any(value is not None and not (isinstance(value, Sequence) and len(value) == 0) for value in media)


def _text_of(content: Any) -> str:
    """Return a message's words, with a space in place of each image or video."""
    if content is None or isinstance(content, str):
        return (content or "").strip()
    words = "".join((part.get("text") or "") if part["type"] == "text" else "\0" for part in content)
    return " ".join(filter(None, (run.strip() for run in words.split("\0"))))
