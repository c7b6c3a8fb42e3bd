"""make_drawing_report, which computes a report from a model that draws and rows of prompts."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from ..experts.handle import EmmaVisionExperts
from ..experts.scopes import RoutingReport
from ..experts.state import STATE_ATTRIBUTE
from ..messages import shown
from ..unified.flow import clean_estimate
from ..unified.handle import EmmaUnified
from ..unified.losses import random_normal
from ..unified.pictures import converted, output_size, reference_lists, rgb
from ..unified.prompts import check_placeholders, check_prompts
from ..unified.state import unified_state
from .adapter_facts import facts_of_drawing
from .compute import Watch, unwatched
from .drawing_contents import Difference, DrawingReport, Drawn, Preview
from .questions import spread


class Rows(Protocol):
    """Rows by number, such as a list; each is read when it is needed."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Mapping[str, Any]: ...


@dataclass(frozen=True, eq=False)
class _Row:
    prompt: str
    sources: list[Any]
    target: Any


def make_drawing_report(
    unified: EmmaUnified,
    rows: Rows,
    *,
    model_name: str = "model",
    adapter_name: str = "adapter",
    show: int = 8,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 20,
    guidance_scale: float = 3.0,
    image_guidance_scale: float = 2.0,
    previews: int = 4,
    amplification: float = 4.0,
    watch: Watch | None = None,
) -> DrawingReport:
    """Draw rows of prompts, and return everything that the page shows. The model is left as it was.

    Each row is drawn by itself, with Euler's rule and noise of its own seed, so that its picture doesn't depend on
    which other rows are shown. Rows with reference pictures are edits.

    Args:
        unified: of a model; see :func:`~emma_adapter.load_unified`.
        rows: ``{"prompt": …, "image"?: …, "target"?: …}``: a text, a PIL image or a list of them, and a PIL image of
            the desired result. Only rows that are shown are read.
        model_name: for the page.
        adapter_name: for the page.
        show: how many rows to draw, spread over the data.
        seed: of the first row of the data; each other row's seed is greater by its place.
        height: in pixels; default: that of :meth:`EmmaUnified.generate_images`.
        width: likewise.
        num_inference_steps: of the solver.
        guidance_scale: of the text; 1 means no guidance.
        image_guidance_scale: of reference pictures; 1 means no guidance.
        previews: how many steps to show, spread over all but the last, which ends in the picture itself.
        amplification: factor of the differences between edits and their sources.
        watch: shows the progress; default: nothing does.

    Raises:
        ConfigError: if an argument has a value that is not allowed.
        DataError: if there is no row, or one can't be used.
        ShapeError: if a size is not a multiple of the autoencoder's compression.
        AutoencoderError: if a picture has NaN or infinite values.
    """
    for name, value, least in (("show", show, 1), ("previews", previews, 0), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} must be an integer >= {least}; got {shown(value)}")
    if isinstance(amplification, bool) or not isinstance(amplification, (int, float)) or not 1 <= amplification <= 255:
        raise ConfigError(f"amplification must be a number from 1 to 255; got {shown(amplification)}")
    if not len(rows):
        raise DataError('there are no rows to draw: give at least one {"prompt": "…"}')
    settings = {
        "height": height,
        "width": width,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "image_guidance_scale": image_guidance_scale,
    }
    places = spread(range(len(rows)), show)
    # Every error in the rows is raised now, before minutes of drawing.
    for place in places:
        _read(unified, rows, place)
    experts = EmmaVisionExperts(unified.model) if STATE_ATTRIBUTE in vars(unified.model) else None
    draw = partial(_draw, unified, experts, settings=settings, previews=previews, amplification=amplification)
    with (unwatched if watch is None else watch)("Drawing", places) as watched:
        drawn = [draw(_read(unified, rows, place), place, seed + place) for place in watched]
    sides = [f"{name} {side}" for name, side in (("height", height), ("width", width)) if side is not None]
    return DrawingReport(
        model=model_name,
        adapter=adapter_name,
        facts=facts_of_drawing(unified, experts),
        settings={
            "Seed": f"{seed}, plus a row's place in the data, from 0",
            "Steps": f"{num_inference_steps}, by Euler's rule",
            "Guidance": f"{guidance_scale:g} of the text; of edits also {image_guidance_scale:g} of the picture",
            "Size": ", ".join(sides) or "512 × 512; of edits the picture's, to the autoencoder's multiples",
        },
        rows=len(rows),
        drawn=drawn,
        amplification=float(amplification),
        margin=None if experts is None else experts.margin,
    )


