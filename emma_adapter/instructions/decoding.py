"""Token ids as text in which a template's markers can be searched, with a way back from text to tokens."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from .tokenization import Tokenization

#: Token id in the place of an answer that is known from labels. Every other negative id has no text.
ANSWERED = -(2**63)
#: Text of a run of :data:`ANSWERED`: no marker is found inside or across it.
BARRIER = "\0"
#: Precedes the text of a special token, so that the same characters typed by a user are not taken for it.
SPECIAL = "\1"
_CONTROL = str.maketrans("", "", BARRIER + SPECIAL)
# No template writes a special token this often in a row, but placeholders come by the thousand.
_SHORTEST_RUN = 4
# A character has at most four bytes; a token may hold the end of one and the start of the next.
_MOST_TOKENS_OF_CHARACTERS = 16
_BROKEN = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class DecodedRow:
    """The text of a row of tokens, without white space, which tokenizers add and drop.

    Consecutive tokens are grouped where they only make sense together: the bytes of one character, a run of
    placeholders, an answer. ``first[g]`` is the first token of group g and ``offset[g]`` its first character; both
    have one more entry for the end.
    """

    text: str
    first: list[int]
    offset: list[int]

    def tokens(self, parts: Sequence[tuple[int, int]]) -> list[int]:
        """Return the positions of tokens that hold a character of ``parts``, or white space inside a part.

        Args:
            parts: ``(start, end)`` in ``text``, in order, none of them empty.
        """
        groups = {
            group
            for start, end in parts
            for group in range(bisect_right(self.offset, start) - 1, bisect_left(self.offset, end))
        }
        return [i for group in sorted(groups) for i in range(self.first[group], self.first[group + 1])]


class TokenTexts:
    """The text of each token of a tokenizer.

    Each distinct token is decoded once, whatever its position: only the white space of a token's text depends on its
    neighbours, and white space is removed.
    """

    def __init__(self, tokenizer: Any, special_ids: Iterable[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.tokenization = Tokenization(tokenizer)
        self.special_ids = frozenset(special_ids) | _special_ids(tokenizer)
        self._texts: dict[int, str] = {ANSWERED: BARRIER}
        self._known: dict[int, bool] = {}

    def __call__(self, token: int) -> str:
        """Return the token's characters without white space; ``SPECIAL`` precedes those of a special token."""
        text = self._texts.get(token)
        if text is None:
            text = self._decode([token])
            if text and token in self.special_ids:
                text = SPECIAL + text
            self._texts[token] = text
        return text

    def row(self, tokens: Sequence[int]) -> DecodedRow:
        first, texts = [], []
        start, length = 0, len(tokens)
        while start < length:
            token = tokens[start]
            text = self(token)
            end = start + 1
            if token == ANSWERED or token in self.special_ids:
                while end < length and tokens[end] == token:
                    end += 1
                if token != ANSWERED and end - start < _SHORTEST_RUN:
                    end = start + 1
            elif _BROKEN in text:
                text, end = self._whole_characters(tokens, start)
            first.append(start)
            texts.append(text)
            start = end
        return DecodedRow("".join(texts), [*first, length], [0, *accumulate(map(len, texts))])

    def knows(self, token: int) -> bool:
        """Return whether the tokenizer has this token; true if there is no tokenizer."""
        known = self._known.get(token)
        if known is None:
            known = self._known[token] = self.tokenizer is None or _has_token(self.tokenizer, token)
        return known

    def vocabulary(self) -> list[str]:
        """Return the texts of all tokens; empty if the tokenizer doesn't list them."""
        return list(getattr(self.tokenizer, "get_vocab", dict)())

    def of_text(self, text: str) -> str:
        """Return ``text`` as it appears in a decoded row: tokenized, and decoded again."""
        return self.row(self.tokenization.ids(text)).text

    def _whole_characters(self, tokens: Sequence[int], start: int) -> tuple[str, int]:
        """Return the text of the fewest tokens from ``start`` on that form whole characters, and where they end."""
        text, end = "", start
        while end < min(len(tokens), start + _MOST_TOKENS_OF_CHARACTERS) and _BROKEN in self(tokens[end]):
            end += 1
            text = self._decode(tokens[start:end])
            if _BROKEN not in text:
                break
        return text, end

    def _decode(self, tokens: Sequence[int]) -> str:
        decodable = [token for token in tokens if token >= 0]
        if not decodable:
            return ""
        text = str(self.tokenizer.decode(decodable, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        return "".join(text.split()).translate(_CONTROL)


def vocabulary_state(tokenizer: Any) -> tuple[object, ...]:
    """Return a value that changes when tokens are added to a tokenizer, without the cost of listing them."""
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else None
    return size, tuple(getattr(tokenizer, "all_special_ids", ()))


def _has_token(tokenizer: Any, token: int) -> bool:
    if not hasattr(tokenizer, "__len__") or token < len(tokenizer):
        return True
    try:
        # Some vocabularies have gaps, so that their last tokens lie beyond their size.
        return tokenizer.convert_ids_to_tokens(token) is not None
    except (KeyError, IndexError, ValueError, TypeError, AttributeError):
        return False


def _special_ids(tokenizer: Any) -> frozenset[int]:
    # A template's own tokens are flagged in the vocabulary, but often have no attribute such as eos_token.
    added = getattr(tokenizer, "added_tokens_decoder", {})
    flagged = {token_id for token_id, token in added.items() if getattr(token, "special", False)}
    return frozenset(getattr(tokenizer, "all_special_ids", ())) | flagged
