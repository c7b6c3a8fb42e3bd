"""Pictures of what was drawn: prompt and picture; source, wanted and got."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from .captions import DRAW
from .runs import Drawn
from .scenes import render

_RIGHT, _WRONG = "#1a7f37", "#c1121f"


def draw_prompts(drawn: Sequence[Drawn], path: Path, *, each: int = 4) -> None:
    """The first pictures of each, under their prompts; a red frame where the judge reads anything else."""
    each = min(each, *(len(one.prompts) for one in drawn))
    figure, axes = plt.subplots(len(drawn), each, figsize=(3.2 * each, 4.1 * len(drawn)), squeeze=False)
    figure.subplots_adjust(left=0.02, right=0.98, top=0.86, bottom=0.02, wspace=0.12, hspace=0.5)
    for row, one in zip(axes, drawn, strict=True):
        for i, axis in enumerate(row):
            _show(axis, one.pictures[i], right=one.scores["whole scene"][i] == 1)
            phrases = one.prompts[i].removeprefix(f"{DRAW} ").split(" , ")
            axis.set_title("\n".join(fill(", ".join(phrases), 42).splitlines()), fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_edits(drawn: Sequence[Drawn], path: Path, *, each: int = 6) -> None:
    """Source, wanted and got of the first edits of each; a red frame where the judge reads anything else."""
    rows, each = 3 * len(drawn), min(each, *(len(one.prompts) for one in drawn))
    figure, axes = plt.subplots(rows, each, figsize=(2.2 * each, 2.45 * rows), squeeze=False)
    figure.subplots_adjust(left=0.06, right=0.99, top=0.96, bottom=0.01, wspace=0.08, hspace=0.12)
    for block, one in enumerate(drawn):
        assert one.edits is not None
        sources, wanted = render(one.edits.before), render(one.edits.after)
        for i in range(each):
            column = axes[3 * block : 3 * block + 3, i]
            column[0].set_title(fill(one.prompts[i], 26), fontsize=9)
            _show(column[0], sources[i])
            _show(column[1], wanted[i])
            _show(column[2], one.pictures[i], right=one.scores["whole scene"][i] == 1)
        for axis, name in zip(axes[3 * block : 3 * block + 3, 0], ("source", "wanted", "got"), strict=True):
            axis.set_ylabel(name, fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _show(axis: Axes, picture: Tensor, *, right: bool | None = None) -> None:
    axis.imshow(np.asarray(picture.permute(1, 2, 0)), interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(right is not None)
        spine.set_color(_RIGHT if right else _WRONG)
        spine.set_linewidth(2.5)
