"""``emma-adapter report``: show on one page what an adapter does, or what a model draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from .drawing import side
from .options import device_option, dtype_option, images_option, split_option, subfolder_option, trust_option
from .report_alignment import report_alignment
from .report_unified import report_unified

_OF_ALIGNMENT = ("limit", "max_new_tokens", "batch_size", "instruction_encoder")
_OF_UNIFIED = (
    "autoencoder",
    "experts",
    "seed",
    "height",
    "width",
    "steps",
    "guidance_scale",
    "image_guidance_scale",
    "previews",
    "amplification",
)


@click.command()
@click.option("--model", required=True, help="The base model: a folder or a hub id.")
@click.option("--adapter", required=True, help="The adapter, or what draws: a folder or a hub id.")
@subfolder_option
@click.option(
    "--data",
    required=True,
    help="Questions: a .jsonl or .json file, a folder that holds questions.jsonl, or a dataset. With --unified: "
    "prompts, in a file or a dataset.",
)
@click.option("--output", default="report.html", show_default=True, type=click.Path(path_type=Path, dir_okay=False))
@images_option
@split_option
@click.option(
    "--show",
    default=8,
    show_default=True,
    type=click.IntRange(1),
    help="Questions shown with their answers. With --unified: rows that are drawn.",
)
@click.option("--limit", default=256, show_default=True, type=click.IntRange(1), help="Read at most this many rows.")
@click.option("--max-new-tokens", default=32, show_default=True, type=click.IntRange(1), help="Most per answer.")
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(1))
@click.option(
    "--instruction-encoder", help="Where the adapter's text tower is, if it has moved since the adapter was saved."
)
@click.option("--unified", is_flag=True, help="Show what a model draws instead.")
@click.option("--autoencoder", help="With --unified: a folder or a hub id. Default: the one it was trained with.")
@click.option("--experts", help="With --unified: vision experts, a folder or a hub id.")
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0, 2**62),
    help="With --unified: seed of the first row; each further row's is one greater.",
)
@click.option("--height", type=side, help="With --unified: in pixels. Default: 512, or an edit's image's.")
@click.option("--width", type=side, help="With --unified: likewise.")
@click.option(
    "--steps", default=20, show_default=True, type=click.IntRange(1), help="With --unified: steps of Euler's rule."
)
@click.option(
    "--guidance-scale",
    default=3.0,
    show_default=True,
    type=click.FloatRange(0),
    help="With --unified: by the text; 1 is none.",
)
@click.option(
    "--image-guidance-scale",
    default=2.0,
    show_default=True,
    type=click.FloatRange(0),
    help="With --unified: by the image; 1 is none.",
)
@click.option(
    "--previews", default=4, show_default=True, type=click.IntRange(0), help="With --unified: number of steps to show."
)
@click.option(
    "--amplification",
    default=4.0,
    show_default=True,
    type=click.FloatRange(1, 255),
    help="With --unified: of the difference between an edit and its image.",
)
@device_option
@dtype_option
@trust_option
def report(unified: bool, output: Path, **settings: Any) -> None:
    """Show what an adapter does, on one HTML page.

    The page has answers with it and without, maps over the images, what it reads of the instructions, and what can be
    read from the visual tokens. A row of the data: {"image": "PATH", "question": "...", "answer": "...", "attribute":
    "..."}; the answer and the attribute (what is asked, in few words) may be missing. Or conversations as for finetune.

    With --unified: prompts and the pictures that are drawn, edits beside their images and the difference, pictures
    at intermediate steps, and which vision expert took an image. A row of the data: {"prompt": "...", "image": "PATH",
    "target": "PATH"}; the image to edit and the target may be missing.
    """
    context = click.get_current_context()
    for name in _OF_ALIGNMENT if unified else _OF_UNIFIED:
        del settings[name]
        if context.get_parameter_source(name) not in (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP):
            flag = f"--{name.replace('_', '-')}"
            why = "has no effect on drawing: leave it or --unified out" if unified else "needs --unified"
            raise click.UsageError(f"{flag} {why}")
    _require_packages()
    # Checked before minutes of work.
    if not output.absolute().parent.is_dir():
        raise click.UsageError(
            f"there is no folder {output.parent} to write {output.name} to: make it, or choose another"
        )
    (report_unified if unified else report_alignment)(output=output, **settings)


def _require_packages() -> None:
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise click.UsageError(f'report needs more packages: pip install "emma_adapter[report]" ({error})') from error
