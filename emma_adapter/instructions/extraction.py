"""Which tokens of a call are the instruction."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ..config import InstructionPolicy
from ..errors import InstructionError
from .cache import LRUCache
from .templates import BARRIER, TurnMarkers, read_markers

IGNORE_INDEX = -100
_ANSWERED = -1
_PASS_IT = 'pass it: model(**inputs, instruction=["…", …]) or model.generate(**inputs, instruction=["…", …])'


@dataclass(frozen=True)
class Prompt:
    """The text side of one call. ``labels`` are the call's, if it has any."""

    input_ids: Tensor  # [B, L]
    attention_mask: Tensor | None = None  # [B, L]; ignored if it has another shape
    labels: Tensor | None = None  # [B, L]
    #: True if the call trains the model: then its ids contain the answer.
    trains: bool = False
    #: Bool ``[B]``: rows with images. The others need no instruction, and none is looked for.
    has_media: Tensor | None = None


class InstructionReader:
    """Finds the instruction in a prompt.

    With a processor whose chat template tells turns apart: the text of user turns. Without: every token of
    the prompt except special, placeholder and padding tokens (system text and role words included). Tokens
    that ``labels`` supervise are answers and are never read.
    """

    def __init__(self, processor: Any, special_ids: Iterable[int], policy: InstructionPolicy) -> None:
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.policy = policy
        self.markers = read_markers(processor) if processor is not None else None
        self._special_ids = frozenset(special_ids) | frozenset(getattr(self.tokenizer, "all_special_ids", ()))
        self._turns: LRUCache[list[list[int]]] = LRUCache(1024)

    def select(self, prompt: Prompt) -> Tensor:
        """Bool ``[B, L]`` on the CPU: true at tokens of the instruction.

        Raises:
            InstructionError: if answers can't be told from the prompt.
        """
        ids = prompt.input_ids
        labels = prompt.labels
        if labels is not None and labels.shape != ids.shape:
            raise InstructionError(
                f"labels {list(labels.shape)} and input_ids {list(ids.shape)} differ in shape, so that answers can't "
                f"be told from the instruction; {_PASS_IT}"
            )
        mask = prompt.attention_mask
        valid = (
            mask.bool().cpu()
            if mask is not None and mask.shape == ids.shape
            else torch.ones(ids.shape, dtype=torch.bool)
        )
        answers = (labels != IGNORE_INDEX).cpu() if labels is not None else None
        wanted = [True] * len(ids) if prompt.has_media is None else prompt.has_media.tolist()
        selected = torch.zeros(ids.shape, dtype=torch.bool)
        for row, tokens in enumerate(ids.tolist()):
            if not wanted[row]:
                continue
            where = valid[row].nonzero().flatten().tolist()
            row_answers = None if answers is None else answers[row].tolist()
            chosen = self._select_row(tokens, where, row_answers, trains=prompt.trains)
            selected[row, chosen] = True
        return selected

    def texts(self, prompt: Prompt) -> list[str]:
        """The instruction of each row as text.

        Raises:
            InstructionError: if there is no tokenizer to decode with.
        """
        selected = self.select(prompt)
        return self.decode([ids[keep] for ids, keep in zip(prompt.input_ids.cpu(), selected, strict=True)])

    def decode(self, rows: Sequence[Tensor]) -> list[str]:
        return [str(self._need_tokenizer("read token ids").decode(row.tolist())).strip() for row in rows]

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask ``[B, T]`` of texts, in the language model's vocabulary, padded on the right."""
        tokenizer = self._need_tokenizer("turn the text of instruction= into the language model's tokens")
        rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        length = max(1, *map(len, rows))
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask[i, : len(row)] = True
        return ids, mask

    def _need_tokenizer(self, purpose: str) -> Any:
        if self.tokenizer is None:
            raise InstructionError(
                f"a tokenizer is needed to {purpose}: patch_model(model, …, processor=processor), or give "
                "instruction= in the other form (text for a text tower, token ids for the language model's embeddings)"
            )
        return self.tokenizer

    def _select_row(
        self, tokens: list[int], where: list[int], answers: list[bool] | None, *, trains: bool
    ) -> list[int]:
        turns = self._user_turns(tokens, where, answers)
        if turns is None:
            if trains and answers is None:
                raise InstructionError(
                    "a training step without labels: the answer can't be told from the instruction, and would leak "
                    "through the image. Pass labels to the model (Trainer takes them away with label smoothing and "
                    "with a custom loss), give patch_model a processor with a chat template, or name the instruction: "
                    + _PASS_IT
                )
            turns = _prompt_runs([i for i in where if tokens[i] not in self._special_ids], answers)
        asked = [[i for i in turn if answers is None or not answers[i]] for turn in turns]
        if any(turns) and not any(asked):
            raise InstructionError(
                "labels supervise every token of the prompt, so that nothing is left that is not an answer. Set "
                f"labels to {IGNORE_INDEX} at the prompt's tokens, or name the instruction: {_PASS_IT}"
            )
        return _apply_policy([turn for turn in asked if turn], self.policy)

    def _user_turns(self, tokens: list[int], where: list[int], answers: list[bool] | None) -> list[list[int]] | None:
        """Positions of each user turn's words, or None if the template's markers are not known or not there."""
        markers = self.markers
        if markers is None:
            return None
        # Answers are blanked before the search: what they say must not decide where a turn begins or ends.
        kept = array("q", (_ANSWERED if answers is not None and answers[i] else tokens[i] for i in where))
        [turns] = self._turns.get_or_compute([kept.tobytes()], lambda _: [self._find_turns(kept, markers)])
        return [[where[i] for i in turn if kept[i] not in self._special_ids] for turn in turns] or None

    def _find_turns(self, tokens: Sequence[int], markers: TurnMarkers) -> list[list[int]]:
        text: list[str] = []
        owners: list[tuple[int, int]] = []
        start = 0
        for answered, run in groupby(tokens, lambda token: token == _ANSWERED):
            length = len(list(run))
            if answered:
                text.append(BARRIER)
                owners.append((start, start + length - 1))
            else:
                part, part_owners = _decode_with_owners(self.tokenizer, tokens[start : start + length])
                text.append(part)
                owners += [(start + first, start + last) for first, last in part_owners]
            start += length
        return [
            sorted({i for first, last in owners[start:end] for i in range(first, last + 1)})
            for start, end in markers.user_spans("".join(text))
        ]