def _read(unified: EmmaUnified, rows: Rows, place: int) -> _Row:
    row = rows[place]
    if not isinstance(row, Mapping):
        raise DataError(f'row {place + 1} is {shown(row)}; a row is {{"prompt": …}}, and may have "image" and "target"')
    try:
        check_prompts([row.get("prompt")])
        check_placeholders(unified_state(unified.model).processor, row["prompt"])
        target = None if row.get("target") is None else rgb(row["target"])
        return _Row(row["prompt"], reference_lists([row.get("image")], 1)[0], target)
    except DataError as error:
        raise DataError(f"row {place + 1} can't be drawn: {error}") from error


def _draw(
    unified: EmmaUnified,
    experts: EmmaVisionExperts | None,
    row: _Row,
    place: int,
    seed: int,
    *,
    settings: Mapping[str, Any],
    previews: int,
    amplification: float,
) -> Drawn:
    sources = row.sources
    # The noise that generate_images would take from this generator.
    channels, compression = unified.config.latent_channels, unified.config.compression
    assert channels is not None and compression is not None
    size = output_size(settings["height"], settings["width"], [sources], compression)
    shape = (channels, *(side // compression for side in size))
    noise = random_normal(shape, torch.Generator().manual_seed(seed), torch.device("cpu"))[None]
    states, times = [noise], []

    def record(_: Any, step: int, time: float, tensors: dict[str, Tensor]) -> None:
        times.append(time)
        states.append(tensors["latents"].cpu())

    with nullcontext(RoutingReport()) if experts is None else experts.watched() as routing:
        latents = unified.generate_images(
            row.prompt,
            [sources],
            **settings,
            latents=noise,
            output_type="latent",
            callback_on_step_end=record,
        ).images
    # For guidance the reference pictures are encoded once more, without the prompt.
    encodings = 1 if settings["guidance_scale"] == settings["image_guidance_scale"] == 1 else 2
    picture = _decode(unified, latents)
    steps = list(zip(pairwise(states), pairwise([*times, 0.0]), strict=True))
    return Drawn(
        number=place + 1,
        prompt=row.prompt,
        seed=seed,
        sources=tuple(sources),
        wanted=row.target,
        picture=picture,
        previews=tuple(
            Preview(step + 1, steps[step][1][0], _decode(unified, clean_estimate(*steps[step][0], *steps[step][1])))
            for step in spread(range(len(steps) - 1), previews)
        ),
        difference=_difference(sources[0], picture, amplification) if sources else None,
        routed=tuple(routing.images[: len(routing.images) // encodings]),
    )


def _decode(unified: EmmaUnified, latents: Tensor) -> Any:
    return converted(unified.decode_latents(latents.to(next(unified.parameters()).device)), "pil")[0]


def _difference(source: Any, picture: Any, amplification: float) -> Difference:
    from PIL import Image

    resized = source.size != picture.size
    if resized:
        source = source.resize(picture.size, Image.Resampling.BICUBIC)
    apart = np.abs(np.asarray(picture, np.float64) - np.asarray(source, np.float64))
    amplified = (apart * amplification).clip(0, 255).round().astype(np.uint8)
    return Difference(Image.fromarray(amplified), float(apart.mean() / 255), resized)
