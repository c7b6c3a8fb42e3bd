"""The text side of one call: its token ids, and which of them are answers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..errors import InstructionError

IGNORE_INDEX = -100
PASS_IT = 'pass it: model(**inputs, instruction=["…", …]) or model.generate(**inputs, instruction=["…", …])'


@dataclass(frozen=True)
class Prompt:
    """The text side of one call. ``labels`` and ``assistant_mask`` are the call's, if it has any."""

    input_ids: Tensor  # [B, L]
    attention_mask: Tensor | None = None  # [B, L]; ignored if it has another shape
    labels: Tensor | None = None  # [B, L]; -100 at what is not an answer
    assistant_mask: Tensor | None = None  # [B, L]; 1 at what the assistant said
    #: True if the call trains the model: then its ids contain the answer.
    trains: bool = False
    #: Bool ``[B]``: rows with images. The others need no instruction, and none is looked for.
    has_media: Tensor | None = None
    #: Token ids that stand for images and videos, which not every vocabulary knows.
    placeholder_ids: frozenset[int] = frozenset()

    def answers(self) -> Tensor | None:
        """Bool ``[B, L]`` on the CPU: true where labels or the assistant mask say that an answer is. None without both.

        Raises:
            InstructionError: if one of them isn't shaped like the ids.
        """
        answers = None
        for name, given, ignored in (
            ("labels", self.labels, IGNORE_INDEX),
            ("the assistant mask", self.assistant_mask, 0),
        ):
            if given is None:
                continue
            if not isinstance(given, Tensor) or given.shape != self.input_ids.shape:
                found = list(given.shape) if isinstance(given, Tensor) else f"(a {type(given).__name__})"
                raise InstructionError(
                    f"{name} {found} and input_ids {list(self.input_ids.shape)} differ in shape, so that "
                    f"answers can't be told from the instruction; {PASS_IT}"
                )
            marked = (given != ignored).cpu()
            answers = marked if answers is None else answers | marked
        return answers
