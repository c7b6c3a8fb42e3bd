"""``model.generate(**inputs, generation_mode="image")``: pictures from the inputs that a processor made of a prompt.

The names are transformers', for models that are made to draw; ``pipeline("any-to-any")`` calls it. The prompt is read
as it is. What guidance compares it with is made by the processor, from the pictures in the prompt without its text.
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
from ..modules.method_guard import MethodGuard, arguments_by_name
from . import sampling
from .layers import Prefix
from .pictures import converted
from .pixels import plain_pictures
from .prompts import encode_prompts, on_device, read_prompts
from .reading import Row, device_of, read_rows
from .state import STATE_ATTRIBUTE, UnifiedState

MODES = ("text", "image")
#: In the place of a prompt's text, of which only token ids are known.
_AS_IDS = "(a prompt that is given as token ids)"
_POST_PROCESS = "post_process_multimodal_output"
_OUTPUT_MODALITIES = "output_modalities"


def install(model: nn.Module, handle: type[Any]) -> None:
    """Let ``model.generate`` draw, and have the model say that it does.

    Args:
        model: unified.
        handle: the class whose ``generate_images`` says what there is to choose.
    """
    MethodGuard.install(model, "generate", partial(guard_generate, handle), STATE_ATTRIBUTE)
    of_class = getattr(type(model), _OUTPUT_MODALITIES, ("text",))
    model.__dict__[_OUTPUT_MODALITIES] = tuple(dict.fromkeys((*of_class, "image")))


def remove(model: nn.Module, state: UnifiedState) -> None:
    """Undo :func:`install`, but for the guard, and what drawing has put on the processor."""
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
    # Its class knows of text alone.
    vars(state.processor)[_POST_PROCESS] = partial(_post_process, type(state.processor), state.processor)
    return _draw(handle, model, state, {name: value for name, value in arguments.items() if value is not None})


def _defaults(handle: type[Any]) -> dict[str, Any]:
    """What ``generate_images`` takes beside prompt and pictures."""
    taken = inspect.signature(handle.generate_images).parameters.items()
    return {name: parameter.default for name, parameter in taken if parameter.kind is parameter.KEYWORD_ONLY}


@cache
def _of_text() -> set[str]:
    """Settings of text. They may be given, as pipelines do, and have no say."""
    from transformers import GenerationConfig

    return set(vars(GenerationConfig())) | {"generation_config", "tokenizer"}


@torch.no_grad()
def _draw(handle: type[Any], model: nn.Module, state: UnifiedState, arguments: dict[str, Any]) -> Any:
    """Pictures ``[B · num_images_per_prompt, 3, H, W]`` in [0, 1], or what ``output_type`` says."""
    options = {**_defaults(handle), "output_type": "pt"}
    options |= {name: arguments.pop(name) for name in options.keys() & arguments.keys()}
    if "inputs" in arguments:
        arguments["input_ids"] = arguments.pop("inputs")
    inner: Any = state.family.inner(model)
    known = set(inspect.signature(type(inner).forward).parameters) | set(
        inspect.signature(type(model).forward).parameters
    )
    inputs = {name: value for name, value in arguments.items() if name not in _of_text()}
    unknown = [name for name in inputs if name not in known or name in ("inputs_embeds", "past_key_values", "cache")]
    ids = inputs.get("input_ids")
    if unknown or not isinstance(ids, Tensor) or ids.ndim != 2 or not len(ids):
        what = f"has no use for {plain(', '.join(sorted(unknown)))}" if unknown else "needs the prompts as input_ids"
        raise DataError(
            f'generate(generation_mode="image") {what}: give it what the processor makes of prompts and reference '
            f"pictures, and of {sorted(options)} what it shall do"
        )
    inputs = on_device(inputs, device_of(inner))
    references = _Pictures(state, inner, inputs)
    noted: Any = [None] * len(ids)
    if references.there and _needs_pictures(options):
        noted = references.of_rows
    callback, generator, latents = (options.pop(name) for name in ("callback_on_step_end", "generator", "latents"))
    request = sampling.check_request(state, [_AS_IDS] * len(ids), noted, **options)
    read = partial(_read, model, state, inputs)
    return sampling.draw(model, state, request, generator, latents, callback, handle(model), read).images


def _needs_pictures(options: Mapping[str, Any]) -> bool:
    """Whether prompts without their text are read, or the pictures' size is asked for."""
    guided = any(options[name] != 1 for name in ("guidance_scale", "image_guidance_scale"))
    return guided or options["height"] is None or options["width"] is None


