"""Which tokens of a call are the instruction."""

from __future__ import annotations

import copy
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..alignment.config import InstructionPolicy
from ..errors import InstructionError
from ..messages import warn_caller
from .cache import LRUCache
from .decoding import ANSWERED, DecodedRow, TokenTexts, vocabulary_state
from .markers import TurnMarkers, answer_headers
from .prompt import IGNORE_INDEX, PASS_IT, Prompt
from .templates import read_markers

Words = TypeVar("Words", str, list[int])
_SAYS_NOTHING = -1
# Rows whose turns are remembered: a call asks more than once, and a conversation goes on.
_KEPT_PROMPTS = 256

_ALL_SUPERVISED = (
    "labels supervise every token of the prompt, so that nothing is left that is not an answer. Set labels to "
    f"{IGNORE_INDEX} at the prompt's tokens, give patch_model a processor whose chat template announces users "
    "(processor=...), wrap the collator in emma_adapter.InstructionCollator, or name the instruction: " + PASS_IT
)

_TRAINS_PROMPT = (
    "labels supervise the instruction too: the model is trained to predict words that the images already know. "
    f"Set labels to {IGNORE_INDEX} at the prompt's tokens: in TRL, use prompt and completion columns, or "
    "assistant_only_loss=True"
)

_OTHER_TEMPLATE = (
    "nothing in the prompt looks like what the processor's chat template writes around a user's turn: all of the "
    "prompt's words, role words among them, are taken for the instruction, and instruction_policy has no effect. Make "
    "prompts with processor.apply_chat_template, give patch_model the processor that makes them, or " + PASS_IT
)

_UNKNOWN_TOKENS = (
    "the prompt has tokens that the tokenizer which patch_model was given doesn't know; they are left out of the "
    "instruction. A model that was pickled has a copy of the tokenizer: give the one that makes the prompts, "
    "load_adapter(model, …, processor=processor), or " + PASS_IT
)


@dataclass(frozen=True)
class _Turn:
    """``words``: positions in a row's tokens; none if only an image was sent, or if labels supervise the words."""

    words: list[int]
    supervised: bool = False


@dataclass(frozen=True)
class _Known:
    """What a reader has learned of its processor, as that was then."""

    of: tuple[object, ...]
    texts: TokenTexts
    markers: TurnMarkers | None
    found: LRUCache[list[_Turn]]


