"""Options that more than one command has."""

from __future__ import annotations

from pathlib import Path

import click

images_option = click.option(
    "--images", type=click.Path(path_type=Path), help="Folder of the images. Default: that of the data."
)
split_option = click.option("--split", default="train", show_default=True, help="Which split of a dataset.")
subfolder_option = click.option(
    "--subfolder", help="Where the adapter is in its folder or repository, as last-checkpoint."
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Of the base model; auto is what its weights are saved in.",
)
trust_option = click.option(
    "--trust-remote-code", is_flag=True, help="Run the code that the model's folder or repository holds."
)
