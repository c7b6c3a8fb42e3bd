"""generate_images: from noise to pictures that follow prompts and reference pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DataError, ShapeError
from ..messages import shown
from .drawing import VelocityField, grid_of
from .flow import Solver, guide, sampling_times, step
from .layers import Prefix
from .losses import random_normal
from .pictures import check_output_type, converted, output_size, reference_lists
from .prompts import check_length, check_prompts
from .reading import Row, device_of, read_rows
from .state import UnifiedState

Generators = torch.Generator | Sequence[torch.Generator] | None
#: ``callback(unified, step, time, {"latents": …})``; what it returns may hold other latents.
Callback = Callable[[Any, int, float, dict[str, Any]], Any]


@dataclass(frozen=True)
class GeneratedImages:
    """The result of ``generate_images``."""

    #: A list of PIL images, or an array ``[B, H, W, 3]``, a tensor ``[B, 3, H, W]`` in [0, 1], or normalized latents
    #: ``[B, C, h, w]``.
    images: Any


@dataclass(frozen=True)
class Request:
    """A checked call of ``generate_images``."""

    prompts: list[str]
    references: list[list[Any]]
    negative_prompts: list[str]
    height: int
    width: int
    times: list[float]
    guidance_scale: float
    image_guidance_scale: float
    images_per_prompt: int
    solver: Solver
    output_type: str


def check_request(
    state: UnifiedState,
    prompt: Any,
    image: Any,
    negative_prompt: Any,
    height: int | None,
    width: int | None,
    num_inference_steps: int,
    sigmas: Sequence[float] | None,
    guidance_scale: float,
    image_guidance_scale: float,
    num_images_per_prompt: int,
    solver: str,
    output_type: str,
) -> Request:
    """Check the arguments of a call and return its request, before anything is computed.

    Raises:
        ConfigError: if an argument has a value that is not allowed.
        DataError: if a prompt or a reference picture can't be used.
        ShapeError: if height or width is not a multiple of the autoencoder's compression.
    """
    prompts = check_prompts(prompt)
    references = reference_lists(image, len(prompts))
    negative = (
        [negative_prompt or ""] * len(prompts) if isinstance(negative_prompt, (str, type(None))) else negative_prompt
    )
    if (
        not isinstance(negative, Sequence)
        or len(negative) != len(prompts)
        or not all(isinstance(n, str) for n in negative)
    ):
        raise DataError(
            f"negative_prompt must be a text, or one for each of the {len(prompts)} prompts; got "
            f"{shown(negative_prompt)}"
        )
    for name, scale in (("guidance_scale", guidance_scale), ("image_guidance_scale", image_guidance_scale)):
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 <= scale < float("inf"):
            raise ConfigError(f"{name} must be a number >= 0, 1 being no guidance; got {shown(scale)}")
    if (
        isinstance(num_images_per_prompt, bool)
        or not isinstance(num_images_per_prompt, int)
        or num_images_per_prompt < 1
    ):
        raise ConfigError(f"num_images_per_prompt must be an integer >= 1; got {shown(num_images_per_prompt)}")
    if solver not in get_args(Solver):
        raise ConfigError(f"solver must be one of {list(get_args(Solver))}; got {shown(solver)}")
    check_output_type(output_type)
    times = sampling_times(num_inference_steps, state.config.time_shift, sigmas)
    size = output_size(height, width, references, state.coder.compression)
    return Request(
        prompts,
        references,
        list(negative),
        *size,
        times,
        float(guidance_scale),
        float(image_guidance_scale),
        num_images_per_prompt,
        solver,  # type: ignore[arg-type]
        output_type,
    )


@torch.no_grad()
def draw(
    model: nn.Module,
    state: UnifiedState,
    request: Request,
    generator: Generators,
    latents: Tensor | None,
    callback: Callback | None,
    handle: Any,
    read: Callable[[list[Row]], Prefix] | None = None,
) -> GeneratedImages:
    """Draw the pictures that a request asks for.

    ``read`` reads the rows of all branches, one branch after the other; default: :func:`~.reading.read_rows`.
    """
    inner = state.family.inner(model)
    device = device_of(inner)
    grid = (request.height // state.coder.compression, request.width // state.coder.compression)
    count = len(request.prompts) * request.images_per_prompt
    x = _noise((state.coder.channels, *grid), count, generator, latents, device)
    branches = _branches(request)
    read = read or partial(read_rows, model, state)
    prefix = read([row for branch in branches for row in branch])
    check_length(inner, prefix, grid[0] * grid[1])
    prefix = prefix.rows(
        torch.arange(len(prefix.mask), device=prefix.mask.device).repeat_interleave(request.images_per_prompt)
    )
    rows = len(prefix.mask)
    places = grid_of(*grid, device).expand(rows, -1, -1)
    real = torch.ones(places.shape[:2], dtype=torch.bool, device=device)
    field = VelocityField(model, state, prefix, places, real, training=False)
    options = state.compile_options
    # Later drawings find the compiled code again: it is kept with the function's code, for layers of this structure.
    evaluate = VelocityField.__call__ if options is None else torch.compile(VelocityField.__call__, **options)

    def velocity(x: Tensor, time: float) -> Tensor:
        tokens = x.flatten(2).mT[:, None].repeat(len(branches), 1, 1, 1)
        t = torch.full((rows, 1), time, device=device, dtype=x.dtype)
        predicted = list(evaluate(field, tokens, t).to(x.dtype)[:, 0].mT.unflatten(-1, grid).chunk(len(branches)))
        predicted += [None] * (3 - len(predicted))
        return guide(predicted[0], predicted[1], predicted[2], request.guidance_scale, request.image_guidance_scale)

    x = x.to(torch.promote_types(torch.float32, field.dtype))
    pairs = list(pairwise(request.times))
    for number, (time, following) in enumerate(_progress(pairs, state)):
        x = step(velocity, x, time, following, request.solver)
        if callback is not None:
            returned = callback(handle, number, time, {"latents": x})
            x = returned.get("latents", x) if isinstance(returned, dict) else x
    if request.output_type == "latent":
        return GeneratedImages(x)
    # Decoding takes the most memory: one picture at a time, so that it doesn't grow with the batch.
    pictures = torch.cat([state.coder.decode(each[None], state.config) for each in x])
    return GeneratedImages(converted(pictures, request.output_type))


def _branches(request: Request) -> list[list[Row]]:
    """Return the rows of each branch of guidance: with all; without the text; without the text and the pictures."""
    pictures = [tuple(references) for references in request.references]
    conditional: list[Row] = list(zip(request.prompts, pictures, strict=True))
    without_text: list[Row] = list(zip(request.negative_prompts, pictures, strict=True))
    guides_pictures = request.image_guidance_scale != 1 and any(pictures)
    if guides_pictures:
        return [conditional, without_text, [(text, ()) for text in request.negative_prompts]]
    return [conditional] if request.guidance_scale == 1 else [conditional, without_text]


def _noise(
    shape: tuple[int, int, int], count: int, generator: Generators, latents: Tensor | None, device: torch.device
) -> Tensor:
    """Return noise ``[count, C, h, w]``, drawn picture by picture: a batch gets the same as single calls would."""
    if latents is not None:
        if not isinstance(latents, Tensor) or tuple(latents.shape) != (count, *shape):
            got = list(latents.shape) if isinstance(latents, Tensor) else shown(type(latents))
            raise ShapeError(
                f"latents must be a tensor {[count, *shape]} (pictures, channels, and height and width divided by the "
                f"autoencoder's compression); got {got}"
            )
        return latents.to(device)
    several = isinstance(generator, (list, tuple))
    if several and len(generator) != count:  # type: ignore[arg-type]
        raise ConfigError(
            f"{len(generator)} generators for {count} pictures: give one for each, or one for all"  # type: ignore[arg-type]
        )
    sources = generator if several else [generator] * count
    return torch.stack([random_normal(shape, source, device) for source in sources])  # type: ignore[union-attr, arg-type]


def _progress(steps: list[tuple[float, float]], state: UnifiedState) -> Any:
    from tqdm.auto import tqdm

    return tqdm(steps, **state.progress_bar)