def _prompt_runs(where: list[int], answers: list[bool] | None) -> list[list[int]]:
    """The prompt, cut where answers stand: without a template, labels are what tells turns apart."""
    if answers is None:
        return [where]
    runs: list[list[int]] = [[]]
    answered = 0
    for i in where:
        if answers[i]:
            if runs[-1]:
                runs.append([])
            answered = len(runs) - 1
        else:
            runs[-1].append(i)
    if answered == 0:
        # No answer, or nothing before the first: the row is all prompt, or all answer.
        return [where]
    # What follows the last answer is the template's end of the conversation, not a question.
    return runs[:answered]


def _apply_policy(turns: list[list[int]], policy: InstructionPolicy) -> list[int]:
    if not turns:
        return []
    if policy == "all_turns":
        return [i for turn in turns for i in turn]
    if policy == "shortest_turn":
        return min(turns, key=len)
    return turns[-1]


def _decode_with_owners(tokenizer: Any, tokens: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """The decoded text without white space, and for each character the first and last token it stems from.

    Byte-level tokenizers spread a character over several tokens, and sentencepiece-like ones write a space or
    not depending on the neighbour: hence groups of tokens that decode to whole characters, decoded after
    their neighbour.
    """

    def decode(part: Sequence[int]) -> str:
        return str(tokenizer.decode(list(part), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    text: list[str] = []
    owners: list[tuple[int, int]] = []
    previous = start = 0
    for end in range(len(tokens)):
        alone = decode(tokens[start : end + 1])
        if alone.endswith("�") and end + 1 < len(tokens):
            continue
        piece = alone
        if start:
            neighbour = decode(tokens[previous:start])
            together = decode(tokens[previous : end + 1])
            piece = together[len(neighbour) :] if together.startswith(neighbour) else alone
        for character in piece:
            if not character.isspace():
                text.append(character)
                owners.append((start, end))
        previous, start = start, end + 1
    return "".join(text), owners
