"""EmmaConfig: one validated, JSON-serialisable description of an adapter."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ..errors import ConfigError
from ..files.untrusted import parse_json
from ..messages import listed, shown
from .fusion.dispatch import Kernel
from .fusion.registry import fusion_names

#: The largest size: a product of two still fits into 64 bits.
_MAX_SIZE = 2**31 - 1
#: Limits of ``fusion_options``, in levels and in characters of the config file: what is saved must load again.
_MAX_OPTIONS_NESTING, _MAX_OPTIONS_LENGTH = 64, 2**19
_MAX_ENCODER_LENGTH = 4096

#: How an adapter runs, not what it is. They may differ wherever it is loaded.
RUN_TIME_FIELDS = frozenset({"cache_size", "kernel"})

InstructionPolicy = Literal["last_turn", "shortest_turn", "all_turns"]
Place = Literal["before_projector", "after_projector"]


@dataclass(frozen=True, kw_only=True)
class EmmaConfig:
    """The description of an adapter: its fusion, sizes and instruction, and how it runs.

    ``patch_model`` fills in the sizes that are left ``None`` from the model and the encoder;
    :class:`~emma_adapter.EmmaAlignment` on its own needs ``visual_dim`` and ``instruction_dim``.

    Args:
        fusion: how the instruction enters the visual tokens: ``"modulation"`` (a channel mask), ``"attention"`` (an
            update that is added; both for any number of visual tokens), ``"linear"`` (the paper: a fixed number), or a
            registered one; ``"moda"`` is :meth:`moda`'s.
        place: which tokens are aligned: ``"before_projector"``, the vision encoder's (the paper), or
            ``"after_projector"``, the projector's, in the space of the language model's embeddings (MoDA).
        visual_dim: D, channels of a visual token at that place.
        instruction_dim: Dt, channels of an instruction token.
        num_visual_tokens: N, visual tokens of an image. ``linear`` needs it; the others learn one query term
            per position if it is given, and are position-blind without it.
        visual_grid: ``(height, width)`` of the image in visual tokens, with ``height * width ==
            num_visual_tokens``. With it, the learned positions are resampled to images on another grid.
        max_instruction_tokens: longest instruction; longer ones are cut (a text tower keeps the beginning, as
            its tokenizer does; ``"llm"`` keeps the end). ``linear`` has one weight column for each.
        inner_dim: width of the cross-attention (``attention``, ``modulation``), all heads together; of the
            feed-forward layers of ``moda``.
        num_heads: heads of the cross-attention.
        rank: rank of the image-to-image update of ``linear``; ``None`` is a full matrix, as in the paper.
        instruction_encoder: ``"llm"`` (the language model's input embeddings), a hub id or local folder of a
            CLIP text tower, ``"open_clip:MODEL:PRETRAINED"``, or ``"custom:..."`` for a module handed to
            ``patch_model``.
        instruction_layer: which hidden state of a text tower is the instruction, counted as in
            ``hidden_states`` of transformers; the paper takes -2.
        instruction_policy: which user turns of a conversation are the instruction: ``"last_turn"``,
            ``"shortest_turn"`` (the authors' training rule), or ``"all_turns"``.
        cache_size: how many encoded instructions are kept; 0 turns the cache off.
        kernel: what computes the fusion. ``"eager"``: PyTorch's own operations. ``"triton"``: the fused Triton
            kernels, or a :class:`~emma_adapter.KernelError` that says why they can't. ``"auto"``: the kernels on a GPU
            where they were measured to be at least as fast (``make bench-gpu``), PyTorch elsewhere;
            ``adapter.kernel_report()`` tells what ran. Not saved with an adapter.
        align_deepstack: Qwen3-VL also feeds features of lower vision layers into the language model, through
            projectors of their own. True aligns these too, each with its own weights. By default they stay as they
            are: the paper aligns what *the* projector reads; lower layers have other statistics and would multiply the
            adapter's parameters; and through them the language model still sees what an instruction hides.
        fusion_options: JSON values for a fusion you registered yourself, or ``moda``.

    Raises:
        ConfigError: naming the field, the value and what is allowed.
    """

    fusion: str = "modulation"
    place: Place = "before_projector"
    visual_dim: int | None = None
    instruction_dim: int | None = None
    num_visual_tokens: int | None = None
    visual_grid: tuple[int, int] | None = None
    max_instruction_tokens: int | None = None
    inner_dim: int = 128
    num_heads: int = 4
    rank: int | None = None
    instruction_encoder: str = "llm"
    instruction_layer: int = -2
    instruction_policy: InstructionPolicy = "last_turn"
    cache_size: int = 512
    kernel: Kernel = "auto"
    align_deepstack: bool = False
    fusion_options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if isinstance(self.visual_grid, list):
            object.__setattr__(self, "visual_grid", tuple(self.visual_grid))
        self._require_text("fusion", fusion_names())
        for name in ("visual_dim", "instruction_dim", "num_visual_tokens", "max_instruction_tokens", "rank"):
            if getattr(self, name) is not None:
                self._require_int(name, minimum=1)
        for name in ("inner_dim", "num_heads"):
            self._require_int(name, minimum=1)
        self._require_int("cache_size", minimum=0, maximum=2**63 - 1)
        self._require_int("instruction_layer", minimum=-_MAX_SIZE)
        # moda's heads divide the channels of its tokens instead.
        if self.fusion != "moda" and self.inner_dim % self.num_heads:
            raise self._error("inner_dim", f"a multiple of num_heads={self.num_heads}")
        self._check_grid()
        if self.rank is not None and self.num_visual_tokens is not None and self.rank > self.num_visual_tokens:
            raise self._error("rank", f"at most num_visual_tokens={self.num_visual_tokens}")
        if not isinstance(self.align_deepstack, bool):
            raise self._error("align_deepstack", "True or False")
        self._require_text("place", get_args(Place))
        self._require_text("instruction_policy", get_args(InstructionPolicy))
        self._require_text("kernel", get_args(Kernel))
        if not isinstance(self.instruction_encoder, str) or not self.instruction_encoder.strip():
            raise self._error(
                "instruction_encoder",
                'a non-empty string: "llm", a hub id or folder of a text tower, or "open_clip:MODEL:PRETRAINED"',
            )
        if len(self.instruction_encoder) > _MAX_ENCODER_LENGTH:
            raise self._error("instruction_encoder", f"at most {_MAX_ENCODER_LENGTH} characters")
        self._check_fusion_options()

    @classmethod
    def paper(cls, text_tower: str = "openai/clip-vit-large-patch14-336", **changes: Any) -> EmmaConfig:
        """Return the set-up of the paper (arXiv 2410.02080, section 3).

        That is ``linear``, all positions of CLIP's text tower, its last hidden state but one, and the shortest turn of
        a conversation.
        """
        settings: dict[str, Any] = {
            "fusion": "linear",
            "instruction_encoder": text_tower,
            "instruction_layer": -2,
            "instruction_policy": "shortest_turn",
        }
        return cls(**{**settings, **changes})

    @classmethod
    def moda(cls, **changes: Any) -> EmmaConfig:
        """Return the set-up of MoDA: arXiv 2506.01850, and github.com/waybarrios/MoDA for what it leaves open.

        Behind the projector, a decoder of two layers draws a channel mask from the embeddings of all user turns. The
        mask is ``2 sigmoid`` of a projection that starts at zero, where MoDA's is ``sigmoid``: an untrained adapter
        is the identity. ``fusion_options``: ``num_layers`` (2), ``dropout`` (0.1), ``mask_scale`` (2.0).
        """
        settings: dict[str, Any] = {
            "fusion": "moda",
            "place": "after_projector",
            "inner_dim": 1024,
            "num_heads": 16,
            "instruction_policy": "all_turns",
        }
        return cls(**{**settings, **changes})

    @property
    def aligns_projected(self) -> bool:
        """True if the projector's output is aligned, not its input."""
        return self.place == "after_projector"

    def replace(self, **changes: Any) -> EmmaConfig:
        """Return a copy with other values, validated again."""
        return dataclasses.replace(self, **changes)

    def without_run_time(self) -> EmmaConfig:
        """Return a copy with the defaults of ``RUN_TIME_FIELDS``: what an adapter is, however it runs."""
        return self.replace(**{f.name: f.default for f in dataclasses.fields(self) if f.name in RUN_TIME_FIELDS})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types; ``EmmaConfig.from_dict`` makes an equal config of them."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["visual_grid"] = None if self.visual_grid is None else list(self.visual_grid)
        values["fusion_options"] = json.loads(json.dumps(dict(self.fusion_options)))
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EmmaConfig:
        if not isinstance(values, Mapping):
            raise ConfigError(f"an adapter's config must be a JSON object, not {type(values).__name__}")
        names = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - names, key=repr):
            raise ConfigError(f"unknown config field(s) {listed(unknown)}; known are {sorted(names)}")
        return cls(**values)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> EmmaConfig:
        try:
            values = parse_json(text)
        except ValueError as error:
            raise ConfigError(f"an adapter's config must be JSON: {error}") from error
        return cls.from_dict(values)

    def _error(self, name: str, allowed: str) -> ConfigError:
        return ConfigError(f"EmmaConfig.{name} must be {allowed}; got {shown(getattr(self, name))}")

    def _require_int(self, name: str, *, minimum: int, maximum: int = _MAX_SIZE) -> None:
        value = getattr(self, name)
        if not _is_int(value) or value < minimum:
            raise self._error(name, f"an integer >= {minimum}")
        if value > maximum:
            raise self._error(name, f"an integer <= {maximum}")

    def _require_text(self, name: str, allowed: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if not isinstance(value, str) or value not in allowed:
            raise self._error(name, f"one of {list(allowed)}")

    def _check_grid(self) -> None:
        grid = self.visual_grid
        if grid is None:
            return
        if not isinstance(grid, tuple) or len(grid) != 2 or not all(_is_int(side) and side >= 1 for side in grid):
            raise self._error("visual_grid", "None or two integers (height, width) >= 1")
        if self.num_visual_tokens is None:
            object.__setattr__(self, "num_visual_tokens", grid[0] * grid[1])
            self._require_int("num_visual_tokens", minimum=1)
        elif grid[0] * grid[1] != self.num_visual_tokens:
            raise self._error("visual_grid", f"(height, width) of num_visual_tokens={self.num_visual_tokens} tokens")

    def _check_fusion_options(self) -> None:
        options = self.fusion_options
        if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
            raise self._error("fusion_options", "a mapping from names to JSON values")
        # A private copy in JSON's own types, so that the round trip is exact and nobody changes it later.
        json_options = {key: self._json_value(value, _MAX_OPTIONS_NESTING) for key, value in options.items()}
        try:
            length = len(json.dumps({"config": {"fusion_options": json_options}}, indent=2))  # as in the file
        except ValueError:
            raise self._error("fusion_options", "made of JSON values, and integers of at most 4300 digits") from None
        if length > _MAX_OPTIONS_LENGTH:
            raise self._error("fusion_options", f"at most {_MAX_OPTIONS_LENGTH:,} characters in the config file")
        object.__setattr__(self, "fusion_options", json_options)

    def _json_value(self, value: Any, levels: int) -> Any:
        if levels < 0:
            raise self._error("fusion_options", f"nested at most {_MAX_OPTIONS_NESTING} levels deep")
        if isinstance(value, float) and not math.isfinite(value):
            raise self._error("fusion_options", "made of JSON values, without NaN and infinities")
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (list, tuple)):
            return [self._json_value(item, levels - 1) for item in value]
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {key: self._json_value(item, levels - 1) for key, item in value.items()}
        raise self._error("fusion_options", "made of JSON values")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
