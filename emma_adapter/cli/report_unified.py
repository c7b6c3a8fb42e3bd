"""``emma-adapter report --unified``: show what a model draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .drawing import load_drawing_model
from .options import chosen_device


def report_unified(
    *,
    model: str,
    adapter: str,
    subfolder: str | None,
    data: str,
    output: Path,
    images: Path | None,
    split: str,
    experts: str | None,
    autoencoder: str | None,
    steps: int,
    device: str | None,
    dtype: str,
    trust_remote_code: bool,
    **settings: Any,
) -> None:
    """Write the page about a model that draws; the arguments are the command's options."""
    from ..data.drawings import open_drawings
    from ..experts.loading import load_vision_experts
    from ..report import make_drawing_report, render

    place = chosen_device(device)
    rows = open_drawings(data, split, images, learned=False)
    unified = load_drawing_model(
        model,
        adapter,
        subfolder=subfolder,
        autoencoder=autoencoder,
        device=place,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    if experts is not None:
        load_vision_experts(unified.model, experts)
    # One bar for all pictures is shown instead.
    unified.set_progress_bar_config(disable=True)
    report = make_drawing_report(
        unified,
        rows,
        model_name=model,
        adapter_name=adapter,
        num_inference_steps=steps,
        watch=lambda label, items: click.progressbar(items, label=label),
        **settings,
    )
    output.write_text(render(report), encoding="utf-8")
    click.echo(f"Saved to {output}: {len(report.drawn):,} of {report.rows:,} rows drawn")
