"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

images_option = click.option(
    "--images", type=click.Path(path_type=Path), help="Folder of the images. Default: the folder of the data."
)
split_option = click.option("--split", default="train", show_default=True, help="Which split of a dataset.")
subfolder_option = click.option("--subfolder", help="Subfolder that holds the adapter, such as last-checkpoint.")
device_option = click.option("--device", help="Default: cuda if there is one, else cpu.")
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Dtype of the base model; auto is that of its saved weights.",
)
trust_option = click.option(
    "--trust-remote-code", is_flag=True, help="Run the code that the model's folder or repository holds."
)


def chosen_device(name: str | None) -> Any:
    """Return the device that ``--device`` names, or the default.

    Raises:
        click.UsageError: if it can't be used.
    """
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise click.UsageError(f"--device {name} can't be used: {str(error).splitlines()[0]}") from error
    return device
