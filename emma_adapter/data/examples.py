"""Training examples from rows: one for each answer, with the conversation before it as its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from ..errors import DataError
from ..models.prompts import Prompts, shared_length
from .conversations import Message, count_images, trainable_turns
from .rows import Rows

_IGNORE_INDEX = -100


class Examples:
    """The examples of one or more sources, and the collator that makes batches of them.

    Only the answer has labels. It is tokenized together with its prompt, as ``generate`` will meet it: a tokenizer may
    split the same words differently at the start of a text.

    Args:
        processor: the model's processor, with a chat template.
        stop_ids: the tokens at which the model's ``generate`` stops.
    """

    def __init__(self, processor: Any, stop_ids: Sequence[int]) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self._sources: list[Rows] = []
        self._prompts = Prompts(processor, self.tokenizer.convert_ids_to_tokens(list(stop_ids)))
        self._taken: set[tuple[str, ...]] = set()

    def add(self, rows: Rows, name: str, *, progress: bool) -> Any:
        """Check every row, and return where its examples are, as a ``datasets.Dataset``.

        Raises:
            DataError: naming the first row that can't be used.
        """
        from datasets import Dataset

        places = []
        with click.progressbar(range(len(rows)), label=f"Checking {name}", hidden=not progress) as numbers:
            for number in numbers:
                messages = rows.check(number)
                self._check_template(messages, rows.where(number))
                places += [(len(self._sources), number, turn) for turn in trainable_turns(messages)]
        if not places:
            raise DataError(f"{name} has no answer to a question about an image: there is nothing to learn from")
        num_left_out = len(rows) - len({number for _, number, _ in places})
        if progress and num_left_out:
            click.echo(
                f"{num_left_out:,} rows of {name} show no image, and are left out: an adapter learns nothing there"
            )
        self._sources.append(rows)
        return Dataset.from_list([{"source": source, "row": row, "turn": turn} for source, row, turn in places])

    def __call__(self, examples: list[dict[str, int]]) -> Any:
        import torch

        conversations = [self._find(**example) for example in examples]
        texts = [self._prompts.answered(messages) for messages, _ in conversations]
        batch = self.processor(
            images=[images for _, images in conversations],
            text=[whole for _, whole in texts],
            padding=True,
            padding_side="right",
            add_special_tokens=False,
            return_tensors="pt",
        )
        labels = torch.full_like(batch["input_ids"], _IGNORE_INDEX)
        for row, (prompt, whole) in enumerate(texts):
            answer = self._answer_ids(prompt, whole)
            end = int(batch["attention_mask"][row].sum())
            place = slice(end - len(answer), end)
            if batch["input_ids"][row, place].tolist() != answer:
                raise DataError(f"{type(self.processor).__name__} doesn't end a conversation with its answer: {whole}")
            labels[row, place] = batch["input_ids"][row, place]
        batch["labels"] = labels
        return batch

    def _check_template(self, messages: list[Message], where: str) -> None:
        """Check that the chat template takes conversations with these roles; each sequence of roles once."""
        roles = tuple(message["role"] for message in messages)
        if roles in self._taken:
            return
        try:
            self._prompts.rendered(messages)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        self._taken.add(roles)

    def _find(self, source: int, row: int, turn: int) -> tuple[list[Message], list[Any]]:
        """Return the conversation up to the answer, and the images shown in it."""
        rows = self._sources[source]
        messages = rows.messages(row)[: turn + 1]
        return messages, rows.images(row)[: count_images(messages)]

    def _answer_ids(self, prompt: str, whole: str) -> list[int]:
        """Return the tokens after the prompt, including one that crosses the border, if any."""
        before, ids = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, whole))
        return list(ids[shared_length(before, ids) :])
