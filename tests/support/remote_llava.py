"""Tiny LLaVAs with the interface of their authors' code, which is not part of transformers.

``LlavaLlamaForCausalLM`` (model type ``llava_llama``) behaves as that of LLaVA 1.5 and 1.6, ``LlavaQwenForCausalLM``
(``llava_qwen``) as that of LLaVA-NeXT, whose methods also take ``modalities``. A placeholder is one negative token id;
``prepare_inputs_labels_for_multimodal`` replaces it by the tokens of its image. Left out: start and end tokens around
images, multi-scale towers, resamplers, ``anyres_max``, ``nobase``, ``maxpool2x2`` and faster video.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
)

from tests.support import tiny

IGNORE_INDEX = -100
IMAGE_TOKEN_INDEX = -200
WIDTH = 32
VOCABULARY = 100
SIDE = tiny.IMAGE_SIZE
# Width and height, as the authors write them.
PINPOINTS = [(SIDE, 2 * SIDE), (2 * SIDE, SIDE), (2 * SIDE, 2 * SIDE)]
# The tiles of these, base tile included: 3, 3, 5, 5. The third has bars to be cut off.
ANYRES_SIZES = [(50, 20), (21, 56), (56, 30), (45, 56)]


class CLIPVisionTower(nn.Module):
    """The authors' wrapper of CLIP; made from the model's config instead of loaded from a checkpoint of its own."""

    def __init__(self, args: Any) -> None:
        super().__init__()
        self.is_loaded = True
        self.vision_tower_name = args.mm_vision_tower
        self.select_layer = args.mm_vision_select_layer
        self.select_feature = getattr(args, "mm_vision_select_feature", "patch")
        self.vision_tower = CLIPVisionModel(CLIPVisionConfig(**args.vision_tower_config))
        self.vision_tower.requires_grad_(False)

    def load_model(self, device_map: Any = None) -> None:
        """There is nothing left to load."""

    def feature_select(self, image_forward_outs: Any) -> Tensor:
        states = image_forward_outs.hidden_states[self.select_layer]
        return states[:, 1:] if self.select_feature == "patch" else states

    @torch.no_grad()
    def forward(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        if isinstance(images, list):
            return [self(image.unsqueeze(0)) for image in images]
        seen = self.vision_tower(images.to(self.device, self.dtype), output_hidden_states=True)
        return self.feature_select(seen).to(images.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_tower.dtype

    @property
    def device(self) -> torch.device:
        return self.vision_tower.device

    @property
    def config(self) -> CLIPVisionConfig:
        return self.vision_tower.config

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def num_patches_per_side(self) -> int:
        return self.config.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        return self.num_patches_per_side**2


class IdentityMap(nn.Module):
    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return x


def build_vision_projector(config: Any) -> nn.Module:
    kind = getattr(config, "mm_projector_type", "linear")
    if kind == "identity":
        return IdentityMap()
    if kind == "linear":
        return nn.Linear(config.mm_hidden_size, config.hidden_size)
    if not (kind.startswith("mlp") and kind.endswith("x_gelu")):
        raise ValueError(f"Unknown projector type: {kind}")
    layers: list[nn.Module] = [nn.Linear(config.mm_hidden_size, config.hidden_size)]
    for _ in range(int(kind[3 : -len("x_gelu")]) - 1):
        layers += [nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)]
    return nn.Sequential(*layers)


def grid_of(size: Sequence[int], pinpoints: Any, side: int) -> tuple[int, int]:
    """Columns and rows of the tiles of an image of this width and height, at the pinpoint that keeps most of it."""
    choices = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
    width, height = size

    def kept_and_wasted(choice: Sequence[int]) -> tuple[int, int]:
        scale = min(choice[0] / width, choice[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - choice[0] * choice[1]

    best = max(choices, key=kept_and_wasted)
    return best[0] // side, best[1] // side


def unpad(grid: Tensor, size: Sequence[int]) -> Tensor:
    """Cut the bars off a ``[D, rows, columns]`` grid that make an image of this width and height fill it."""
    (width, height), (rows, columns) = size, grid.shape[1:]
    if width / height > columns / rows:
        bar = (rows - int(height * (columns / width))) // 2
        return grid[:, bar : rows - bar]
    bar = (columns - int(width * (rows / height))) // 2
    return grid[:, :, bar : columns - bar]


class LlavaMetaModel:
    """Mixed in before a language model's decoder; adds vision tower and projector to it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if hasattr(config, "mm_vision_tower"):
            self.vision_tower = CLIPVisionTower(config)
            self.mm_projector = build_vision_projector(config)
            if "unpad" in getattr(config, "mm_patch_merge_type", ""):
                self.image_newline = nn.Parameter(torch.randn(config.hidden_size) * config.hidden_size**-0.5)

    def get_vision_tower(self) -> CLIPVisionTower | None:
        tower = getattr(self, "vision_tower", None)
        return tower[0] if isinstance(tower, list) else tower


