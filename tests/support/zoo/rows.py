"""What a batch is made of: conversations, pictures and videos, all derived from a few numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

FRAMES_PER_SECOND = 2
FRAME_SIZE = (84, 56)


@dataclass(frozen=True)
class Row:
    """One row of a batch: one conversation, in which every user turn but the last was answered with "yes."."""

    turns: tuple[str, ...] = ("what is in the picture?",)
    images: tuple[tuple[int, int], ...] = ()
    """(width, height) in pixels of each picture."""
    videos: tuple[int, ...] = ()
    """Number of frames of each video."""
    seed: int = 0
    """What the pictures show depends on this and on their position in the row, not on the rest of the batch."""
    system: str | None = None
    late_images: bool = False
    """Show pictures and videos in the last user turn instead of the first."""

    def messages(self, answer: str | None = None) -> list[dict[str, Any]]:
        """The conversation as chat templates take it, with an answer to its last turn if there is one."""
        talk: list[dict[str, Any]] = [] if self.system is None else [_message("system", self.system)]
        media = [{"type": "image"}] * len(self.images) + [{"type": "video"}] * len(self.videos)
        shown_in = len(self.turns) - 1 if self.late_images else 0
        for number, text in enumerate(self.turns):
            if number:
                talk.append(_message("assistant", "yes."))
            talk.append(_message("user", text, media if number == shown_in else []))
        return talk if answer is None else [*talk, _message("assistant", answer)]

    def pictures(self) -> list[Image.Image]:
        return [
            Image.fromarray(_noise((self.seed, 0, position), height, width))
            for position, (width, height) in enumerate(self.images)
        ]

    def clips(self) -> list[np.ndarray]:
        """Each video, ``[frames, height, width, 3]``."""
        width, height = FRAME_SIZE
        return [_noise((self.seed, 1, position), frames, height, width) for position, frames in enumerate(self.videos)]

    def clip_metadata(self) -> list[dict[str, Any]]:
        return [
            {"total_num_frames": frames, "fps": FRAMES_PER_SECOND, "frames_indices": list(range(frames))}
            for frames in self.videos
        ]


def _message(role: str, text: str, media: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {"role": role, "content": [*(media or []), {"type": "text", "text": text}]}


def _noise(seed: tuple[int, ...], *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
