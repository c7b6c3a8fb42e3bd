"""A tiny InternVL with the interface of its authors' remote code, which is not part of transformers.

``InternVLChatModel`` here has the attributes, signatures, call order and tensor layouts of the original
(``modeling_internvl_chat.py``, model type ``internvl_chat``). Left out: flash attention, LoRA wrapping, packed
sequences, stochastic depth, resampled position embeddings, loss weights, and every language model but Qwen2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from tests.support import tiny

WIDTH = 32
PATCH = 8
GRID = 4
IMAGE_SIZE = PATCH * GRID
TOKENS_PER_TILE = (GRID // 2) ** 2

SPECIAL_TOKENS = ("<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
PAD, IMG_START, IMG_END, IMG_CONTEXT = (
    SPECIAL_TOKENS.index(token) for token in ("<|endoftext|>", "<img>", "</img>", "<IMG_CONTEXT>")
)
USER, ASSISTANT, SEPARATOR = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"


class InternVisionConfig(PreTrainedConfig):
    model_type = "intern_vit_6b"

    def __init__(
        self,
        patch_size: int = PATCH,
        image_size: int = IMAGE_SIZE,
        hidden_size: int = WIDTH,
        num_attention_heads: int = 4,
        intermediate_size: int = 2 * WIDTH,
        num_hidden_layers: int = 2,
        layer_norm_eps: float = 1e-6,
        initializer_range: float = 0.2,
        initializer_factor: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.patch_size = patch_size
        self.image_size = image_size
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        self.initializer_factor = initializer_factor


class InternVLChatConfig(PreTrainedConfig):
    model_type = "internvl_chat"

    def __init__(
        self,
        vision_config: dict[str, Any] | None = None,
        llm_config: dict[str, Any] | None = None,
        select_layer: int = -1,
        force_image_size: int | None = None,
        downsample_ratio: float = 0.5,
        template: str | None = None,
        ps_version: str = "v1",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.vision_config = InternVisionConfig(**(vision_config or {}))
        self.llm_config = Qwen2Config(**(llm_config or {}))
        self.select_layer = select_layer
        self.force_image_size = force_image_size
        self.downsample_ratio = downsample_ratio
        self.template = template
        self.ps_version = ps_version
        self.hidden_size = self.llm_config.hidden_size
        self.tie_word_embeddings = False
        self.llm_config.tie_word_embeddings = False


class InternVisionEmbeddings(nn.Module):
    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        width, patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.randn(1, 1, width))
        self.patch_embedding = nn.Conv2d(3, width, config.patch_size, config.patch_size)
        self.position_embedding = nn.Parameter(torch.randn(1, patches + 1, width))

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = rearrange(self.patch_embedding(pixel_values), "n c h w -> n (h w) c")
        return torch.cat([self.class_embedding.expand(len(patches), -1, -1), patches], dim=1) + self.position_embedding


class InternAttention(nn.Module):
    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(hidden_states), "n s (qkv h d) -> qkv n h s d", qkv=3, h=self.num_heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "n h s d -> n s (h d)"))


class InternMLP(nn.Module):
    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(hidden_states)))


class InternVisionEncoderLayer(nn.Module):
    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.attn = InternAttention(config)
        self.mlp = InternMLP(config)
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ls1 = nn.Parameter(torch.full((config.hidden_size,), config.initializer_factor))
        self.ls2 = nn.Parameter(torch.full((config.hidden_size,), config.initializer_factor))

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states)) * self.ls1
        return hidden_states + self.mlp(self.norm2(hidden_states)) * self.ls2


class InternVisionEncoder(nn.Module):
    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(InternVisionEncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, inputs_embeds: Tensor) -> tuple[Tensor, ...]:
        """The input and the output of every layer."""
        states = [inputs_embeds]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return tuple(states)


class InternVisionModel(PreTrainedModel):
    config_class = InternVisionConfig
    main_input_name = "pixel_values"

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = InternVisionEmbeddings(config)
        self.encoder = InternVisionEncoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        pixel_embeds: Tensor | None = None,
    ) -> BaseModelOutputWithPooling:
        states = self.encoder(self.embeddings(pixel_values) if pixel_embeds is None else pixel_embeds)
        return BaseModelOutputWithPooling(
            last_hidden_state=states[-1],
            pooler_output=states[-1][:, 0],
            hidden_states=states if output_hidden_states else None,
        )


class InternVLChatModel(PreTrainedModel):
    config_class = InternVLChatConfig
    main_input_name = "pixel_values"
    base_model_prefix = "language_model"
    supports_gradient_checkpointing = True

    def __init__(self, config: InternVLChatConfig, vision_model: Any = None, language_model: Any = None) -> None:
        super().__init__(config)
        image_size = config.force_image_size or config.vision_config.image_size
        self.patch_size = config.vision_config.patch_size
        self.select_layer = config.select_layer
        self.template = config.template
        self.downsample_ratio = config.downsample_ratio
        self.num_image_token = int((image_size // self.patch_size) ** 2 * self.downsample_ratio**2)
        self.ps_version = config.ps_version
        self.vision_model = vision_model or InternVisionModel(config.vision_config)
        self.language_model = language_model or Qwen2ForCausalLM(config.llm_config)
        shuffled = config.vision_config.hidden_size * int(1 / self.downsample_ratio) ** 2
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(shuffled),
            nn.Linear(shuffled, config.llm_config.hidden_size),
            nn.GELU(),
            nn.Linear(config.llm_config.hidden_size, config.llm_config.hidden_size),
        )
        self.img_context_token_id: int | None = None
        self.system_message: str = getattr(config, "system_message", "You look at pictures.")
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        image_flags: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> tuple[Any, ...] | CausalLMOutputWithPast:
        return_dict = self.config.return_dict if return_dict is None else return_dict
        image_flags = image_flags.squeeze(-1)
        embeds = self.language_model.get_input_embeddings()(input_ids).clone()
        # The projector has seen the dummy tiles too: they are dropped only now.
        visual = self.extract_feature(pixel_values)[image_flags == 1].reshape(-1, embeds.shape[-1])

        flat, selected = embeds.flatten(0, 1), input_ids.flatten() == self.img_context_token_id
        placeholders = int(selected.sum())
        mismatch = len(visual) != placeholders
        # Adding nothing of the placeholders' own embeddings keeps them in the graph; superfluous tokens are cut off.
        flat[selected] = flat[selected] * 0.0 + visual[:placeholders]

        outputs = self.language_model(
            inputs_embeds=flat.view_as(embeds),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        loss = None
        if labels is not None:
            loss = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            loss = loss * 0.0 if mismatch else loss
        made = CausalLMOutputWithPast(
            loss=loss,
            logits=outputs.logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return made if return_dict else made.to_tuple()

    def pixel_shuffle(self, x: Tensor, scale_factor: float = 0.5) -> Tensor:
        """Fold neighbouring patches of the grid into channels; version 1 leaves the grid transposed."""
        grid = "b a" if self.ps_version == "v1" else "a b"
        step = int(1 / scale_factor)
        return rearrange(x, f"n (a da) (b db) c -> n {grid} (da db c)", da=step, db=step)

    def extract_feature(self, pixel_values: Tensor) -> Tensor:
        if self.select_layer == -1:
            seen = self.vision_model(pixel_values=pixel_values, output_hidden_states=False, return_dict=True)
            patches = seen.last_hidden_state[:, 1:]
        else:
            seen = self.vision_model(pixel_values=pixel_values, output_hidden_states=True, return_dict=True)
            patches = seen.hidden_states[self.select_layer][:, 1:]
        side = int(patches.shape[1] ** 0.5)
        grid = self.pixel_shuffle(patches.unflatten(1, (side, side)), scale_factor=self.downsample_ratio)
        return self.mlp1(grid.flatten(1, 2))

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        visual_features: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        output_hidden_states: bool | None = None,
        **generate_kwargs: Any,
    ) -> Any:
        assert self.img_context_token_id is not None
        embeds = self.language_model.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            visual = self.extract_feature(pixel_values) if visual_features is None else visual_features
            selected = input_ids == self.img_context_token_id
            assert selected.any()
            embeds[selected] = visual.reshape(-1, embeds.shape[-1]).to(embeds.device)
        return self.language_model.generate(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            generation_config=generation_config,
            output_hidden_states=output_hidden_states,
            use_cache=True,
            **generate_kwargs,
        )

    def _prompt(self, turns: list[tuple[str, str | None]], system: str) -> str:
        text = f"<|im_start|>system\n{system}{SEPARATOR}"
        for question, answer in turns:
            text += USER + question + SEPARATOR + ASSISTANT + (answer + SEPARATOR if answer else "")
        return text

    def _answers(self, tokenizer: Any, queries: list[str], pixel_values: Any, settings: dict[str, Any]) -> list[str]:
        encoded = tokenizer(queries, return_tensors="pt", padding=len(queries) > 1).to(self.device)
        settings["eos_token_id"] = tokenizer.convert_tokens_to_ids(SEPARATOR.strip())
        output = self.generate(
            pixel_values=pixel_values,
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            **settings,
        )
        texts = tokenizer.batch_decode(output, skip_special_tokens=True)
        return [text.split(SEPARATOR.strip())[0].strip() for text in texts]

    def batch_chat(
        self,
        tokenizer: Any,
        pixel_values: Tensor | None,
        questions: list[str],
        generation_config: dict[str, Any],
        num_patches_list: list[int] | None = None,
        history: Any = None,
        return_history: bool = False,
        IMG_START_TOKEN: str = "<img>",  # noqa: N803
        IMG_END_TOKEN: str = "</img>",  # noqa: N803
        IMG_CONTEXT_TOKEN: str = "<IMG_CONTEXT>",  # noqa: N803
        verbose: bool = False,
        image_counts: list[int] | None = None,
    ) -> list[str]:
        """One image (of several tiles) and one turn for each question."""
        if history is not None or return_history:
            raise NotImplementedError
        num_patches_list = num_patches_list if image_counts is None else image_counts
        self.img_context_token_id = tokenizer.convert_tokens_to_ids(IMG_CONTEXT_TOKEN)
        queries = []
        for question, tiles in zip(questions, num_patches_list, strict=False):
            marked = question if pixel_values is None or "<image>" in question else "<image>\n" + question
            image = IMG_START_TOKEN + IMG_CONTEXT_TOKEN * (self.num_image_token * tiles) + IMG_END_TOKEN
            queries.append(self._prompt([(marked, None)], self.system_message).replace("<image>", image, 1))
        tokenizer.padding_side = "left"
        return self._answers(tokenizer, queries, pixel_values, generation_config)

    def chat(
        self,
        tokenizer: Any,
        pixel_values: Tensor | None,
        question: str,
        generation_config: dict[str, Any],
        history: list[tuple[str, str]] | None = None,
        return_history: bool = False,
        num_patches_list: list[int] | None = None,
        IMG_START_TOKEN: str = "<img>",  # noqa: N803
        IMG_END_TOKEN: str = "</img>",  # noqa: N803
        IMG_CONTEXT_TOKEN: str = "<IMG_CONTEXT>",  # noqa: N803
        verbose: bool = False,
    ) -> str | tuple[str, list[tuple[str, str]]]:
        """One row; ``pixel_values`` holds the tiles of the images of all turns, old ones included."""
        if history is None and pixel_values is not None and "<image>" not in question:
            question = "<image>\n" + question
        if num_patches_list is None:
            num_patches_list = [] if pixel_values is None else [len(pixel_values)]
        assert pixel_values is None or len(pixel_values) == sum(num_patches_list)
        self.img_context_token_id = tokenizer.convert_tokens_to_ids(IMG_CONTEXT_TOKEN)
        history = [] if history is None else history
        query = self._prompt([*history, (question, None)], self.system_message)
        for tiles in num_patches_list:
            image = IMG_START_TOKEN + IMG_CONTEXT_TOKEN * (self.num_image_token * tiles) + IMG_END_TOKEN
            query = query.replace("<image>", image, 1)
        (answer,) = self._answers(tokenizer, [query], pixel_values, generation_config)
        history.append((question, answer))
        return (answer, history) if return_history else answer

    @property
    def lm_head(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()


def internvl_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tiny._byte_level_bpe(380, SPECIAL_TOKENS)),
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[2:]),
        padding_side="left",
    )


def internvl_chat(seed: int = 0, *, set_context_token: bool = True, **changes: Any) -> InternVLChatModel:
    """A model in eval mode for :func:`internvl_tokenizer`; ``changes`` are fields of its config.

    The original knows its placeholder only after the first ``chat``, or when the caller sets
    ``img_context_token_id``: ``set_context_token`` does that.
    """
    torch.manual_seed(seed)
    llm_config = {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": len(internvl_tokenizer()),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": PAD,
    }
    settings = {"llm_config": llm_config, "template": "internvl2_5", "ps_version": "v2", "initializer_range": 0.2}
    model = InternVLChatModel(InternVLChatConfig(**{**settings, **changes})).eval()
    if set_context_token:
        model.img_context_token_id = IMG_CONTEXT
    return model


def _tile(seed: int, row: int, position: int) -> Tensor:
    generator = torch.Generator().manual_seed(1_000_000 * seed + 1000 * row + position)
    return torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)


def internvl_inputs(
    tiles_per_row: list[list[int]], *, seed: int = 0, padding_side: str = "left", dummies: bool = True
) -> dict[str, Tensor]:
    """A batch for ``forward``: for each row the number of tiles of each of its images.

    As in the original's training data, a row without images comes with one blank tile whose flag is 0, unless
    ``dummies`` is false. ``generate`` takes neither blank tiles nor flags: see :func:`internvl_generate_inputs`.
    """
    rows, tiles, flags = [], [], []
    for number, images in enumerate(tiles_per_row):
        row = [10 + number]
        for count in images:
            row += [IMG_START, *[IMG_CONTEXT] * (TOKENS_PER_TILE * count), IMG_END, 20 + number]
        rows.append([*row, 30 + number, 40 + number, *([50] * (number % 3))])
        tiles += [_tile(seed, number, position) for position in range(sum(images))]
        flags += [1] * sum(images)
        if dummies and not images:
            tiles.append(torch.ones(3, IMAGE_SIZE, IMAGE_SIZE))
            flags.append(0)
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), longest) if padding_side == "left" else slice(0, len(row))
        ids[i, where] = torch.tensor(row)
        mask[i, where] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if tiles:
        inputs |= {"pixel_values": torch.stack(tiles), "image_flags": torch.tensor(flags)}
    return inputs


def internvl_row(inputs: dict[str, Tensor], tiles_per_row: list[list[int]], row: int) -> dict[str, Tensor]:
    """One row of :func:`internvl_inputs`, made with its dummies, as a batch of its own and without padding."""
    keep = inputs["attention_mask"][row].bool()
    alone = {name: inputs[name][row : row + 1, keep] for name in ("input_ids", "attention_mask")}
    first, count = sum(sum(images) or 1 for images in tiles_per_row[:row]), sum(tiles_per_row[row]) or 1
    return alone | {name: inputs[name][first : first + count] for name in ("pixel_values", "image_flags")}


def internvl_generate_inputs(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same batch for ``generate``: the tiles that are shown, without flags."""
    made = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    shown = inputs["pixel_values"][inputs["image_flags"].flatten() == 1] if "pixel_values" in inputs else ()
    return made | {"pixel_values": shown} if len(shown) else made