class InstructionReader:
    """Finds the instruction in a prompt.

    With a processor whose chat template tells turns apart: what users wrote, without system prompts, tools' results,
    placeholders and special tokens. Without, or where the template's markers are not in the prompt: every token
    of it except special, placeholder and padding tokens (system text and role words included). Answers, which
    ``labels`` supervise or ``assistant_mask`` marks, are never read.

    A processor's prompt without the template's markers may be a question that somebody typed: a warning says that it is
    read whole. If it shows answers of the assistant, its turns would have to be known, and it is refused.

    The processor is the user's, also in a copy of the reader: another template, or tokens that are added to its
    tokenizer later, count from then on. What a tokenizer doesn't know is no word.

    Labels that supervise every word of a row don't tell which is the answer. Such a row is taken for a conversation of
    the template, and only what users say before its first answer is read: later turns could be words of an answer. So
    is a training call without labels, where the template announces turns by words ("USER:") and doesn't close answers.

    A turn without words is a turn: as the last one its instruction is empty. ``shortest_turn`` is the shortest of
    those with words.

    Limits: typed text that tokenizes to the template's own markers ends or begins a turn there. A token that
    holds the end of a marker and the start of a user's word is read whole. System text that a template joins to the
    user's words by white space alone is read, unless it is one of ``system_prompts``.

    Args:
        processor: a processor or tokenizer; None if there is none.
        special_ids: token ids that are never part of an instruction, beside the tokenizer's own special tokens.
        policy: which turns of a conversation are the instruction.
        system_prompts: known system prompts.
    """

    def __init__(
        self,
        processor: Any,
        special_ids: Iterable[int],
        policy: InstructionPolicy,
        *,
        system_prompts: Sequence[str] = (),
    ) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.policy = policy
        self._special_ids = frozenset(special_ids)
        self._system_prompts = tuple(system_prompts)
        self._known = self._learn()
        self._said: set[str] = set()

    @property
    def markers(self) -> TurnMarkers | None:
        """What the processor's chat template writes around turns; None if that isn't known."""
        return self._current().markers

    @property
    def has_template(self) -> bool:
        return any(getattr(source, "chat_template", None) for source in (self.processor, self.tokenizer))

    def with_policy(self, policy: InstructionPolicy) -> InstructionReader:
        """The same reader for another policy."""
        other = copy.copy(self)
        other.policy = policy
        other._said = set()
        return other

    def __deepcopy__(self, memo: dict[int, object]) -> InstructionReader:
        # The processor stays the user's, whose tokenizer makes the copy's prompts too.
        return self.with_policy(self.policy)

    @property
    def _texts(self) -> TokenTexts:
        return self._current().texts

    def _current(self) -> _Known:
        if self._known.of != self._state_of_processor():
            self._known = self._learn()
        return self._known

    def _learn(self) -> _Known:
        of = self._state_of_processor()
        texts = TokenTexts(self.tokenizer, self._special_ids)
        return _Known(of, texts, read_markers(self.processor, texts, self._system_prompts), LRUCache(_KEPT_PROMPTS))

    def _state_of_processor(self) -> tuple[object, ...]:
        templates = [getattr(source, "chat_template", None) for source in (self.processor, self.tokenizer)]
        # Several templates are in a dictionary, which may change.
        kept = (template if isinstance(template, str) else repr(template) for template in templates)
        return (*kept, *vocabulary_state(self.tokenizer))

    def select(self, prompt: Prompt) -> Tensor:
        """Bool ``[B, L]`` on the CPU: true at tokens of the instruction.

        Raises:
            InstructionError: if answers can't be told from the prompt.
        """
        ids, mask = prompt.input_ids, prompt.attention_mask
        answers = prompt.answers()
        valid = torch.ones(ids.shape, dtype=torch.bool)
        if mask is not None and mask.shape == ids.shape:
            valid = mask.bool().cpu()
        wanted = [True] * len(ids) if prompt.has_media is None else prompt.has_media.tolist()
        selected = torch.zeros(ids.shape, dtype=torch.bool)
        known = self._current()
        unknown_placeholders = prompt.placeholder_ids - known.texts.special_ids
        for placeholder in unknown_placeholders:
            ids = ids.masked_fill(ids == placeholder, _SAYS_NOTHING)
        for row, tokens in enumerate(ids.tolist()):
            if not wanted[row]:
                continue
            where = valid[row].nonzero().flatten().tolist()
            row_answers = None if answers is None else answers[row].tolist()
            # Labels without any answer train nothing; without labels the loss is somebody else's, who knows the answer.
            unknown = prompt.trains and prompt.labels is None and not (row_answers and any(row_answers))
            selected[row, self._select_row(tokens, where, row_answers, known, answer_unknown=unknown)] = True
        return selected

    def texts(self, prompt: Prompt) -> list[str]:
        """The instruction of each row as text, with a space where an image or another turn's end was.

        Raises:
            InstructionError: if there is no tokenizer to decode with.
        """
        texts = []
        for ids, keep in zip(prompt.input_ids.cpu(), self.select(prompt), strict=True):
            chosen = keep.nonzero().flatten()
            gaps = (chosen.diff() > 1).nonzero().flatten() + 1
            texts.append(" ".join(filter(None, self.decode([ids[run] for run in chosen.tensor_split(gaps)]))))
        return texts

    def decode(self, rows: Sequence[Tensor]) -> list[str]:
        return [str(self._need_tokenizer("read token ids").decode(row.tolist())).strip() for row in rows]

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask ``[B, T]`` of texts, in the language model's vocabulary, padded on the right."""
        self._need_tokenizer("turn the text of instruction= into the language model's tokens")
        return pad_right([self._texts.tokenization.ids(text) for text in texts])

    def _need_tokenizer(self, purpose: str) -> Any:
        if self.tokenizer is None:
            raise InstructionError(
                f"a tokenizer is needed to {purpose}: patch_model(model, …, processor=processor), or give "
                "instruction= in the other form (text for a text tower, token ids for the language model's embeddings)"
            )
        return self.tokenizer

    def _select_row(
        self,
        tokens: list[int],
        where: list[int],
        answers: list[bool] | None,
        known: _Known,
        *,
        answer_unknown: bool,
    ) -> list[int]:
        words = [i for i in where if self._is_word(tokens[i], known.texts)]
        # Answers are blanked before the search: what they say must not decide where a turn begins or ends.
        blanked = [ANSWERED if answers is not None and answers[i] else token for i, token in enumerate(tokens)]
        turns: list[_Turn] = []
        if words and answers is not None and all(answers[i] for i in words):
            turns = self._turns(tokens, where, known, before_answers=True)
        if not turns:
            turns = self._turns(blanked, where, known, holds_answers=answer_unknown)
        found = bool(turns)
        if not turns:
            if answer_unknown:
                raise InstructionError(
                    "a training step without labels: the answer can't be told from the instruction, and would leak "
                    "through the image. Pass labels to the model (Trainer takes them away with label smoothing and "
                    "with a custom loss), give patch_model a processor with a chat template, or name the instruction: "
                    + PASS_IT
                )
            turns = _prompt_runs(words, answers)
        if all(turn.supervised for turn in turns):
            raise InstructionError(_ALL_SUPERVISED)
        if not found and self.processor is not None:
            self._check_read_whole([blanked[i] for i in where], known)
        chosen = choose_turns([turn.words for turn in turns if not turn.supervised], self.policy)
        selected = [i for words in chosen for i in words]
        if answers is not None and any(answers[i] for i in selected):
            self.warn_once(_TRAINS_PROMPT)
        return selected

    def _check_read_whole(self, tokens: list[int], known: _Known) -> None:
        """Of a processor's prompt whose turns weren't found, ``ANSWERED`` where its answers are known.

        Raises:
            InstructionError: if it shows answers that aren't.
        """
        said = [token for token in tokens if token == ANSWERED or self._is_word(token, known.texts)]
        if not said:
            return
        row = known.texts.row(tokens)
        after = (first for end in answer_headers(row.text) for first in self._next_word(tokens, row, end, known.texts))
        answered = any(token != ANSWERED for token in after)
        ends = getattr(self.tokenizer, "eos_token_id", None)
        if self.has_template and ANSWERED not in said and ends in tokens:
            # What ends an answer stands between words.
            places = [i for i, token in enumerate(tokens) if self._is_word(token, known.texts)]
            answered = answered or ends in tokens[places[0] : places[-1]]
        if answered:
            raise InstructionError(
                "the prompt shows answers of the assistant, but not what the processor's chat template writes around "
                "a user's turn, so that the answers would be taken for the instruction: make prompts with "
                "processor.apply_chat_template, give patch_model the processor that makes them, or name the "
                "instruction: " + PASS_IT
            )
        # Where nothing announces users, a question without an answer looks like any text.
        if known.markers is not None and not known.markers.headless:
            self.warn_once(_OTHER_TEMPLATE)

    def _next_word(self, tokens: list[int], row: DecodedRow, end: int, texts: TokenTexts) -> list[int]:
        """The first word after a place in the text, ``ANSWERED`` if an answer begins there; none at the end."""
        later = row.tokens([(end, len(row.text))]) if end < len(row.text) else []
        return [tokens[i] for i in later if tokens[i] == ANSWERED or self._is_word(tokens[i], texts)][:1]

    def warn_once(self, message: str) -> None:
        """Warn, unless this reader has said so before."""
        if message not in self._said:
            self._said.add(message)
            warn_caller(message)

    def _turns(
        self,
        tokens: list[int],
        where: list[int],
        known: _Known,
        *,
        before_answers: bool = False,
        holds_answers: bool = False,
    ) -> list[_Turn]:
        """The turns between the template's markers; none if the markers are not known or not there."""
        texts, markers = known.texts, known.markers
        if markers is None:
            return []
        kept = [tokens[i] for i in where]
        key = (array("q", kept).tobytes(), before_answers, holds_answers)
        [turns] = known.found.get_or_compute(
            [key], lambda _: [self._find_turns(kept, texts, markers, before_answers, holds_answers)]
        )
        return [_Turn([where[i] for i in turn.words], turn.supervised) for turn in turns]

    def _find_turns(
        self, tokens: Sequence[int], texts: TokenTexts, markers: TurnMarkers, before_answers: bool, holds_answers: bool
    ) -> list[_Turn]:
        row = texts.row(tokens)
        text = markers.before_answers(row.text) if before_answers else row.text
        turns = []
        for turn in markers.user_turns(text, holds_answers=holds_answers) if text is not None else ():
            words = [i for i in row.tokens(turn.parts) if self._is_word(tokens[i], texts)]
            said = [number for number, i in enumerate(words) if texts(tokens[i])]
            words = words[said[0] : said[-1] + 1] if said else []
            turns.append(_Turn(words, supervised=turn.interrupted and not words))
        return turns

    def _is_word(self, token: int, texts: TokenTexts) -> bool:
        if token < 0 or token in texts.special_ids:
            return False
        if not texts.knows(token):
            self.warn_once(_UNKNOWN_TOKENS)
            return False
        return True


def _prompt_runs(where: list[int], answers: list[bool] | None) -> list[_Turn]:
    """The prompt, cut where answers stand: without a template, labels are what tells turns apart."""
    if answers is None:
        return [_Turn(where)]
    runs: list[list[int]] = [[]]
    answered = 0
    for i in where:
        if answers[i]:
            if runs[-1]:
                runs.append([])
            answered = len(runs) - 1
        else:
            runs[-1].append(i)
    # What follows the last answer is the template's end of the conversation, not a question; but without any
    # answer, or with nothing before the first, the row is all prompt, or all answer.
    turns = runs[:answered] or [run for run in runs if run]
    return [_Turn(run) for run in turns] or [_Turn([], supervised=bool(where))]


def choose_turns(turns: list[Words], policy: InstructionPolicy) -> list[Words]:
    """Those of all user turns, of which there is at least one, that are the instruction."""
    if policy == "all_turns":
        return turns
    if policy == "shortest_turn":
        return [min(filter(None, turns), key=len, default=turns[-1])]
    return turns[-1:]


def pad_right(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask ``[B, T]`` of rows of ids."""
    length = max(1, *map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = True
    return ids, mask
