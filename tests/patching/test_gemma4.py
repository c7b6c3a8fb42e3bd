"""Gemma 4: grids that are read off the places of patches, videos of several shapes, and audio beside pictures."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from emma_adapter import EmmaConfig, RoutingError, patch_model
from emma_adapter.models.families import MediaLayout, ProjectorCall
from emma_adapter.models.registry import find_family
from tests.patching.test_families import EFFECT, SAME, generated, last_logits, train
from tests.support.zoo import ZOO, Row

ENTRY = ZOO["gemma4"]


def layout_of(modality: str, **sizes) -> MediaLayout:
    model = ENTRY.model()
    family = find_family(model)
    given = {name: sizes.get(name) for name in family.size_arguments}
    return family.layout(ProjectorCall(model.model, modality, torch.zeros(1, 1), given, None, None))


def places(*grids: tuple[int, int]) -> torch.Tensor:
    """``[images, patches, 2]`` for grids (height, width) in patches, padded as the processor does."""
    longest = max(height * width for height, width in grids) + 3
    padded = torch.full((len(grids), longest, 2), -1)
    for image, (height, width) in enumerate(grids):
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        padded[image, : height * width] = torch.stack([x, y], dim=-1).flatten(0, 1)
    return padded


def test_grids_are_those_of_pooled_patches():
    layout = layout_of("image", image_position_ids=places((4, 10), (6, 2)))
    assert layout.packed and layout.grids == [(2, 5), (3, 1)]
    assert layout.tokens == [10, 3] and layout.entries == [1, 1]


def test_frames_belong_to_their_videos():
    frames = places((4, 4), (4, 4), (2, 6))
    layout = layout_of("video", video_position_ids=frames, num_frames_per_video=torch.tensor([2, 1]))
    assert layout.grids == [(2, 2), (2, 2), (1, 3)]
    assert layout.tokens == [8, 3] and layout.entries == [2, 1]
    stacked = layout_of("video", video_position_ids=places(*[(4, 4)] * 6).view(2, 3, -1, 2))
    assert stacked.tokens == [12, 12] and stacked.entries == [3, 3]


@pytest.mark.parametrize("missing", ["video_position_ids", "num_frames_per_video"])
def test_a_size_that_is_missing_is_named(missing):
    sizes = {"video_position_ids": places((4, 4)), "num_frames_per_video": torch.tensor([1])}
    with pytest.raises(RoutingError, match=missing):
        layout_of("video", **{**sizes, missing: None})


def model_of(audio: dict | None = None, **text) -> hf.Gemma4ForConditionalGeneration:
    """The zoo's, with an audio tower, or other settings of its language model."""
    config = ENTRY.model().config.to_dict()
    # Made anew, for other layers.
    config["text_config"].pop("per_layer_config")
    config |= {"audio_config": audio, "text_config": config["text_config"] | {"global_head_dim": 16} | text}
    torch.manual_seed(0)
    return hf.Gemma4ForConditionalGeneration(hf.Gemma4Config(**config)).eval()


def test_layers_that_share_keys_and_values():
    """In ``generate``, a prompt's tokens but the last don't go through the layers that only read."""
    layers = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    shared = {"num_kv_shared_layers": 2, "attention_k_eq_v": False, "use_bidirectional_attention": None}
    model = model_of(**layers, **shared)
    assert not hasattr(model.model.language_model.layers[2].self_attn, "k_proj")
    rows = (Row(images=((56, 56), (28, 84)), seed=1), Row(("yes?",)), Row(("how many?",), videos=(3,), seed=2))
    batch = ENTRY.batch(rows)
    before = last_logits(model, batch)
    adapter = patch_model(model, EmmaConfig(fusion="attention", inner_dim=16), processor=ENTRY.processor())
    assert torch.equal(last_logits(model, batch), before)
    train(adapter)
    changed = last_logits(model, batch)
    assert ((changed - before).abs().amax(dim=1) > EFFECT).tolist() == [True, False, True]
    torch.testing.assert_close(generated(model, batch), changed, atol=SAME, rtol=0)
    for number, row in enumerate(rows):
        torch.testing.assert_close(changed[[number]], last_logits(model, ENTRY.batch([row])), atol=SAME, rtol=0)


def test_audio_passes_by():
    """The audio's features are what they are without an adapter, and only the picture's row changes."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "output_proj_dims": 32}
    model = model_of(audio={**sizes, "subsampling_conv_channels": [128, 2]})
    sound = torch.randn(1, 16000).numpy()
    processor = ENTRY.processor()
    talk = [{"role": "user", "content": [{"type": "text", "text": "what is said? <|audio|>"}]}]
    seen = Row(("how many dogs are there?",), images=((56, 56),))
    batch = dict(
        processor(
            text=[processor.apply_chat_template(one, add_generation_prompt=True) for one in (talk, seen.messages())],
            audio=list(sound),
            images=[[], seen.pictures()],
            add_special_tokens=False,
            padding=True,
            return_tensors="pt",
        )
    )
    assert (batch["input_ids"] == model.config.audio_token_id).sum() > 4
    before = last_logits(model, batch)
    silent = last_logits(model, {**batch, "input_features": torch.zeros_like(batch["input_features"])})
    assert (silent - before)[0].abs().max() > EFFECT
    adapter = patch_model(model, EmmaConfig(fusion="attention", inner_dim=16), processor=processor)
    assert torch.equal(last_logits(model, batch), before)
    train(adapter)
    changed = last_logits(model, batch)
    assert torch.equal(changed[0], before[0])
    assert (changed - before)[1].abs().max() > EFFECT
