"""``emma-adapter report``: what an adapter does, on one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import (
    chosen_device,
    device_option,
    dtype_option,
    images_option,
    split_option,
    subfolder_option,
    trust_option,
)

if TYPE_CHECKING:
    from ..data.rows import Rows
    from ..report import Question


@click.command()
@click.option("--model", required=True, help="The base model: a folder or a hub id.")
@click.option("--adapter", required=True, help="The adapter: a folder or a hub id.")
@subfolder_option
@click.option(
    "--data",
    required=True,
    help="Questions: a .jsonl or .json file, a folder that holds questions.jsonl, or a dataset.",
)
@click.option("--output", default="report.html", show_default=True, type=click.Path(path_type=Path, dir_okay=False))
@images_option
@split_option
@click.option("--limit", default=256, show_default=True, type=click.IntRange(1), help="Read the first so many rows.")
@click.option(
    "--show", default=8, show_default=True, type=click.IntRange(1), help="Questions shown with their answers."
)
@click.option("--max-new-tokens", default=32, show_default=True, type=click.IntRange(1), help="Of each answer.")
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(1))
@click.option(
    "--instruction-encoder", help="Where the adapter's text tower is now, if elsewhere than when it was saved."
)
@device_option
@dtype_option
@trust_option
def report(
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
    """Show what an adapter does, on one HTML page.

    Answers with it and without, maps over the images, what it reads of the instructions, and what the visual tokens
    tell. A row of the data: {"image": "PATH", "question": "...", "answer": "...", "attribute": "..."}, of which the
    answer and the attribute (what is asked, in few words) may be missing; or conversations as for finetune.
    """
    _require_packages()
    # Before minutes of work.
    if not output.absolute().parent.is_dir():
        raise click.UsageError(
            f"there is no folder {output.parent} to write {output.name} to: make it, or choose another"
        )
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
    found = make_report(
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
    output.write_text(render(found), encoding="utf-8")
    click.echo(f"Saved to {output}: {found.rows - found.imageless:,} questions, {len(found.examples)} of them shown")


def _require_packages() -> None:
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise click.UsageError(f'report needs more packages: pip install "emma_adapter[report]" ({error})') from error


class _Questions(Sequence["Question"]):
    """The first rows as questions, whose images are opened when they are asked for."""

    def __init__(self, rows: Rows, limit: int) -> None:
        self._rows = rows
        self._length = min(len(rows), limit)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: Any) -> Any:
        from ..report import Question

        messages = self._rows.messages(number, answered=False)
        last = max(place for place, message in enumerate(messages) if message["role"] == "user")
        # What comes after the question is the answer, and no part of the prompt.
        replies = [part["text"] for message in messages[last + 1 :] for part in message["content"]]
        return Question(
            messages=messages[: last + 1],
            images=self._rows.images(number),
            answer="\n".join(replies) if replies else None,
            attribute=self._rows.label(number, "attribute"),
            pair=self._rows.label(number, "pair"),
        )