class LlavaMetaForCausalLM:
    """Mixed in after a causal language model; merges images into its embeddings."""

    def get_vision_tower(self) -> CLIPVisionTower | None:
        return self.get_model().get_vision_tower()

    def encode_images(self, images: Tensor) -> Tensor:
        return self.get_model().mm_projector(self.get_model().get_vision_tower()(images))

    def prepare_inputs_labels_for_multimodal(
        self, input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes=None
    ):
        if self.get_vision_tower() is None or images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        features = self._features(images, image_sizes)
        rows, targets = self._merged(input_ids, attention_mask, labels, features)
        return self._padded(rows, targets, position_ids, attention_mask, past_key_values, labels)

    def _features(self, images: Any, image_sizes: Any, videos: Sequence[int] = ()) -> Any:
        """The tokens of each image. One call of the projector sees the tiles of all of them, in order."""
        if not isinstance(images, list) and images.ndim == 4:
            return self.encode_images(images)
        images = [image.unsqueeze(0) if image.ndim == 3 else image for image in images]
        encoded = self.encode_images(torch.cat(images))
        parts = encoded.split([len(image) for image in images])
        merge = getattr(self.config, "mm_patch_merge_type", "flat")
        if merge != "flat" and not merge.startswith("spatial"):
            raise ValueError(f"Unexpected mm_patch_merge_type: {merge}")
        made = []
        for index, part in enumerate(parts):
            tiles = self._pooled(part) if index in videos else part
            newline = self.get_model().image_newline if "unpad" in merge else None
            if merge == "flat":
                made.append(tiles.flatten(0, 1))
            elif len(tiles) == 1 or index in videos:
                tokens = tiles.flatten(0, 1)
                made.append(tokens if newline is None else torch.cat([tokens, newline[None]]))
            else:
                made.append(self._spatial(tiles, None if image_sizes is None else image_sizes[index], newline))
        return made

    def _spatial(self, tiles: Tensor, size: Any, newline: Tensor | None) -> Tensor:
        """The base tile's tokens, then those of the other tiles in the raster of the whole image."""
        tower = self.get_vision_tower()
        side = tower.num_patches_per_side
        columns, rows = self._tile_grid(size, tower)
        grid = rearrange(tiles[1:], "(r c) (h w) d -> d (r h) (c w)", r=rows, c=columns, h=side)
        if newline is None:
            return torch.cat([tiles[0], rearrange(grid, "d h w -> (h w) d")])
        grid = unpad(grid, size)
        grid = torch.cat([grid, newline[:, None, None].expand(-1, grid.shape[1], 1)], dim=-1)
        return torch.cat([tiles[0], rearrange(grid, "d h w -> (h w) d")])

    def _tile_grid(self, size: Any, tower: CLIPVisionTower) -> tuple[int, int]:
        if getattr(self.config, "image_aspect_ratio", "square") != "anyres":
            raise NotImplementedError
        return grid_of(size, self.config.image_grid_pinpoints, tower.config.image_size)

    def _pooled(self, frames: Tensor) -> Tensor:
        grid = rearrange(frames, "n (h w) d -> n d h w", h=self.get_vision_tower().num_patches_per_side)
        return rearrange(nn.functional.avg_pool2d(grid, 2), "n d h w -> n (h w) d")

    def _image_at(self, features: Any, index: int) -> Tensor:
        return features[index]

    def _merged(
        self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, features: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Embeddings and labels of each row, without padding."""
        valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        labels = torch.full_like(input_ids, IGNORE_INDEX) if labels is None else labels
        embed = self.get_model().embed_tokens
        rows, targets, image = [], [], 0
        for row, keep in enumerate(valid):
            ids, target = input_ids[row, keep], labels[row, keep]
            is_image = ids == IMAGE_TOKEN_INDEX
            if not is_image.any():
                # The row's dummy image is used up; none of its tokens are shown.
                rows.append(torch.cat([embed(ids), features[image][:0]]))
                targets.append(target)
                image += 1
                continue
            lengths = [len(part) for part in ids.tensor_split(is_image.nonzero().flatten().cpu())]
            lengths = [lengths[0], *(length - 1 for length in lengths[1:])]
            texts = embed(ids[~is_image]).split(lengths)
            text_targets = target[~is_image].split(lengths)
            merged, merged_targets = [texts[0]], [text_targets[0]]
            for text, text_target in zip(texts[1:], text_targets[1:], strict=True):
                shown = self._image_at(features, image)
                image += 1
                merged += [shown, text]
                merged_targets += [target.new_full((len(shown),), IGNORE_INDEX), text_target]
            rows.append(torch.cat(merged))
            targets.append(torch.cat(merged_targets))
        limit = getattr(self.config, "tokenizer_model_max_length", None)
        return [row[:limit] for row in rows], [target[:limit] for target in targets]

    def _padded(self, rows, targets, position_ids, attention_mask, past_key_values, labels):
        side = getattr(self.config, "tokenizer_padding_side", "right")

        def pad(parts: list[Tensor], value: float = 0) -> Tensor:
            return pad_sequence(parts, batch_first=True, padding_value=value, padding_side=side)

        positions = [torch.arange(len(row), device=row.device) for row in rows]
        mask = None
        if attention_mask is not None:
            mask = pad([torch.ones_like(position) for position in positions]).to(attention_mask.dtype)
        return (
            None,
            None if position_ids is None else pad(positions).to(position_ids.dtype),
            mask,
            past_key_values,
            pad(rows),
            None if labels is None else pad(targets, IGNORE_INDEX),
        )


class LlavaConfig(LlamaConfig):
    model_type = "llava_llama"


class LlavaLlamaModel(LlavaMetaModel, LlamaModel):
    config_class = LlavaConfig


class LlavaLlamaForCausalLM(LlamaForCausalLM, LlavaMetaForCausalLM):
    config_class = LlavaConfig

    def __init__(self, config: Any) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = LlavaLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_model(self) -> LlavaLlamaModel:
        return self.model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        images: Tensor | list[Tensor] | None = None,
        image_sizes: Any = None,
        return_dict: bool | None = None,
    ) -> Any:
        if inputs_embeds is None:
            input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels = (
                self.prepare_inputs_labels_for_multimodal(
                    input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes
                )
            )
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        images: Tensor | list[Tensor] | None = None,
        image_sizes: Any = None,
        **kwargs: Any,
    ) -> Any:
        position_ids = kwargs.pop("position_ids", None)
        attention_mask = kwargs.pop("attention_mask", None)
        if "inputs_embeds" in kwargs:
            raise NotImplementedError("`inputs_embeds` is not supported")
        if images is None:
            embeds = self.get_model().embed_tokens(inputs)
        else:
            _, position_ids, attention_mask, _, embeds, _ = self.prepare_inputs_labels_for_multimodal(
                inputs, position_ids, attention_mask, None, None, images, image_sizes=image_sizes
            )
        return super().generate(
            position_ids=position_ids, attention_mask=attention_mask, inputs_embeds=embeds, **kwargs
        )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Any = None, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        visual = {name: kwargs.pop(name, None) for name in ("images", "image_sizes")}
        inputs = super().prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds, **kwargs
        )
        return inputs | {name: value for name, value in visual.items() if value is not None}


class LlavaQwenConfig(Qwen2Config):
    model_type = "llava_qwen"


class LlavaQwenModel(LlavaMetaModel, Qwen2Model):
    config_class = LlavaQwenConfig


class LlavaQwenForCausalLM(Qwen2ForCausalLM, LlavaMetaForCausalLM):
    config_class = LlavaQwenConfig

    def __init__(self, config: Any) -> None:
        Qwen2ForCausalLM.__init__(self, config)
        self.model = LlavaQwenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_model(self) -> LlavaQwenModel:
        return self.model

    def _image_at(self, features: Any, index: int) -> Tensor:
        """Where images run out, the last one is shown again."""
        try:
            return features[index]
        except IndexError:
            return features[index - 1]

    def _tile_grid(self, size: Any, tower: CLIPVisionTower) -> tuple[int, int]:
        if getattr(self.config, "image_aspect_ratio", "square") != "anyres":
            return 2, 2
        return grid_of(size, self.config.image_grid_pinpoints, tower.image_size)

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids,
        position_ids,
        attention_mask,
        past_key_values,
        labels,
        images,
        modalities=("image",),
        image_sizes=None,
    ):
        if self.get_vision_tower() is None or images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        modalities = [modalities] if isinstance(modalities, str) else modalities
        videos = [index for index, modality in enumerate(modalities) if modality == "video"]
        features = self._features(images, image_sizes, videos)
        rows, targets = self._merged(input_ids, attention_mask, labels, features)
        # As in the original, rows without a modality of the same number get lost.
        rows, targets = rows[: len(modalities)], targets[: len(modalities)]
        return self._padded(rows, targets, position_ids, attention_mask, past_key_values, labels)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        images: Tensor | list[Tensor] | None = None,
        image_sizes: Any = None,
        return_dict: bool | None = None,
        modalities: Sequence[str] | str = ("image",),
        dpo_forward: bool = False,
        cache_position: Any = None,
    ) -> Any:
        if inputs_embeds is None:
            input_ids, position_ids, attention_mask, past_key_values, inputs_embeds, labels = (
                self.prepare_inputs_labels_for_multimodal(
                    input_ids, position_ids, attention_mask, past_key_values, labels, images, modalities, image_sizes
                )
            )
        arguments = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }
        if dpo_forward:
            return self.lm_head(self.model(**arguments)[0]), labels
        return super().forward(**arguments, labels=labels)

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        images: Tensor | list[Tensor] | None = None,
        image_sizes: Any = None,
        modalities: Sequence[str] | str = ("image",),
        **kwargs: Any,
    ) -> Any:
        position_ids = kwargs.pop("position_ids", None)
        attention_mask = kwargs.pop("attention_mask", None)
        if "inputs_embeds" in kwargs:
            raise NotImplementedError("`inputs_embeds` is not supported")
        if images is None:
            embeds = self.get_model().embed_tokens(inputs)
        else:
            _, position_ids, attention_mask, _, embeds, _ = self.prepare_inputs_labels_for_multimodal(
                inputs, position_ids, attention_mask, None, None, images, modalities, image_sizes=image_sizes
            )
        return super().generate(
            position_ids=position_ids, attention_mask=attention_mask, inputs_embeds=embeds, **kwargs
        )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Any = None, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        visual = {name: kwargs.pop(name, None) for name in ("images", "image_sizes")}
        inputs = super().prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds, **kwargs
        )
        return inputs | {name: value for name, value in visual.items() if value is not None}


for _config, _model in ((LlavaConfig, LlavaLlamaForCausalLM), (LlavaQwenConfig, LlavaQwenForCausalLM)):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)


def llava_original(
    projector: str = "mlp2x_gelu",
    seed: int = 0,
    patch_merge: str = "flat",
    *,
    llm: str = "llama",
    padding_side: str = "right",
    **changes: Any,
) -> Any:
    """A model in eval mode; ``llm`` is ``"llama"`` or ``"qwen"``, ``padding_side`` that of the merged sequences."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_hidden_size": tiny.WIDTH,
        "mm_projector_type": projector,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": patch_merge,
        "mm_spatial_pool_mode": "average",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "image_aspect_ratio": "pad" if patch_merge == "flat" else "anyres",
        "image_grid_pinpoints": PINPOINTS,
        "tokenizer_padding_side": padding_side,
        "tokenizer_model_max_length": 2048,
        "vision_tower_config": {**tiny.vision_config().to_dict(), "initializer_range": 0.2, "initializer_factor": 5.0},
    }
    config_class, model_class = {
        "llama": (LlavaConfig, LlavaLlamaForCausalLM),
        "qwen": (LlavaQwenConfig, LlavaQwenForCausalLM),
    }[llm]
    return model_class(config_class(**{**settings, **changes})).eval()


