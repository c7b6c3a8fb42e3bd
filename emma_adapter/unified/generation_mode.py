"""``model.generate(**inputs, generation_mode="image")``: pictures from the inputs that a processor made of a prompt.

The names are those of transformers' own models that draw; ``pipeline("any-to-any")`` calls it. The prompt is read as it
is. The processor makes what guidance compares it with, from the pictures in the prompt without its text.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, DataError
from ..messages import plain, shown
from ..models.placeholders import find_placeholders
from ..modules.method_guard import MethodGuard, arguments_by_name
from . import sampling
from .layers import Prefix
from .pictures import converted
from .pixels import plain_pictures
from .prompts import encode_prompts, on_device, read_prompts
from .reading import Row, device_of, read_rows
from .state import STATE_ATTRIBUTE, UnifiedState

MODES = ("text", "image")
#: Stands for the text of a prompt of which only the token ids are known.
_AS_IDS = "(a prompt that is given as token ids)"
_POST_PROCESS = "post_process_multimodal_output"
_OUTPUT_MODALITIES = "output_modalities"


def install(model: nn.Module, handle: type[Any]) -> None:
    """Let ``model.generate`` draw, and add pictures to the model's output modalities.

    Args:
        model: unified.
        handle: the class whose ``generate_images`` defines the options.
    """
    MethodGuard.install(model, "generate", partial(guard_generate, handle), STATE_ATTRIBUTE)
    class_modalities = getattr(type(model), _OUTPUT_MODALITIES, ("text",))
    model.__dict__[_OUTPUT_MODALITIES] = tuple(dict.fromkeys((*class_modalities, "image")))


def remove(model: nn.Module, state: UnifiedState) -> None:
    """Undo :func:`install`, except for the guard, and undo what drawing has put on the processor."""
    model.__dict__.pop(_OUTPUT_MODALITIES, None)
    if isinstance(vars(state.processor).get(_POST_PROCESS), partial):
        del vars(state.processor)[_POST_PROCESS]


def guard_generate(handle: type[Any], model: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    mode = kwargs.pop("generation_mode", None)
    if mode in (None, "text"):
        return original(*args, **kwargs)
    if mode != "image":
        raise ConfigError(f"generation_mode must be one of {list(MODES)} for this model; got {shown(mode)}")
    state: UnifiedState = model.__dict__[STATE_ATTRIBUTE]
    arguments = arguments_by_name(original, args, kwargs)
    # The method of the processor's class handles only text.
    vars(state.processor)[_POST_PROCESS] = partial(_post_process, type(state.processor), state.processor)
    return _draw(handle, model, state, {name: value for name, value in arguments.items() if value is not None})


def _defaults(handle: type[Any]) -> dict[str, Any]:
    """Return the options of ``generate_images``, all that it takes beside prompt and pictures, with their defaults."""
    parameters = inspect.signature(handle.generate_images).parameters.items()
    return {name: parameter.default for name, parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


@cache
def _text_settings() -> set[str]:
    """Return the names of settings for generating text, which pipelines pass and drawing ignores."""
    from transformers import GenerationConfig

    return set(vars(GenerationConfig())) | {"generation_config", "tokenizer"}


@torch.no_grad()
def _draw(handle: type[Any], model: nn.Module, state: UnifiedState, arguments: dict[str, Any]) -> Any:
    """Return pictures ``[B · num_images_per_prompt, 3, H, W]`` in [0, 1], or what ``output_type`` says."""
    options = {**_defaults(handle), "output_type": "pt"}
    options |= {name: arguments.pop(name) for name in options.keys() & arguments.keys()}
    if "inputs" in arguments:
        arguments["input_ids"] = arguments.pop("inputs")
    inner: Any = state.family.inner(model)
    forward_names = set(inspect.signature(type(inner).forward).parameters) | set(
        inspect.signature(type(model).forward).parameters
    )
    usable_names = forward_names - {"inputs_embeds", "past_key_values", "cache"}
    inputs = {name: value for name, value in arguments.items() if name not in _text_settings()}
    unknown = [name for name in inputs if name not in usable_names]
    ids = inputs.get("input_ids")
    if unknown or not isinstance(ids, Tensor) or ids.ndim != 2 or not len(ids):
        problem = f"has no use for {plain(', '.join(sorted(unknown)))}" if unknown else "needs the prompts as input_ids"
        raise DataError(
            f'generate(generation_mode="image") {problem}: give it what the processor makes of prompts and reference '
            f"pictures, and any of the options {sorted(options)}"
        )
    inputs = on_device(inputs, device_of(inner))
    pictures = _Pictures(state, inner, inputs)
    references: Any = [None] * len(ids)
    if pictures.are_given and _needs_pictures(options):
        references = pictures.of_rows
    callback, generator, latents = (options.pop(name) for name in ("callback_on_step_end", "generator", "latents"))
    request = sampling.check_request(state, [_AS_IDS] * len(ids), references, **options)
    read = partial(_read, model, state, inputs)
    return sampling.draw(model, state, request, generator, latents, callback, handle(model), read).images


def _needs_pictures(options: Mapping[str, Any]) -> bool:
    """Return whether drawing needs the pictures themselves: for prompts without their text, or for a default size."""
    guided = any(options[name] != 1 for name in ("guidance_scale", "image_guidance_scale"))
    return guided or options["height"] is None or options["width"] is None


class _Pictures:
    """The reference pictures in the inputs of a call."""

    def __init__(self, state: UnifiedState, inner: nn.Module, inputs: Mapping[str, Any]) -> None:
        self._state, self._inputs = state, inputs
        self._name = state.family.pixel_arguments["image"]
        self.are_given = inputs.get(self._name) is not None
        self._placeholders = find_placeholders(state.family, inner, inputs["input_ids"])["image"]

    @property
    def of_rows(self) -> list[list[Any]]:
        """The PIL images of each row, from which the processor makes these pixels again.

        Raises:
            DataError: if they can't be recovered, as where a processor cuts pictures into tiles.
        """
        pixels = self._inputs[self._name]
        pictures = plain_pictures(self._state.processor, {**self._inputs, "pixel_values": pixels})
        if pictures is not None:
            rows = self._divided([converted(picture[None], "pil")[0] for picture in pictures])
            if rows is not None and self._are_reproduced(rows):
                return rows
        raise DataError(
            "the pictures can't be recovered from the pixels of this call, in which they are cut or resized, and "
            "guidance needs them without the prompt: use unified.generate_images(prompt, image=…), or give height, "
            "width, guidance_scale=1 and image_guidance_scale=1"
        )

    def _divided(self, pictures: list[Any]) -> list[list[Any]] | None:
        """Divide pictures among the rows by the rows' placeholders, whose number goes by a picture's area."""
        counts = self._placeholders.sum(1).tolist()
        density = sum(counts) / max(1, sum(picture.width * picture.height for picture in pictures))
        rows, remaining = [], list(pictures)
        for count in counts:
            row: list[Any] = []
            taken = 0.0
            while remaining and taken + density * remaining[0].width * remaining[0].height / 2 < count:
                taken += density * remaining[0].width * remaining[0].height
                row.append(remaining.pop(0))
            rows.append(row)
        return None if remaining else rows

    def _are_reproduced(self, rows: list[list[Any]]) -> bool:
        """Return whether the processor makes the same pixels and as many placeholders of these pictures.

        Each must also stand apart, which the tiles of a picture don't.
        """
        encoded = encode_prompts(self._state.processor, [""] * len(rows), rows)
        given_pixels, new_pixels = self._inputs[self._name], encoded.get(self._name)
        same_pixels = (
            isinstance(given_pixels, Tensor)
            and isinstance(new_pixels, Tensor)
            and given_pixels.shape == new_pixels.shape
            # In half precision, a step of 1/255 is a few units of the last place.
            and bool((given_pixels.float().cpu() - new_pixels.float()).abs().max() < 0.02)
        )
        starts = self._placeholders & ~F.pad(self._placeholders, (1, -1))
        apart = all(len(row) <= count for row, count in zip(rows, starts.sum(1).tolist(), strict=True))
        placeholder = self._inputs["input_ids"][self._placeholders][:1]
        counts = (encoded["input_ids"].to(placeholder.device) == placeholder).sum(1)
        return same_pixels and apart and torch.equal(counts, self._placeholders.sum(1))


def _read(model: nn.Module, state: UnifiedState, inputs: dict[str, Any], rows: list[Row]) -> Prefix:
    """Return the prefix of the rows of all branches, of which the first are the inputs themselves."""
    count = len(inputs["input_ids"])
    further_rows = rows[count:]
    has_pixels = any(name in state.family.pixel_arguments.values() for name in inputs)
    if not further_rows or has_pixels or any(pictures for _, pictures in further_rows):
        prefix = read_prompts(model, state, inputs)
        return prefix if not further_rows else Prefix.joined([prefix, read_rows(model, state, further_rows)])
    # In one pass, as generate_images reads them.
    texts = list(dict.fromkeys(text for text, _ in further_rows))
    further_inputs = on_device(encode_prompts(state.processor, texts, [[] for _ in texts]), inputs["input_ids"].device)
    padding = state.processor.tokenizer.pad_token_id or 0
    prefix = read_prompts(model, state, _stacked(inputs, further_inputs, padding))
    index = [*range(count), *(count + texts.index(text) for text, _ in further_rows)]
    return prefix.rows(torch.tensor(index, device=prefix.mask.device))


def _stacked(inputs: Mapping[str, Any], further_inputs: Mapping[str, Any], padding: int) -> dict[str, Any]:
    """Return the ids and masks of both as one batch, padded on the left."""
    inputs = dict(inputs)
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    length = max(inputs["input_ids"].shape[1], further_inputs["input_ids"].shape[1])
    return {
        name: torch.cat(
            [
                F.pad(value, (length - value.shape[1], 0), value=padding if name == "input_ids" else 0)
                for value in (inputs[name], further_inputs[name])
            ]
        )
        for name in inputs.keys() & further_inputs.keys()
        if inputs[name].shape == inputs["input_ids"].shape
    }


def _post_process(
    processor_class: type,
    processor: Any,
    generated_outputs: Any,
    *args: Any,
    generation_mode: str | None = None,
    **kwargs: Any,
) -> Any:
    """Return pictures as PIL images, and text as the processor's class does."""
    if generation_mode != "image":
        original: Callable[..., Any] = getattr(processor_class, _POST_PROCESS)
        return original(processor, generated_outputs, *args, generation_mode=generation_mode, **kwargs)
    return converted(generated_outputs, "pil") if isinstance(generated_outputs, Tensor) else generated_outputs
