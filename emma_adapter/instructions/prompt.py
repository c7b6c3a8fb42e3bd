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
    labels: Tensor | None = None  # [B, L]; -100 at tokens outside answers
    assistant_mask: Tensor | None = None  # [B, L]; 1 at the assistant's answers
    #: True if the call trains the model: then its ids contain the answer.
    trains: bool = False
    #: Bool ``[B]``: rows with images. The others need no instruction, and none is looked for.
    has_media: Tensor | None = None
    #: Token ids that stand for images and videos, which not every vocabulary knows.
    placeholder_ids: frozenset[int] = frozenset()

    def answers(self) -> Tensor | None:
        """Return bool ``[B, L]`` on the CPU, true where labels or the assistant mask mark answers; None without both.

        Raises:
            InstructionError: if one of them isn't shaped like the ids.
        """
        answers = None
        for name, marks, ignored in (
            ("labels", self.labels, IGNORE_INDEX),
            ("the assistant mask", self.assistant_mask, 0),
        ):
            if marks is None:
                continue
            if not isinstance(marks, Tensor) or marks.shape != self.input_ids.shape:
                shape = list(marks.shape) if isinstance(marks, Tensor) else f"(a {type(marks).__name__})"
                raise InstructionError(
                    f"{name} {shape} and input_ids {list(self.input_ids.shape)} differ in shape, so that "
                    f"answers can't be told from the instruction; {PASS_IT}"
                )
            is_answer = (marks != ignored).cpu()
            answers = is_answer if answers is None else answers | is_answer
        return answers
