"""The frozen vision tower, computed once: the model looks its hidden states up, everything behind it runs as ever."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..pooled_llava import POOLINGS, PooledLlava
from ..runs import Conversation, Data, QuestionSet
from ..vlm import IMAGE

_BATCH = 500


class CachedTower(nn.Module):
    """In the place of the vision tower. "Pixels" ``[B, 1, 1, 1]`` are numbers of pictures, and the answer holds the
    tower's last hidden state but one, class token included, as the tower itself gives it."""

    def __init__(self, hidden_states: Tensor) -> None:
        super().__init__()
        # No buffer: it is neither the model's to save nor to count.
        self._hidden_states = hidden_states

    def forward(self, pixel_values: Tensor, **kwargs: object) -> BaseModelOutputWithPooling:
        found = self._hidden_states[pixel_values.flatten().long()]
        # Any layer but the last one but one is missing, and asking for it fails.
        return BaseModelOutputWithPooling(hidden_states=(found, None))  # type: ignore[arg-type]


@dataclass(frozen=True)
class CachedData:
    """Questions whose ``pixel_values`` are numbers of pictures, and what the tower says of these."""

    data: Data
    hidden_states: Tensor  # [pictures, 1 + N, D]


@torch.no_grad()
def cache_features(model: PooledLlava, data: Data) -> CachedData:
    """The vision tower of ``model`` on every picture in ``data``, once."""
    tower, seen, numbered, first = model.model.vision_tower, [], [], 0
    for part in (data.train, data.test, data.pairs):
        for pixels in part.pixel_values.split(_BATCH):
            seen.append(tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2])
        numbered.append(_numbered(part, first))
        first += len(part.pixel_values)
    return CachedData(Data(*numbered), torch.cat(seen))


def _numbered(part: QuestionSet, first: int) -> QuestionSet:
    numbers = torch.arange(first, first + len(part.pixel_values), dtype=torch.float32)
    # float32 counts exactly up to 2^24.
    assert numbers.numel() == 0 or numbers[-1] < 2**24
    return replace(part, pixel_values=numbers[:, None, None, None])


def use_cached_features(model: PooledLlava, cached: CachedData) -> PooledLlava:
    model.model.vision_tower = CachedTower(cached.hidden_states)
    return model


def with_placeholders(data: Data, pooling: str) -> Data:
    """Prompts with as many image placeholders as a picture has tokens in the language model."""
    pooled_tokens = POOLINGS[pooling].tokens

    def expand(ids: list[int]) -> list[int]:
        return [copy for token in ids for copy in [token] * (pooled_tokens if token == IMAGE else 1)]

    def part(questions: QuestionSet) -> QuestionSet:
        talks = [Conversation(expand(talk.prompt), expand(talk.answered)) for talk in questions.conversations]
        return replace(questions, conversations=talks)

    return Data(part(data.train), part(data.test), part(data.pairs))
