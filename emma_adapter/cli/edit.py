"""``emma-adapter edit``: change pictures as an instruction says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from .drawing import Drawing, drawing_options, side


@click.command()
@click.argument("instruction")
@click.argument(
    "images", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path, dir_okay=False), metavar="IMAGE..."
)
@drawing_options
@click.option("--together", is_flag=True, help="One picture from all IMAGEs, instead of one from each.")
@click.option(
    "--image-guidance-scale", default=2.0, show_default=True, type=click.FloatRange(0), help="By the image; 1 is none."
)
@click.option("--height", type=side, help="In pixels. Default: the image's.")
@click.option("--width", type=side, help="In pixels. Default: the image's.")
def edit(
    instruction: str,
    images: Sequence[Path],
    together: bool,
    image_guidance_scale: float,
    height: int | None,
    width: int | None,
    **settings: Any,
) -> None:
    """Change each IMAGE as the INSTRUCTION says, with a model that learned to.

    A PNG tells in its metadata how it was made.
    """
    from ..data.images import open_image

    opened = [open_image(str(path), Path(), "the command line") for path in images]
    drawing = Drawing(**settings)
    for number, references in enumerate([opened] if together else [[image] for image in opened]):
        drawing.draw(
            number, instruction, references, image_guidance_scale=image_guidance_scale, height=height, width=width
        )
