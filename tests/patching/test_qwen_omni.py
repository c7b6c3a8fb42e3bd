"""Qwen-Omni: the thinker is patched through the model that speaks, and what it hears passes by."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from emma_adapter import (
    EmmaConfig,
    EmmaVisionExperts,
    add_vision_expert,
    get_adapter,
    load_adapter,
    load_vision_experts,
    patch_model,
    unpatch_model,
)
from tests.patching.test_families import EFFECT, SAME, last_logits, train
from tests.patching.test_llava import snapshot
from tests.support import tiny
from tests.support.zoo import ZOO, Row, qwen_omni


@dataclass(frozen=True)
class Speaking:
    entry: str
    make: Callable[[], PreTrainedModel]
    only_text: dict[str, Any]
    #: Settings with which neither thinker nor talker ends before it must.
    endless: dict[str, Any]
    #: Arguments of pictures that transformers also hands to a talker, which refuses them: named as the thinker's.
    seen_by_thinker: tuple[str, ...] = ()

    def model(self) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: Any = self.make().eval()
        # Transformers leaves the experts of Qwen3's talker uninitialised. What it says must depend on what it is told.
        for parameter in model.talker.parameters():
            parameter.data.zero_()
        tiny.train_randomly(model.talker, 1.0)
        words = ZOO[self.entry].processor().tokenizer
        model.thinker.generation_config.eos_token_id = None
        model.thinker.generation_config.pad_token_id = words.pad_token_id
        return model

    def patched(self) -> tuple[Any, Any]:
        model = self.model()
        config = EmmaConfig(fusion="attention", inner_dim=16)
        return model, patch_model(model, config, processor=ZOO[self.entry].processor())

    def batch(self) -> dict[str, Any]:
        return ZOO[self.entry].batch([Row(("how many dogs are there?",), images=((56, 56),), seed=1)])

    def write(self, model: Any, **more: Any) -> Tensor:
        """The logits of the first token that it writes."""
        settings = {"thinker_max_new_tokens": 1, "thinker_output_logits": True, "thinker_return_dict_in_generate": True}
        return model.generate(**self.batch(), **settings, **self.only_text, **more).logits[0]

    def speak(self, model: Any, **more: Any) -> tuple[Tensor, Tensor]:
        batch = {f"thinker_{name}" if name in self.seen_by_thinker else name: v for name, v in self.batch().items()}
        lengths = {"thinker_max_new_tokens": 5, "talker_max_new_tokens": 24, "talker_do_sample": False}
        torch.manual_seed(0)
        text, sound = model.generate(**batch, **lengths, **self.endless, **more)
        return text, sound.flatten()


SPEAKING = (
    Speaking(
        "qwen2_5_omni_thinker",
        qwen_omni.qwen2_5_omni,
        {"generation_mode": "text"},
        {"talker_eos_token_id": [99]},
        ("pixel_values",),
    ),
    Speaking("qwen3_omni_moe_thinker", qwen_omni.qwen3_omni, {"return_audio": False}, {"thinker_eos_token_id": None}),
)
each = pytest.mark.parametrize("speaking", SPEAKING, ids=lambda speaking: speaking.entry)


@each
def test_the_thinker_is_patched_and_unpatched(speaking):
    model = speaking.model()
    before = speaking.write(model)
    _, sound_before = speaking.speak(model)
    left = snapshot(model)
    adapter = patch_model(model, EmmaConfig(inner_dim=16), processor=ZOO[speaking.entry].processor())
    assert adapter.model is get_adapter(model).model is model.thinker
    assert torch.equal(speaking.write(model), before)
    train(adapter)
    changed = speaking.write(model)
    assert (changed - before).abs().max() > EFFECT
    torch.testing.assert_close(changed, last_logits(model.thinker, speaking.batch()), atol=SAME, rtol=0)
    assert not torch.equal(speaking.speak(model)[1], sound_before)
    with adapter.disable_adapter():
        assert torch.equal(speaking.write(model), before)
        assert torch.equal(speaking.speak(model)[1], sound_before)
    unpatch_model(model)
    assert torch.equal(speaking.write(model), before)
    for name, module in model.named_modules():
        assert set(vars(module)) <= set(left[name]) | {"_parameters", "_buffers"}, name


@each
def test_the_instruction_is_the_thinkers_alone(speaking):
    model, adapter = speaking.patched()
    train(adapter)
    told = "what colour is the left bird?"
    with adapter.instruction(told):
        wanted, wanted_sound = speaking.write(model), speaking.speak(model)[1]
    assert (wanted - speaking.write(model)).abs().max() > EFFECT
    torch.testing.assert_close(speaking.write(model, instruction=told), wanted, atol=SAME, rtol=0)
    assert torch.equal(speaking.speak(model, instruction=[told])[1], wanted_sound)
    assert torch.equal(speaking.speak(model, thinker_instruction=told)[1], wanted_sound)


@each
def test_saves_are_the_original_with_the_parts_beside(speaking, tmp_path):
    model, adapter = speaking.patched()
    train(adapter)
    add_vision_expert(model, "stem")
    tiny.train_randomly(model.thinker.emma_experts, 0.2)
    original = speaking.model()
    model.save_pretrained(tmp_path)
    config = type(original.config).from_pretrained(tmp_path)
    # Qwen2.5-Omni's own from_pretrained wants the voices, which only the hub has.
    reloaded, loading = super(type(original), type(original)).from_pretrained.__func__(
        type(original), tmp_path, config=config, output_loading_info=True
    )
    assert not loading["unexpected_keys"] and not loading["missing_keys"]
    expected = original.state_dict()
    assert reloaded.state_dict().keys() == expected.keys()
    for name, tensor in reloaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    reloaded.speaker_map = getattr(original, "speaker_map", {})
    reloaded.thinker.generation_config = original.thinker.generation_config
    load_adapter(reloaded, tmp_path, processor=ZOO[speaking.entry].processor())
    load_vision_experts(reloaded, tmp_path)
    assert torch.equal(speaking.write(reloaded), speaking.write(model))


@each
def test_parts_come_off_one_after_the_other(speaking, tmp_path):
    model, adapter = speaking.patched()
    add_vision_expert(model, "stem")
    EmmaVisionExperts(model).remove()
    model.save_pretrained(tmp_path / "patched")
    assert (tmp_path / "patched" / "emma_adapter").is_dir()
    unpatch_model(model.thinker)
    model.save_pretrained(tmp_path / "bare")
    assert not (tmp_path / "bare" / "emma_adapter").exists()
    again = patch_model(model, processor=ZOO[speaking.entry].processor())
    assert again.model is adapter.model
    unpatch_model(model)
    assert not {"generate", "save_pretrained"} & set(vars(model))


@each
def test_a_copy_is_independent(speaking):
    model, _ = speaking.patched()
    twin = copy.deepcopy(model)
    before = speaking.write(model)
    train(get_adapter(twin))
    assert torch.equal(speaking.write(model), before)
    assert (speaking.write(twin, instruction="yes?") - before).abs().max() > EFFECT


def hearing(processor: Any, sound: Any, seen: Row) -> dict[str, Any]:
    """A row with a sound, and a row with a picture."""
    marks = (processor.audio_bos_token, processor.audio_token, processor.audio_eos_token)
    heard = {"role": "user", "content": [{"type": "text", "text": f"{''.join(marks)}what is said?"}]}
    talks = ([heard], seen.messages())
    made = processor(
        text=[processor.apply_chat_template(talk, add_generation_prompt=True) for talk in talks],
        audio=[sound],
        images=seen.pictures(),
        padding=True,
        return_tensors="pt",
    )
    return dict(made)


@each
def test_audio_passes_by(speaking):
    entry = ZOO[speaking.entry]
    model: nn.Module = entry.model()
    sound = torch.randn(8000, generator=torch.Generator().manual_seed(0)).numpy()
    batch = hearing(entry.processor(), sound, Row(("how many dogs are there?",), images=((56, 56),)))
    assert (batch["input_ids"] == model.config.audio_token_id).sum() > 4
    before = last_logits(model, batch)
    silent = last_logits(model, {**batch, "input_features": torch.zeros_like(batch["input_features"])})
    assert (silent - before)[0].abs().max() > EFFECT
    adapter = patch_model(model, EmmaConfig(fusion="attention", inner_dim=16), processor=entry.processor())
    assert torch.equal(last_logits(model, batch), before)
    train(adapter)
    changed = last_logits(model, batch)
    assert torch.equal(changed[0], before[0])
    assert (changed - before)[1].abs().max() > EFFECT