def _pixels(seed: int, row: int, position: int, tiles: int) -> Tensor:
    generator = torch.Generator().manual_seed(1_000_000 * seed + 1000 * row + position)
    return torch.randn(tiles, 3, SIDE, SIDE, generator=generator)


def llava_inputs(
    images_per_row: list[int], *, form: str = "batch", padding_side: str = "right", seed: int = 0
) -> dict[str, Any]:
    """A batch for ``forward``; a row without images brings the blank image that the model takes from it.

    ``form`` is that of ``images``: ``"batch"`` a 4-D tensor, ``"list"`` 3-D tensors, ``"stacked"`` a 5-D tensor with
    three tiles for each image, ``"anyres"`` 4-D tensors with as many tiles as follow from ``image_sizes``.
    """
    anyres = form in ("stacked", "anyres")
    rows, images, sizes = [], [], []
    for number, count in enumerate(images_per_row):
        row = [1, 10 + number]
        for position in range(count or 1):
            size = (SIDE, SIDE)
            if anyres:
                size = ANYRES_SIZES[(number + position) % len(ANYRES_SIZES) if form == "anyres" else 0]
            columns, lines = grid_of(size, PINPOINTS, SIDE) if anyres else (0, 0)
            tiles = _pixels(seed, number, position, 1 + columns * lines)
            images.append(tiles if count else torch.zeros_like(tiles))
            sizes.append(size)
            row += [IMAGE_TOKEN_INDEX, 20 + number] if count else []
        rows.append(torch.tensor([*row, 30 + number, 40 + number, *([50] * (number % 3))]))
    ids = pad_sequence(rows, batch_first=True, padding_side=padding_side)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": ids.ne(0).long()}
    if form == "batch":
        inputs["images"] = torch.cat(images)
    elif form == "list":
        inputs["images"] = [image[0] for image in images]
    else:
        inputs["images"] = torch.stack(images) if form == "stacked" else images
        inputs["image_sizes"] = sizes
    return inputs


def llava_row(inputs: dict[str, Any], images_per_row: list[int], row: int) -> dict[str, Any]:
    """One row of :func:`llava_inputs` as a batch of its own, without padding."""
    keep = inputs["attention_mask"][row].bool()
    alone = {name: inputs[name][row : row + 1, keep] for name in ("input_ids", "attention_mask")}
    first, count = sum(number or 1 for number in images_per_row[:row]), images_per_row[row] or 1
    visual = {name: inputs[name][first : first + count] for name in ("images", "image_sizes") if name in inputs}
    return alone | visual


def llava_generate_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same batch for ``generate``, which calls the token ids ``inputs``."""
    return {"inputs" if name == "input_ids" else name: value for name, value in inputs.items()}
