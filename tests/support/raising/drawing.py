"""Errors of models that draw."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import cpu_offload
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from emma_adapter import (
    AutoencoderError,
    CheckpointError,
    ConfigError,
    DataError,
    EmmaUnified,
    MediaLayout,
    PatchError,
    ShapeError,
    UnifiedConfig,
    UnsupportedModelError,
    load_unified,
    unify_model,
)
from emma_adapter.files import tensor_folder
from emma_adapter.report import make_drawing_report
from emma_adapter.unified import checkpoint
from emma_adapter.unified.losses import latent_loss
from emma_adapter.unified.pixels import entry_pictures
from emma_adapter.unified.reading import read_rows
from tests.support import tiny
from tests.support.zoo import ZOO, Row
from tests.unified.small import autoencoder, unified

from .triggers import Bench, raises

SMALL = UnifiedConfig(decoupling=2)
PICTURE = tiny.picture(0).resize((64, 64))


def unify(config: UnifiedConfig | None = SMALL, model: Any = None, **changes: Any) -> EmmaUnified:
    settings = {"processor": tiny.processor(), "autoencoder": autoencoder(), **changes}
    return unify_model(tiny.llava() if model is None else model, config, **settings)


def draw(name: str = "llava", **settings: Any) -> None:
    made = {"prompt": "a dog", "height": 64, "width": 64, "num_inference_steps": 1, **settings}
    unified(name, SMALL).generate_images(made.pop("prompt"), **made)


def lose(prompts: Any = "a dog", targets: Any = None, images: Any = None) -> None:
    unify().loss(prompts, torch.rand(1, 3, 64, 64) if targets is None else targets, images)


# ----------------------------------------------------------------------------------------- the config


@raises(ConfigError, "unified/config.py:UnifiedConfig.__post_init__", "latent_channels an integer")
def more_channels_than_any_autoencoder_has(bench: Bench) -> None:
    UnifiedConfig(latent_channels=10**6)


@raises(ConfigError, "unified/config.py:UnifiedConfig.__post_init__", "fuse_understanding")
def fusing_that_is_neither_on_nor_off(bench: Bench) -> None:
    UnifiedConfig(fuse_understanding="yes")  # type: ignore[arg-type]


@raises(ConfigError, "unified/config.py:UnifiedConfig.__post_init__", "timestep_density")
def an_unknown_density(bench: Bench) -> None:
    UnifiedConfig(timestep_density="cosine")  # type: ignore[arg-type]


@raises(ConfigError, "unified/config.py:UnifiedConfig.__post_init__", "prompt_dropout")
def every_prompt_dropped(bench: Bench) -> None:
    UnifiedConfig(prompt_dropout=1.0)


@raises(ConfigError, "unified/config.py:UnifiedConfig.from_dict", "a JSON object")
def a_list_for_a_unified_config(bench: Bench) -> None:
    UnifiedConfig.from_dict([])  # type: ignore[arg-type]


@raises(ConfigError, "unified/config.py:UnifiedConfig.from_dict", "unknown config field(s)")
def a_field_that_no_unified_config_has(bench: Bench) -> None:
    UnifiedConfig.from_dict({"fusion": "linear"})


@raises(ConfigError, "unified/config.py:UnifiedConfig._require_int", "{name}")
def a_rank_of_zero(bench: Bench) -> None:
    UnifiedConfig(decoupling=0)


@raises(ConfigError, "unified/config.py:UnifiedConfig._require_number", "{name}")
def a_shift_of_zero(bench: Bench) -> None:
    UnifiedConfig(time_shift=0)


@raises(ConfigError, "unified/config.py:UnifiedConfig._check_statistics", "a finite number for each channel")
def a_deviation_of_zero(bench: Bench) -> None:
    UnifiedConfig(latent_std=(1.0, 0.0))


@raises(ConfigError, "unified/config.py:UnifiedConfig._check_statistics", "of latent_channels=")
def statistics_of_other_channels(bench: Bench) -> None:
    UnifiedConfig(latent_channels=3, latent_mean=(0.0, 0.0))


# ----------------------------------------------------------------------------------------- unify_model


@raises(PatchError, "unified/attaching.py:unify_model", "never learn of the new parameters")
def unifying_inside_a_wrapper(bench: Bench) -> None:
    unify(model=AveragedModel(tiny.llava()))


@raises(PatchError, "unified/attaching.py:unify_model", "was made to draw already")
def unifying_twice(bench: Bench) -> None:
    unify(model=unify().model)


@raises(DataError, "unified/samples.py:sample_files", "pairs of a prompt and a PIL image")
def samples_without_prompts(bench: Bench) -> None:
    unify().save_pretrained(bench.folder, samples=[tiny.picture(0)])


@raises(DataError, "files/tensor_folder.py:save", "samples go into a new")
def samples_for_a_card_that_is_there(bench: Bench) -> None:
    (bench.folder / "README.md").write_text("mine")
    unify().save_pretrained(bench.folder, samples=[("a dog", tiny.picture(0))])


@raises(DataError, "files/tensor_folder.py:push", "would not tell of samples")
def samples_for_a_repository_with_a_card(bench: Bench) -> None:
    hub = SimpleNamespace(create_repo=lambda *_, **__: None, file_exists=lambda *_, **__: True)
    bench.monkeypatch.setattr("huggingface_hub.HfApi", lambda **_: hub)
    unify().push_to_hub("someone/drawing", samples=[("a dog", tiny.picture(0))])


@raises(PatchError, "unified/branches.py:add", "that nn.ModuleDict uses")
def a_branch_that_is_called_as_a_method(bench: Bench) -> None:
    unify().add("keys")


@raises(PatchError, "unified/branches.py:add", "choose another name")
def a_branch_of_a_name_that_is_taken(bench: Bench) -> None:
    unify().add("default")


@raises(PatchError, "unified/branches.py:remove", "set_adapter() another one first")
def removing_the_active_branch(bench: Bench) -> None:
    unify().remove("default")


@raises(PatchError, "unified/branches.py:_require", "name one of these")
def activating_a_branch_that_is_not_there(bench: Bench) -> None:
    unify().set_active("comics")


@raises(PatchError, "unified/loading.py:_check_name", "puts another branch beside it")
def loading_a_second_branch_without_a_name(bench: Bench) -> None:
    unify().save_pretrained(bench.folder)
    load_unified(unify().model, bench.folder)


@raises(PatchError, "unified/loading.py:_check_name", "load without name=")
def loading_the_first_branch_with_a_name(bench: Bench) -> None:
    unify().save_pretrained(bench.folder)
    load_unified(tiny.llava(), bench.folder, name="comics")


@raises(ConfigError, "unified/branches.py:make_branch", "shared_layers")
def more_shared_layers_than_layers(bench: Bench) -> None:
    unify(UnifiedConfig(shared_layers=3))


@raises(UnsupportedModelError, "unified/branches.py:make_branch", "the model is quantized")
def full_copies_of_a_quantized_model(bench: Bench) -> None:
    model = tiny.llava()
    model.is_quantized = True
    unify(UnifiedConfig(decoupling="full"), model)


@raises(UnsupportedModelError, "unified/layers.py:decoupled_parameters", "has no full copy")
def full_copies_of_weights_that_were_quantized_by_hand(bench: Bench) -> None:
    model = tiny.llava()
    weight = model.model.language_model.layers[0].mlp.up_proj.weight.detach()
    quantized = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    model.model.language_model.layers[0].mlp.up_proj.weight = quantized
    unify(UnifiedConfig(decoupling="full"), model)


@raises(PatchError, "unified/branches.py:_check_whole", "sharded (tensor parallel")
def unifying_an_offloaded_model(bench: Bench) -> None:
    # The hook that brings a layer's weights is the layer's, not those of the modules that hold them.
    unify(model=cpu_offload(tiny.llava(), preload_module_classes=["LlamaDecoderLayer"]))


@raises(PatchError, "unified/prompts.py:_require_here", "before unify_model or load_unified")
def drawing_with_a_branch_that_was_offloaded(bench: Bench) -> None:
    adapter = unify()
    cpu_offload(adapter.model)
    adapter.generate_images("a dog", height=64, width=64, num_inference_steps=1)


@raises(PatchError, "unified/branches.py:_check_whole", "is spread over")
def unifying_a_model_on_several_devices(bench: Bench) -> None:
    from emma_adapter.unified import branches

    # Two devices, where there is one: one whose parameters say so.
    bench.monkeypatch.setattr(branches, "_device_of", lambda parameter: str(tuple(parameter.shape)))
    unify()


@raises(UnsupportedModelError, "unified/layers.py:text_model_of", "is an encoder-decoder")
def unifying_an_encoder_decoder(bench: Bench) -> None:
    model = tiny.llava()
    model.config.is_encoder_decoder = True
    unify(model=model)


@raises(UnsupportedModelError, "unified/layers.py:text_model_of", "has no decoder")
def unifying_a_model_without_layers(bench: Bench) -> None:
    model = tiny.llava()
    del model.model.language_model.norm
    unify(model=model)


@raises(UnsupportedModelError, "unified/layers.py:text_model_of", "linear attention keeps none")
def unifying_a_model_with_linear_attention(bench: Bench) -> None:
    model = tiny.llava()
    model.model.language_model.config.layer_types = ["linear_attention", "full_attention"]
    unify(model=model)


@raises(UnsupportedModelError, "unified/layers.py:text_model_of", "an embedding of each token id")
def unifying_a_model_with_embeddings_in_every_layer(bench: Bench) -> None:
    unify(model=ZOO["gemma4"].model())


@raises(ConfigError, "unified/prompts.py:check_processor", "need the model's processor")
def unifying_without_a_processor(bench: Bench) -> None:
    unify(processor=None)


@raises(ConfigError, "unified/prompts.py:check_processor", "has no chat template")
def unifying_with_a_processor_without_a_template(bench: Bench) -> None:
    processor = tiny.processor()
    processor.chat_template = None
    unify(processor=processor)


@raises(PatchError, "unified/state.py:unified_state", "was not made to draw")
def drawing_with_a_plain_model(bench: Bench) -> None:
    EmmaUnified(tiny.llava())


# ----------------------------------------------------------------------------------------- the autoencoder


class Broken(nn.Module):
    """Follows the protocol but in what it is told not to."""

    def __init__(self, latents: Any = None, pictures: Any = None) -> None:
        super().__init__()
        self.config = SimpleNamespace(latent_channels=4, scaling_factor=1.0)
        self.spatial_compression_ratio = 32
        self.latents, self.pictures = latents, pictures

    def encode(self, x: torch.Tensor) -> Any:
        own = torch.zeros(len(x), 4, x.shape[2] // 32, x.shape[3] // 32)
        return SimpleNamespace(latent=own if self.latents is None else self.latents)

    def decode(self, z: torch.Tensor) -> Any:
        return SimpleNamespace(sample=self.pictures)


@raises(ConfigError, "unified/autoencoder.py:LatentCoder.completed", "the autoencoder has")
def another_compression_than_the_config_says(bench: Bench) -> None:
    unify(UnifiedConfig(decoupling=2, compression=16))


@raises(AutoencoderError, "unified/autoencoder.py:LatentCoder.encode", ".latent should be a tensor")
def an_autoencoder_that_makes_something_else(bench: Bench) -> None:
    unify(autoencoder=Broken(latents="latents")).loss("a", torch.rand(1, 3, 64, 64))


@raises(AutoencoderError, "unified/autoencoder.py:LatentCoder.decode", ".sample should be a tensor")
def an_autoencoder_that_makes_small_pictures(bench: Bench) -> None:
    unify(autoencoder=Broken(pictures=torch.zeros(1, 3, 8, 8))).decode_latents(torch.zeros(1, 4, 2, 2))


@raises(AutoencoderError, "unified/autoencoder.py:LatentCoder._check_finite", "NaN or infinite")
def an_autoencoder_that_makes_nan(bench: Bench) -> None:
    unify(autoencoder=Broken(pictures=torch.full((1, 3, 64, 64), torch.nan))).decode_latents(torch.zeros(1, 4, 2, 2))


@raises(AutoencoderError, "unified/autoencoder.py:LatentCoder.measure", "the same value everywhere")
def statistics_of_a_channel_that_never_changes(bench: Bench) -> None:
    unify(autoencoder=Broken()).measure_latents(torch.rand(2, 3, 64, 64))


@raises(AutoencoderError, "unified/autoencoder.py:_load", "needs diffusers")
def an_autoencoder_by_name_without_diffusers(bench: Bench) -> None:
    bench.monkeypatch.setitem(sys.modules, "diffusers", None)
    unify(autoencoder="nowhere")


@raises(AutoencoderError, "unified/autoencoder.py:_load", "can't be loaded")
def an_autoencoder_that_is_not_there(bench: Bench) -> None:
    unify(autoencoder=bench.folder)


@raises(AutoencoderError, "unified/autoencoder.py:_check_protocol", "can't be the autoencoder")
def a_module_that_is_no_autoencoder(bench: Bench) -> None:
    unify(autoencoder=nn.Linear(2, 2))


# ----------------------------------------------------------------------------------------- drawing


@raises(DataError, "unified/prompts.py:check_prompts", "a text or a non-empty list")
def drawing_no_prompts(bench: Bench) -> None:
    draw(prompt=[])


@raises(DataError, "unified/prompts.py:check_prompts", "that says what to draw")
def drawing_an_empty_prompt(bench: Bench) -> None:
    draw(prompt=" ")


@raises(DataError, "unified/prompts.py:check_placeholders", "which stands for a picture")
def a_prompt_with_a_placeholder(bench: Bench) -> None:
    draw("qwen3_vl", prompt="what is <|image_pad|>?")


@raises(DataError, "unified/prompts.py:encode_prompts", "can't make inputs of the prompts")
def a_picture_that_the_processor_refuses(bench: Bench) -> None:
    draw("qwen3_vl", image=PICTURE.resize((2000, 2)))


@raises(DataError, "unified/prompts.py:check_length", "longer than the model's context")
def a_picture_beyond_the_context(bench: Bench) -> None:
    adapter = unify()
    adapter.model.config.text_config.max_position_embeddings = 12
    adapter.generate_images("a dog", height=256, width=256)


@raises(UnsupportedModelError, "unified/prompts.py:check_length", "sliding-window layers")
def a_picture_beyond_the_window(bench: Bench) -> None:
    model = ZOO["gemma3"].model()
    model.config.text_config.sliding_window = 30
    unified("gemma3", SMALL, model=model).generate_images("a dog", height=256, width=256)


@raises(UnsupportedModelError, "unified/prompts.py:read_prompts", "keeps less than")
def a_prompt_beyond_the_window(bench: Bench) -> None:
    model = ZOO["gemma3"].model()
    model.config.text_config.sliding_window = 8
    unified("gemma3", SMALL, model=model).generate_images("a dog that is on the left", height=64, width=64)


@raises(DataError, "unified/sampling.py:check_request", "negative_prompt must be")
def several_negative_prompts_for_one(bench: Bench) -> None:
    draw(negative_prompt=["a", "b"])


@raises(ConfigError, "unified/sampling.py:check_request", "{name} must be a number")
def a_negative_scale(bench: Bench) -> None:
    draw(guidance_scale=-1.0)


@raises(ConfigError, "unified/sampling.py:check_request", "num_images_per_prompt")
def no_pictures(bench: Bench) -> None:
    draw(num_images_per_prompt=0)


@raises(ConfigError, "unified/sampling.py:check_request", "solver must be")
def an_unknown_solver(bench: Bench) -> None:
    draw(solver="ddim")


@raises(ConfigError, "unified/flow.py:sampling_times", "num_inference_steps")
def no_steps(bench: Bench) -> None:
    draw(num_inference_steps=0)


@raises(ConfigError, "unified/flow.py:sampling_times", "sigmas must fall")
def sigmas_that_rise(bench: Bench) -> None:
    draw(sigmas=[0.1, 0.9])


@raises(ShapeError, "unified/sampling.py:_noise", "latents must be")
def latents_of_another_shape(bench: Bench) -> None:
    draw(latents=torch.zeros(1, 8, 3, 3))


@raises(ConfigError, "unified/sampling.py:_noise", "generators for")
def more_generators_than_pictures(bench: Bench) -> None:
    draw(generator=[torch.Generator(), torch.Generator()])


@raises(ConfigError, "unified/pictures.py:check_output_type", "output_type must be")
def an_unknown_kind_of_output(bench: Bench) -> None:
    draw(output_type="jpg")


@raises(ShapeError, "unified/pictures.py:check_size", "must be multiples")
def a_size_that_is_no_multiple(bench: Bench) -> None:
    draw(height=70)


@raises(DataError, "unified/pictures.py:reference_lists", "entries of reference pictures")
def fewer_reference_pictures_than_prompts(bench: Bench) -> None:
    draw(prompt=["a", "b"], image=[PICTURE])


@raises(DataError, "unified/pictures.py:rgb", "a picture must be a PIL image")
def a_path_for_a_picture(bench: Bench) -> None:
    draw(image="picture.png")


@raises(DataError, "unified/pictures.py:rgb", "download or copy it again of the file")
def a_picture_that_is_cut_off(bench: Bench) -> None:
    file = io.BytesIO()
    PICTURE.save(file, "PNG")
    (bench.folder / "cut.png").write_bytes(file.getvalue()[:150])
    draw(image=Image.open(bench.folder / "cut.png"))


@raises(UnsupportedModelError, "unified/fusion.py:token_grids", "don't form grids")
def an_edit_by_a_tower_with_a_class_token(bench: Bench) -> None:
    model = tiny.llava(vision_feature_select_strategy="full", image_seq_length=tiny.TOKENS_PER_IMAGE + 1)
    processor = tiny.processor()
    processor.vision_feature_select_strategy = "full"
    unify(model=model, processor=processor).generate_images("a dog", tiny.picture(1), height=64, width=64)


@raises(UnsupportedModelError, "unified/pixels.py:entry_pictures", "turned back into pictures")
def pixels_of_an_unknown_kind(bench: Bench) -> None:
    layout = MediaLayout(tokens=[4], entries=[1])
    entry_pictures(tiny.processor(), {"pixel_values": torch.zeros(1, 3, 28)}, layout)


# ----------------------------------------------------------------------------------------- training


@raises(DataError, "unified/losses.py:prompted_loss", "targets for")
def more_targets_than_prompts(bench: Bench) -> None:
    lose("a", torch.rand(2, 3, 64, 64))


@raises(ShapeError, "unified/losses.py:latent_loss", "targets for")
def fewer_read_prompts_than_latents(bench: Bench) -> None:
    adapter = unify()
    prefix = read_rows(adapter.model, adapter._state, [("a", ())])
    latent_loss(adapter.model, adapter._state, prefix, [torch.zeros(8, 2, 2)] * 2, None, None)


@raises(ShapeError, "unified/pictures.py:_target", "a target must be")
def targets_of_bytes(bench: Bench) -> None:
    lose(targets=torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


@raises(DataError, "unified/pictures.py:_target", "outside of [0, 1]")
def targets_from_zero_to_255(bench: Bench) -> None:
    lose(targets=torch.full((1, 3, 64, 64), 255.0))


@raises(ConfigError, "modules/trainability.py:check_rate", "must be a number")
def a_rate_that_is_negative(bench: Bench) -> None:
    unify().parameter_groups(lr=-1.0)


@raises(DataError, "unified/calls.py:_before_outer", "needs the prompts as input_ids")
def targets_without_prompts(bench: Bench) -> None:
    unify().model(inputs_embeds=torch.zeros(1, 2, 32), target_pixel_values=torch.rand(1, 3, 64, 64))


@raises(DataError, "unified/collation.py:UnifiedCollator.__call__", 'must have "prompt" and "target"')
def a_row_without_a_target(bench: Bench) -> None:
    unify().collator()([{"prompt": "a dog"}])


@raises(DataError, "unified/collation.py:UnifiedCollator._picture", "start at the collator's folder")
def a_row_whose_picture_is_not_there(bench: Bench) -> None:
    unify().collator(folder=bench.folder)([{"prompt": "a dog", "target": "nothing.png"}])


@raises(ShapeError, "unified/collation.py:UnifiedCollator._pixels", "have the sizes")
def targets_of_several_sizes(bench: Bench) -> None:
    rows = [{"prompt": "a", "target": PICTURE}, {"prompt": "b", "target": PICTURE.resize((32, 64))}]
    unify().collator()(rows)


# ----------------------------------------------------------------------------------------- files


def saved(bench: Bench) -> Path:
    unify().save_pretrained(bench.folder)
    return bench.folder


def load(folder: Path, model: Any = None) -> None:
    model = tiny.llava() if model is None else model
    load_unified(model, folder, processor=tiny.processor(), autoencoder=autoencoder())


def changed(folder: Path, *, values: dict[str, torch.Tensor] | None = None, **fields: Any) -> Path:
    with safe_open(folder / checkpoint.WEIGHTS_NAME, framework="pt") as file:
        description = json.loads(file.metadata()["emma_unified"])
    description |= fields
    tensors = load_file(folder / checkpoint.WEIGHTS_NAME) | (values or {})
    save_file(tensors, folder / checkpoint.WEIGHTS_NAME, {"emma_unified": json.dumps(description)})
    (folder / checkpoint.CONFIG_NAME).write_text(json.dumps(description))
    return folder


@raises(CheckpointError, "files/tensor_folder.py:check_finite", "diverged")
def saving_a_branch_that_diverged(bench: Bench) -> None:
    adapter = unify()
    adapter.model.emma_unified.default.velocity["bias"].data[0] = torch.nan
    adapter.save_pretrained(bench.folder)


@raises(CheckpointError, "files/tensor_folder.py:open_folder", "copy the whole folder")
def a_branch_without_weights(bench: Bench) -> None:
    (saved(bench) / checkpoint.WEIGHTS_NAME).unlink()
    load(bench.folder)


@raises(CheckpointError, "files/tensor_folder.py:open_folder", "its metadata lacks")
def weights_that_another_tool_wrote(bench: Bench) -> None:
    weights = saved(bench) / checkpoint.WEIGHTS_NAME
    save_file(load_file(weights), weights)
    load(bench.folder)


@raises(CheckpointError, "files/description.py:of_tensors", "was changed since it was saved")
def a_branch_whose_config_was_edited(bench: Bench) -> None:
    config = saved(bench) / checkpoint.CONFIG_NAME
    config.write_text(config.read_text().replace('"decoupling": 2', '"decoupling": 3'))
    load(bench.folder)


@raises(CheckpointError, "unified/checkpoint.py:_described", "{saved.config_path}: {error}")
def a_branch_with_an_unknown_field(bench: Bench) -> None:
    load(changed(saved(bench), config={"magic": 1}))


@raises(CheckpointError, "files/tensor_folder.py:SavedFolder.text", "should be a text")
def a_branch_without_a_digest(bench: Bench) -> None:
    load(changed(saved(bench), sha256=None))


@raises(CheckpointError, "files/tensor_folder.py:check_fits", "doesn't fit its config")
def a_branch_for_a_wider_model(bench: Bench) -> None:
    load(changed(saved(bench), values={"velocity.weight": torch.zeros(8, 64)}))


@raises(CheckpointError, "files/tensor_folder.py:read_into", "NaN or infinite")
def a_branch_with_nan(bench: Bench) -> None:
    load(changed(saved(bench), values={"velocity.bias": torch.full((8,), torch.nan)}))


@raises(CheckpointError, "files/tensor_folder.py:read_into", "SHA-256")
def a_branch_with_other_values(bench: Bench) -> None:
    load(changed(saved(bench), values={"velocity.bias": torch.ones(8)}))


@raises(CheckpointError, "files/tensor_folder.py:read_into", "became shorter")
def a_branch_that_is_cut_while_it_is_read(bench: Bench) -> None:
    real = tensor_folder.check_fits

    def cut(described: Any, expected: Any) -> None:
        real(described, expected)
        os.truncate(bench.folder / checkpoint.WEIGHTS_NAME, 6000)

    saved(bench)
    bench.monkeypatch.setattr(tensor_folder, "check_fits", cut)
    bench.monkeypatch.setattr(tensor_folder, "_offsets", lambda file, path: dict.fromkeys(load_names(path), 8000))
    names = load_file(bench.folder / checkpoint.WEIGHTS_NAME)

    def load_names(path: Path) -> list[str]:
        return list(names)

    load(bench.folder)


@raises(CheckpointError, "files/tensor_folder.py:_offsets", "overlap or leave gaps")
def a_branch_whose_tensors_overlap(bench: Bench) -> None:
    weights = saved(bench) / checkpoint.WEIGHTS_NAME
    content = weights.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    # Two of one size.
    first, second = (name for name in header if name.endswith("layernorm/weight") and name.startswith("layers.0"))
    header[first]["data_offsets"] = header[second]["data_offsets"]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (length - len(text))
    weights.write_bytes(content[:8] + text + content[8 + length :])
    load(bench.folder)


@raises(CheckpointError, "files/description.py:read", "wrote")
def a_folder_without_a_branch(bench: Bench) -> None:
    load(bench.folder)


@raises(CheckpointError, "files/description.py:read", "can't be read")
def a_branch_whose_config_is_no_text(bench: Bench) -> None:
    (saved(bench) / checkpoint.CONFIG_NAME).write_bytes(b"\xff")
    load(bench.folder)


@raises(CheckpointError, "files/description.py:read", "has more than")
def a_branch_whose_config_never_ends(bench: Bench) -> None:
    (saved(bench) / checkpoint.CONFIG_NAME).write_text(" " * 2**21)
    load(bench.folder)


@raises(CheckpointError, "files/description.py:parse", "is not valid JSON")
def a_branch_whose_config_is_no_json(bench: Bench) -> None:
    (saved(bench) / checkpoint.CONFIG_NAME).write_text("{")
    load(bench.folder)


@raises(CheckpointError, "files/description.py:parse", "doesn't describe")
def a_config_of_something_else(bench: Bench) -> None:
    (saved(bench) / checkpoint.CONFIG_NAME).write_text("{}")
    load(bench.folder)


@raises(CheckpointError, "files/description.py:check_version", "should be an integer")
def a_branch_without_a_version(bench: Bench) -> None:
    load(changed(saved(bench), format_version="1"))


@raises(CheckpointError, "files/description.py:check_version", "upgrade emma_adapter")
def a_branch_of_a_newer_release(bench: Bench) -> None:
    load(changed(saved(bench), format_version=99))


@raises(CheckpointError, "files/tensor_folder.py:check_model_type", "was made for a model of type")
def a_branch_of_another_family(bench: Bench) -> None:
    load(saved(bench), ZOO["qwen3_vl"].model())


@raises(AutoencoderError, "unified/loading.py:_autoencoder_of", "was a module")
def a_branch_whose_autoencoder_has_no_name(bench: Bench) -> None:
    load_unified(tiny.llava(), saved(bench), processor=tiny.processor())


@raises(AutoencoderError, "unified/loading.py:_autoencoder_of", "names the path")
def a_branch_from_the_hub_that_names_a_path(bench: Bench) -> None:
    folder = changed(saved(bench), autoencoder={"source": "/somewhere/else", "config_sha256": "0"})
    bench.monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **settings: str(folder))
    load_unified(tiny.llava(), "someone/drawing", processor=tiny.processor())


@raises(ConfigError, "unified/generation_mode.py:guard_generate", "generation_mode must be")
def a_mode_that_is_none(bench: Bench) -> None:
    unified("llava", SMALL).model.generate(torch.ones(1, 3, dtype=torch.long), generation_mode="audio")


@raises(DataError, "unified/generation_mode.py:_draw", "give it what the processor makes")
def an_option_that_is_none(bench: Bench) -> None:
    unified("llava", SMALL).model.generate(torch.ones(1, 3, dtype=torch.long), generation_mode="image", heigth=64)


@raises(DataError, "unified/generation_mode.py:_Pictures.of_rows", "can't be recovered from the pixels")
def guidance_of_tiles(bench: Bench) -> None:
    entry = ZOO["llava_next"]
    inputs = entry.batch([Row("a dog", ((56, 84),))])
    unified("llava_next", SMALL).model.generate(**inputs, generation_mode="image", height=64, width=64)


# --------------------------------------------------------------------------------------- the report

_REPORT = "report/compute_drawings.py"


def report(rows: Any = ({"prompt": "a dog"},), **settings: Any) -> None:
    make_drawing_report(unify(), rows, **settings)


@raises(ConfigError, f"{_REPORT}:make_drawing_report", "must be an integer >=")
def half_a_preview(bench: Bench) -> None:
    report(previews=0.5)


@raises(ConfigError, f"{_REPORT}:make_drawing_report", "amplification")
def differences_that_are_made_smaller(bench: Bench) -> None:
    report(amplification=0)


@raises(DataError, f"{_REPORT}:make_drawing_report", "there are no rows")
def a_report_of_no_row(bench: Bench) -> None:
    report([])


@raises(DataError, f"{_REPORT}:_read", "a row is")
def a_report_of_texts(bench: Bench) -> None:
    report(["a dog"])


@raises(DataError, f"{_REPORT}:_read", "can't be drawn")
def a_report_of_a_row_without_a_prompt(bench: Bench) -> None:
    report([{"target": PICTURE}])
