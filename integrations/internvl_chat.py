"""InternVL's own classes, which come with its checkpoints (``trust_remote_code``): a projector ``mlp1``."""

from __future__ import annotations

from typing import Any

from torch import nn

from emma_adapter import MediaLayout, ModelFamily, ProjectorCall, RoutingError


class InternVLChatFamily(ModelFamily):
    """Features ``[tiles, N, D]`` after the pixel shuffle.

    In training, a row without an image brings a tile that is flagged 0 and that no prompt shows.
    """

    model_types = ("internvl_chat",)
    projector_path = "mlp1"
    size_arguments = ("image_flags",)
    tiles = True

    def inner(self, model: nn.Module) -> nn.Module:
        return model

    def visual_dim(self, inner: nn.Module) -> int:
        config: Any = inner.config
        return int(config.vision_config.hidden_size / config.downsample_ratio**2)

    def visual_size(self, inner: nn.Module) -> tuple[int | None, tuple[int, int] | None]:
        config: Any = inner.config
        image = config.force_image_size or config.vision_config.image_size
        side = int(image // config.vision_config.patch_size * config.downsample_ratio)
        return side * side, (side, side)

    def placeholder_id(self, inner: nn.Module, modality: str) -> int:
        token_id: Any = inner.img_context_token_id
        if token_id is None:
            raise RoutingError(
                "the model doesn't know its placeholder token yet; set model.img_context_token_id = "
                'tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), as model.chat does'
            )
        return int(token_id)

    def layout(self, call: ProjectorCall) -> MediaLayout:
        tiles, per_tile = call.visual_tokens.shape[:2]
        flags = call.sizes["image_flags"]
        shown = [True] * tiles if flags is None else [bool(flag) for flag in flags.flatten().tolist()]
        return MediaLayout(tokens=[per_tile if is_shown else 0 for is_shown in shown], entries=[1] * len(shown))
