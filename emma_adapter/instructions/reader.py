"""The tokens of a call that are its instruction."""

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
_NO_TEXT = -1
# Rows whose turns are cached: one call looks them up more than once, and conversations go on.
_CACHED_PROMPTS = 256

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
    """A user's turn; ``words`` are positions in its row, none if only an image was sent or if labels supervise them."""

    words: list[int]
    supervised: bool = False


@dataclass(frozen=True)
class _Known:
    """Facts that a reader has learned about its processor, valid while the processor's state is ``of``.

    ``found`` caches the turns of rows.
    """

    of: tuple[object, ...]
    texts: TokenTexts
    markers: TurnMarkers | None
    found: LRUCache[list[_Turn]]


class InstructionReader:
    """Finds the instruction in a prompt.

    If a processor's chat template tells turns apart, the instruction is what users wrote, without system prompts,
    tools' results, placeholders and special tokens. Without such a processor, or where the template's markers are not
    in the prompt, it is every token of the prompt except special, placeholder and padding tokens (system text and role
    words included). Answers, which ``labels`` supervise or ``assistant_mask`` marks, are never read.

    A prompt without the markers of its processor's template may be a question that somebody typed: a warning says that
    it is read whole. If it shows answers of the assistant, it is refused, as its turns would have to be known.

    Copies of the reader share the user's processor: another template, or tokens added to its tokenizer later, take
    effect at once. Tokens that a tokenizer doesn't know are not words.

    Labels that supervise every word of a row don't show which words are the answer. Such a row is taken for a
    conversation in the template's form, and only users' words before its first answer are read: later turns could be
    part of an answer. The same holds for a training call without labels, if the template announces turns by words
    ("USER:") and doesn't close answers.

    A turn without words counts as a turn: if it is the last, the instruction is empty. ``shortest_turn`` chooses among
    turns with words.

    Limits: typed text that tokenizes to the template's own markers ends or begins a turn there. A token that
    holds the end of a marker and the start of a user's word is read whole. System text that a template joins to the
    user's words by white space alone is read, unless it is one of ``system_prompts``.

    Args:
        processor: a processor or tokenizer; None if there is none.
        special_ids: token ids that are never part of an instruction, beside the tokenizer's own special tokens.
        policy: the turns of a conversation that are the instruction.
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
        """The markers that the processor's chat template writes around turns; None if they aren't known."""
        return self._current().markers

    @property
    def has_template(self) -> bool:
        return any(getattr(source, "chat_template", None) for source in (self.processor, self.tokenizer))

    def with_policy(self, policy: InstructionPolicy) -> InstructionReader:
        """Return the same reader with another policy."""
        reader = copy.copy(self)
        reader.policy = policy
        reader._said = set()
        return reader

    def __deepcopy__(self, memo: dict[int, object]) -> InstructionReader:
        # The processor is not copied: the user's tokenizer makes the copy's prompts too.
        return self.with_policy(self.policy)

    @property
    def _texts(self) -> TokenTexts:
        return self._current().texts

    def _current(self) -> _Known:
        if self._known.of != self._state_of_processor():
            self._known = self._learn()
        return self._known

    def _learn(self) -> _Known:
        processor_state = self._state_of_processor()
        texts = TokenTexts(self.tokenizer, self._special_ids)
        return _Known(
            processor_state, texts, read_markers(self.processor, texts, self._system_prompts), LRUCache(_CACHED_PROMPTS)
        )

    def _state_of_processor(self) -> tuple[object, ...]:
        templates = [getattr(source, "chat_template", None) for source in (self.processor, self.tokenizer)]
        # Several templates come as a dictionary, which may change.
        texts = (template if isinstance(template, str) else repr(template) for template in templates)
        return (*texts, *vocabulary_state(self.tokenizer))

    def select(self, prompt: Prompt) -> Tensor:
        """Return bool ``[B, L]`` on the CPU, true at tokens of the instruction.

        Raises:
            InstructionError: if answers can't be told apart from the instruction.
        """
        ids, mask = prompt.input_ids, prompt.attention_mask
        answers = prompt.answers()
        valid = torch.ones(ids.shape, dtype=torch.bool)
        if mask is not None and mask.shape == ids.shape:
            valid = mask.bool().cpu()
        has_media = [True] * len(ids) if prompt.has_media is None else prompt.has_media.tolist()
        selected = torch.zeros(ids.shape, dtype=torch.bool)
        known = self._current()
        unknown_placeholders = prompt.placeholder_ids - known.texts.special_ids
        for placeholder in unknown_placeholders:
            ids = ids.masked_fill(ids == placeholder, _NO_TEXT)
        for row, tokens in enumerate(ids.tolist()):
            if not has_media[row]:
                continue
            positions = valid[row].nonzero().flatten().tolist()
            row_answers = None if answers is None else answers[row].tolist()
            # Labels without any answer train nothing; without labels, the caller computes a loss and knows the answer.
            answer_unknown = prompt.trains and prompt.labels is None and not (row_answers and any(row_answers))
            selected[row, self._select_row(tokens, positions, row_answers, known, answer_unknown=answer_unknown)] = True
        return selected

    def texts(self, prompt: Prompt) -> list[str]:
        """Return the instruction of each row as text, with a space in place of images and between turns.

        Raises:
            InstructionError: if there is no tokenizer to decode with.
        """
        texts = []
        for ids, selected in zip(prompt.input_ids.cpu(), self.select(prompt), strict=True):
            positions = selected.nonzero().flatten()
            gaps = (positions.diff() > 1).nonzero().flatten() + 1
            texts.append(" ".join(filter(None, self.decode([ids[run] for run in positions.tensor_split(gaps)]))))
        return texts

    def decode(self, rows: Sequence[Tensor]) -> list[str]:
        return [str(self._need_tokenizer("read token ids").decode(row.tolist())).strip() for row in rows]

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return ids and mask ``[B, T]`` of texts, in the language model's vocabulary, padded on the right."""
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
        positions: list[int],
        answers: list[bool] | None,
        known: _Known,
        *,
        answer_unknown: bool,
    ) -> list[int]:
        word_positions = [i for i in positions if self._is_word(tokens[i], known.texts)]
        # Answers are blanked before the search: their words must not decide where a turn begins or ends.
        blanked = [ANSWERED if answers is not None and answers[i] else token for i, token in enumerate(tokens)]
        turns: list[_Turn] = []
        if word_positions and answers is not None and all(answers[i] for i in word_positions):
            turns = self._turns(tokens, positions, known, before_answers=True)
        if not turns:
            turns = self._turns(blanked, positions, known, holds_answers=answer_unknown)
        turns_found = bool(turns)
        if not turns:
            if answer_unknown:
                raise InstructionError(
                    "a training step without labels: the answer can't be told from the instruction, and would leak "
                    "through the image. Pass labels to the model (Trainer takes them away with label smoothing and "
                    "with a custom loss), give patch_model a processor with a chat template, or name the instruction: "
                    + PASS_IT
                )
            turns = _prompt_runs(word_positions, answers)
        if all(turn.supervised for turn in turns):
            raise InstructionError(_ALL_SUPERVISED)
        if not turns_found and self.processor is not None:
            self._check_read_whole([blanked[i] for i in positions], known)
        chosen_turns = choose_turns([turn.words for turn in turns if not turn.supervised], self.policy)
        selected = [i for words in chosen_turns for i in words]
        if answers is not None and any(answers[i] for i in selected):
            self.warn_once(_TRAINS_PROMPT)
        return selected

    def _check_read_whole(self, tokens: list[int], known: _Known) -> None:
        """Warn that a prompt is read whole, as its turns weren't found; ``tokens`` are ``ANSWERED`` at known answers.

        Raises:
            InstructionError: if it shows other answers too.
        """
        word_tokens = [token for token in tokens if token == ANSWERED or self._is_word(token, known.texts)]
        if not word_tokens:
            return
        row = known.texts.row(tokens)
        next_words = (
            word for end in answer_headers(row.text) for word in self._next_word(tokens, row, end, known.texts)
        )
        answered = any(token != ANSWERED for token in next_words)
        ends = getattr(self.tokenizer, "eos_token_id", None)
        if self.has_template and ANSWERED not in word_tokens and ends in tokens:
            # An end token between two words ended an answer.
            word_positions = [i for i, token in enumerate(tokens) if self._is_word(token, known.texts)]
            answered = answered or ends in tokens[word_positions[0] : word_positions[-1]]
        if answered:
            raise InstructionError(
                "the prompt shows answers of the assistant, but not what the processor's chat template writes around "
                "a user's turn, so that the answers would be taken for the instruction: make prompts with "
                "processor.apply_chat_template, give patch_model the processor that makes them, or name the "
                "instruction: " + PASS_IT
            )
        # Where nothing announces users, a question without an answer can't be told from other text.
        if known.markers is not None and not known.markers.headless:
            self.warn_once(_OTHER_TEMPLATE)

    def _next_word(self, tokens: list[int], row: DecodedRow, end: int, texts: TokenTexts) -> list[int]:
        """Return the first word after ``end`` in the text, ``ANSWERED`` if an answer begins there; none at the end."""
        later = row.tokens([(end, len(row.text))]) if end < len(row.text) else []
        return [tokens[i] for i in later if tokens[i] == ANSWERED or self._is_word(tokens[i], texts)][:1]

    def warn_once(self, message: str) -> None:
        """Warn, unless this reader has given the same warning before."""
        if message not in self._said:
            self._said.add(message)
            warn_caller(message)

    def _turns(
        self,
        tokens: list[int],
        positions: list[int],
        known: _Known,
        *,
        before_answers: bool = False,
        holds_answers: bool = False,
    ) -> list[_Turn]:
        """Return the turns between the template's markers; none if the markers are not known or not in the row."""
        texts, markers = known.texts, known.markers
        if markers is None:
            return []
        valid_tokens = [tokens[i] for i in positions]
        key = (array("q", valid_tokens).tobytes(), before_answers, holds_answers)
        [turns] = known.found.get_or_compute(
            [key], lambda _: [self._find_turns(valid_tokens, texts, markers, before_answers, holds_answers)]
        )
        return [_Turn([positions[i] for i in turn.words], turn.supervised) for turn in turns]

    def _find_turns(
        self, tokens: Sequence[int], texts: TokenTexts, markers: TurnMarkers, before_answers: bool, holds_answers: bool
    ) -> list[_Turn]:
        row = texts.row(tokens)
        text = markers.before_answers(row.text) if before_answers else row.text
        turns = []
        for turn in markers.user_turns(text, holds_answers=holds_answers) if text is not None else ():
            words = [i for i in row.tokens(turn.parts) if self._is_word(tokens[i], texts)]
            with_text = [number for number, i in enumerate(words) if texts(tokens[i])]
            words = words[with_text[0] : with_text[-1] + 1] if with_text else []
            turns.append(_Turn(words, supervised=turn.interrupted and not words))
        return turns

    def _is_word(self, token: int, texts: TokenTexts) -> bool:
        if token < 0 or token in texts.special_ids:
            return False
        if not texts.knows(token):
            self.warn_once(_UNKNOWN_TOKENS)
            return False
        return True


def _prompt_runs(word_positions: list[int], answers: list[bool] | None) -> list[_Turn]:
    """Return the prompt cut at its answers: without a template, only labels tell turns apart."""
    if answers is None:
        return [_Turn(word_positions)]
    runs: list[list[int]] = [[]]
    answered = 0
    for i in word_positions:
        if answers[i]:
            if runs[-1]:
                runs.append([])
            answered = len(runs) - 1
        else:
            runs[-1].append(i)
    # What follows the last answer is the template's end of the conversation, not a question; but without any
    # answer, or with nothing before the first, the row is all prompt, or all answer.
    turns = runs[:answered] or [run for run in runs if run]
    return [_Turn(run) for run in turns] or [_Turn([], supervised=bool(word_positions))]


def choose_turns(turns: list[Words], policy: InstructionPolicy) -> list[Words]:
    """Return those of all user turns, of which there is at least one, that are the instruction."""
    if policy == "all_turns":
        return turns
    if policy == "shortest_turn":
        return [min(filter(None, turns), key=len, default=turns[-1])]
    return turns[-1:]


def pad_right(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Pad rows of ids on the right; return ids and mask, ``[B, T]``."""
    length = max(1, *map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = True
    return ids, mask
