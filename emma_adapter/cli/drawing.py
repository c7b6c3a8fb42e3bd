"""Options, model and files that ``draw`` and ``edit`` share."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from ..version import __version__
from .options import chosen_device, device_option, dtype_option, subfolder_option, trust_option

#: Height or width.
side = click.IntRange(1)


def drawing_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of :class:`Drawing`, and what it passes on to ``generate_images``."""
    scale = click.FloatRange(0)
    for option in reversed(
        [
            click.option("--model", required=True, help="The base model: a folder or a hub id."),
            click.option("--adapter", required=True, help="What unified.save_pretrained wrote: a folder or a hub id."),
            subfolder_option,
            click.option("--autoencoder", help="A folder or a hub id. Default: the one it was trained with."),
            click.option(
                "--output",
                default="drawings",
                show_default=True,
                type=click.Path(path_type=Path),
                help="A .png file, for one picture, or a folder.",
            ),
            click.option("--negative-prompt", default="", help="What guidance moves away from."),
            click.option("--num-images", default=1, show_default=True, type=click.IntRange(1), help="For each prompt."),
            click.option("--seed", type=click.IntRange(0, 2**62), help="Seed of the first picture. Default: random."),
            click.option("--steps", default=20, show_default=True, type=click.IntRange(1), help="Steps of the solver."),
            click.option("--solver", default="euler", show_default=True, type=click.Choice(["euler", "heun"])),
            click.option(
                "--guidance-scale", default=3.0, show_default=True, type=scale, help="By the text; 1 is none."
            ),
            device_option,
            dtype_option,
            trust_option,
        ]
    ):
        command = option(command)
    return command


def load_drawing_model(
    model: str,
    adapter: str,
    *,
    subfolder: str | None,
    autoencoder: str | None,
    device: Any,
    dtype: str,
    trust_remote_code: bool,
) -> Any:
    """Return the ``EmmaUnified`` of a base model and a saved branch, on a device, in evaluation mode."""
    from ..models.loading import load_model, load_processor
    from ..unified.loading import load_unified

    processor = load_processor(model, trust_remote_code=trust_remote_code)
    base = load_model(model, dtype, trust_remote_code=trust_remote_code).to(device).eval()
    return load_unified(base, adapter, subfolder=subfolder, processor=processor, autoencoder=autoencoder)


class Drawing:
    """A model that draws, and the files that its pictures go to."""

    def __init__(
        self,
        *,
        model: str,
        adapter: str,
        subfolder: str | None,
        autoencoder: str | None,
        output: Path,
        seed: int | None,
        num_images: int,
        device: str | None,
        dtype: str,
        trust_remote_code: bool,
        **settings: Any,
    ) -> None:
        # Made first, so that a wrong path fails before minutes of work.
        self._is_file = output.suffix.lower() == ".png"
        (output.parent if self._is_file else output).mkdir(parents=True, exist_ok=True)
        self._unified = load_drawing_model(
            model,
            adapter,
            subfolder=subfolder,
            autoencoder=autoencoder,
            device=chosen_device(device),
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
        self._output, self._settings, self._count = output, settings, num_images
        self._seed = random.randrange(2**31) if seed is None else seed
        self._names = {"model": model, "adapter": adapter}

    def draw(self, number: int, prompt: str, images: Sequence[Any] | None = None, **more: Any) -> None:
        """Draw the pictures of prompt ``number``, and write them; ``more`` goes to ``generate_images``."""
        import torch

        seeds = [self._seed + number * self._count + i for i in range(self._count)]
        settings = {**self._settings, **more}
        steps = settings.pop("steps")
        pictures = self._unified.generate_images(
            prompt,
            None if images is None else [list(images)],
            num_inference_steps=steps,
            num_images_per_prompt=self._count,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            **settings,
        ).images
        for seed, picture in zip(seeds, pictures, strict=True):
            metadata = {"prompt": prompt, "seed": seed, "steps": steps, **settings, **self._names}
            path = self._path(seed)
            picture.save(path, pnginfo=_png_text({**metadata, "Software": f"emma_adapter {__version__}"}))
            click.echo(f"Saved to {path}: {prompt}")

    def _path(self, seed: int) -> Path:
        if not self._is_file:
            return self._output / f"{seed}.png"
        if seed == self._seed:
            return self._output
        return self._output.with_stem(f"{self._output.stem}-{seed}")


def _png_text(values: dict[str, Any]) -> Any:
    from PIL.PngImagePlugin import PngInfo

    text_chunks = PngInfo()
    for name, value in values.items():
        if value not in (None, ""):
            text_chunks.add_itxt(name, str(value))
    return text_chunks
