"""``emma-adapter report``: show what an adapter does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import chosen_device

if TYPE_CHECKING:
    from ..data.rows import Rows
    from ..report import Question


def report_alignment(
    *,
    model: str,
    adapter: str,
    subfolder: str | None,
    data: str,
    output: Path,
    images: Path | None,
    split: str,
    limit: int,
    show: int,
    max_new_tokens: int,
    batch_size: int,
    instruction_encoder: str | None,
    device: str | None,
    dtype: str,
    trust_remote_code: bool,
) -> None:
    """Write the page about an adapter; the arguments are the command's options."""
    from ..adapter.loading import load_adapter
    from ..data.rows import open_rows
    from ..models.loading import load_model, load_processor
    from ..report import make_report, render

    place = chosen_device(device)
    rows = open_rows(data, split, images)
    processor = load_processor(model, trust_remote_code=trust_remote_code)
    base = load_model(model, dtype, trust_remote_code=trust_remote_code).to(place).eval()
    handle = load_adapter(
        base, adapter, subfolder=subfolder, processor=processor, instruction_encoder=instruction_encoder
    )
    report = make_report(
        handle,
        processor,
        _Questions(rows, limit),
        model_name=model,
        adapter_name=adapter,
        show=show,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        watch=lambda label, items: click.progressbar(items, label=label),
    )
    output.write_text(render(report), encoding="utf-8")
    click.echo(f"Saved to {output}: {report.rows - report.imageless:,} questions, {len(report.examples)} of them shown")


class _Questions(Sequence["Question"]):
    """The first rows as questions, whose images are opened on demand."""

    def __init__(self, rows: Rows, limit: int) -> None:
        self._rows = rows
        self._length = min(len(rows), limit)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: Any) -> Any:
        from ..report import Question

        messages = self._rows.messages(number, answered=False)
        last = max(place for place, message in enumerate(messages) if message["role"] == "user")
        # Messages after the question are the answer, and no part of the prompt.
        replies = [part["text"] for message in messages[last + 1 :] for part in message["content"]]
        return Question(
            messages=messages[: last + 1],
            images=self._rows.images(number),
            answer="\n".join(replies) if replies else None,
            attribute=self._rows.label(number, "attribute"),
            pair=self._rows.label(number, "pair"),
        )