class _Pictures:
    """The reference pictures in the inputs of a call."""

    def __init__(self, state: UnifiedState, inner: nn.Module, inputs: Mapping[str, Any]) -> None:
        self._state, self._inputs = state, inputs
        self._name = state.family.pixel_arguments["image"]
        self.there = inputs.get(self._name) is not None
        self._placeholders = inputs["input_ids"] == state.family.placeholder_id(inner, "image")

    @property
    def of_rows(self) -> list[list[Any]]:
        """PIL images of each row, of which the processor makes these pixels again.

        Raises:
            DataError: if there are none, as where a processor cuts pictures into tiles.
        """
        pixels = self._inputs[self._name]
        pictures = plain_pictures(self._state.processor, {**self._inputs, "pixel_values": pixels})
        if pictures is not None:
            rows = self._shared_out([converted(picture[None], "pil")[0] for picture in pictures])
            if rows is not None and self._made_again(rows):
                return rows
        raise DataError(
            "the pictures can't be told from the pixels of this call, in which they are cut or resized, and guidance "
            "needs them without the prompt: use unified.generate_images(prompt, image=…), or give height, width and "
            "guidance_scale=1"
        )

    def _shared_out(self, pictures: list[Any]) -> list[list[Any]] | None:
        """By the rows' placeholders, of which a picture has as many as its area asks for."""
        counts = self._placeholders.sum(1).tolist()
        each = sum(counts) / max(1, sum(picture.width * picture.height for picture in pictures))
        rows, left = [], list(pictures)
        for count in counts:
            own: list[Any] = []
            taken = 0.0
            while left and taken + each * left[0].width * left[0].height / 2 < count:
                taken += each * left[0].width * left[0].height
                own.append(left.pop(0))
            rows.append(own)
        return None if left else rows

    def _made_again(self, rows: list[list[Any]]) -> bool:
        """Whether the processor makes the same pixels and as many placeholders of these, and each stands apart: the
        tiles of a picture don't."""
        again = encode_prompts(self._state.processor, [""] * len(rows), rows)
        before, after = self._inputs[self._name], again.get(self._name)
        same = (
            isinstance(before, Tensor)
            and isinstance(after, Tensor)
            and before.shape == after.shape
            # In half precision, a step of 1/255 is a few units of the last place.
            and bool((before.float().cpu() - after.float()).abs().max() < 0.02)
        )
        starts = self._placeholders & ~F.pad(self._placeholders, (1, -1))
        apart = all(len(own) <= count for own, count in zip(rows, starts.sum(1).tolist(), strict=True))
        placeholder = self._inputs["input_ids"][self._placeholders][:1]
        counts = (again["input_ids"].to(placeholder.device) == placeholder).sum(1)
        return same and apart and torch.equal(counts, self._placeholders.sum(1))


def _read(model: nn.Module, state: UnifiedState, inputs: dict[str, Any], rows: list[Row]) -> Prefix:
    """The rows of all branches, the first of which are the given inputs."""
    count = len(inputs["input_ids"])
    rows = rows[count:]
    pixels = [name for name in inputs if name in state.family.pixel_arguments.values()]
    if not rows or pixels or any(pictures for _, pictures in rows):
        given = read_prompts(model, state, inputs)
        return given if not rows else Prefix.joined([given, read_rows(model, state, rows)])
    # In one pass, as generate_images reads them.
    texts = list(dict.fromkeys(text for text, _ in rows))
    others = on_device(encode_prompts(state.processor, texts, [[] for _ in texts]), inputs["input_ids"].device)
    together = read_prompts(model, state, _stacked(inputs, others, state.processor.tokenizer.pad_token_id or 0))
    places = [*range(count), *(count + texts.index(text) for text, _ in rows)]
    return together.rows(torch.tensor(places, device=together.mask.device))


def _stacked(inputs: Mapping[str, Any], others: Mapping[str, Any], padding: int) -> dict[str, Any]:
    """Ids and masks of both, padded on the left."""
    inputs = dict(inputs)
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    length = max(inputs["input_ids"].shape[1], others["input_ids"].shape[1])
    return {
        name: torch.cat(
            [
                F.pad(value, (length - value.shape[1], 0), value=padding if name == "input_ids" else 0)
                for value in (inputs[name], others[name])
            ]
        )
        for name in inputs.keys() & others.keys()
        if inputs[name].shape == inputs["input_ids"].shape
    }


def _post_process(
    kind: type, processor: Any, generated_outputs: Any, *args: Any, generation_mode: str | None = None, **kwargs: Any
) -> Any:
    """Pictures as PIL images; text as the processor's class does it."""
    if generation_mode != "image":
        own: Callable[..., Any] = getattr(kind, _POST_PROCESS)
        return own(processor, generated_outputs, *args, generation_mode=generation_mode, **kwargs)
    return converted(generated_outputs, "pil") if isinstance(generated_outputs, Tensor) else generated_outputs
