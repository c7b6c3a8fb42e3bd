"""``emma-adapter draw``: draw pictures from prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from .drawing import Drawing, drawing_options, side


@click.command()
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@drawing_options
@click.option("--height", default=512, show_default=True, type=side, help="In pixels.")
@click.option("--width", default=512, show_default=True, type=side, help="In pixels.")
def draw(prompts: Sequence[str], height: int, width: int, **settings: Any) -> None:
    """Draw pictures from prompts, with a model that learned to.

    Each PROMPT makes one picture, or --num-images of them. A PNG tells in its metadata how it was made, with names that
    other tools know: prompt, seed, steps.
    """
    drawing = Drawing(**settings)
    for number, prompt in enumerate(prompts):
        drawing.draw(number, prompt, height=height, width=width)
