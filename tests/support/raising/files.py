"""Errors about adapter folders, the authors' checkpoint and the hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from emma_adapter import CheckpointError, EmmaAlignment, EmmaConfig, EncoderError, PatchError, load_adapter, patch_model
from tests.support import tiny
from tests.support.zoo import ZOO

from .triggers import Bench, raises

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def load(folder: Any, model: Any = None, **settings: Any) -> None:
    load_adapter(tiny.llava() if model is None else model, folder, **{"processor": tiny.processor(), **settings})


Change = Callable[[dict[str, Any]], Any]


def edit(folder: Path, change: Change, *, tensors: Change | None = None) -> Path:
    """Change what the folder's two files say of the adapter, and its tensors, as one who knows the format."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        description = json.loads(file.metadata()["emma_adapter"])
    values = load_file(folder / WEIGHTS)
    change(description)
    if tensors is not None:
        tensors(values)
    save_file(values, folder / WEIGHTS, metadata={"format": "pt", "emma_adapter": json.dumps(description)})
    (folder / CONFIG).write_text(json.dumps(description))
    return folder


# ----------------------------------------------------------------------------------------- adapter folders


@raises(CheckpointError, "checkpoints/reading.py:find", "give the folder of one of them")
def a_folder_with_several_adapters(bench: Bench) -> None:
    adapter = bench.adapter()
    for name in ("first", "second"):
        adapter.save_pretrained(bench.folder / "emma_adapter" / name)
    load(bench.folder)


@raises(CheckpointError, "files/description.py:of_tensors", "was changed since it was saved")
def an_edited_config(bench: Bench) -> None:
    path = bench.saved() / CONFIG
    path.write_text(path.read_text().replace('"fusion": "modulation"', '"fusion": "attention"'))
    load(path.parent)


@raises(CheckpointError, "checkpoints/reading.py:read", "{error}")
def a_config_with_an_impossible_value(bench: Bench) -> None:
    load(edit(bench.saved(), lambda description: description["config"].update(num_heads=-1)))


@raises(CheckpointError, "files/tensor_folder.py:SavedFolder.text", "should be a text")
def a_folder_without_a_model_type(bench: Bench) -> None:
    load(edit(bench.saved(), lambda description: description.pop("model_type")))


@raises(CheckpointError, "checkpoints/reading.py:_split", "unexpected tensor(s)")
def a_tensor_that_belongs_to_nothing(bench: Bench) -> None:
    load(edit(bench.saved(), lambda _: None, tensors=lambda values: values.update(stray=torch.ones(1))))


@raises(CheckpointError, "checkpoints/reading.py:_split", "projector_trained")
def a_projector_that_is_not_there(bench: Bench) -> None:
    load(edit(bench.saved(), lambda description: description.update(projector_trained=True)))


@raises(CheckpointError, "checkpoints/reading.py:check_tensors", "doesn't fit its config")
def a_tensor_that_is_missing(bench: Bench) -> None:
    load(edit(bench.saved(), lambda _: None, tensors=lambda values: values.pop(min(values))))


@raises(CheckpointError, "files/description.py:read", "there is no")
def an_empty_folder(bench: Bench) -> None:
    load(bench.folder)


@raises(CheckpointError, "files/description.py:read", "can't be read")
def a_config_that_is_no_text(bench: Bench) -> None:
    (bench.folder / CONFIG).write_bytes(b"\xff\xfe\xff")
    load(bench.folder)


@raises(CheckpointError, "files/description.py:parse", "is not valid JSON")
def an_adapter_config_that_is_cut_off(bench: Bench) -> None:
    (bench.folder / CONFIG).write_text('{"format": "emma')
    load(bench.folder)


@raises(CheckpointError, "files/description.py:parse", "an adapter of PEFT")
def an_adapter_of_peft(bench: Bench) -> None:
    (bench.folder / CONFIG).write_text('{"peft_type": "LORA"}')
    load(bench.folder)


@raises(CheckpointError, "files/description.py:parse", "doesn't describe")
def the_config_of_something_else(bench: Bench) -> None:
    (bench.folder / CONFIG).write_text("[]")
    load(bench.folder)


@raises(CheckpointError, "files/description.py:check_version", "should be an integer")
def a_version_that_is_no_number(bench: Bench) -> None:
    load(edit(bench.saved(), lambda description: description.update(format_version="1")))


@raises(CheckpointError, "files/description.py:check_version", "upgrade emma_adapter")
def a_folder_from_the_future(bench: Bench) -> None:
    load(edit(bench.saved(), lambda description: description.update(format_version=99)))


@raises(CheckpointError, "files/tensor_folder.py:open_folder", "the weights are missing")
def a_folder_without_weights(bench: Bench) -> None:
    folder = bench.saved()
    (folder / WEIGHTS).unlink()
    load(folder)


@raises(CheckpointError, "files/tensor_file.py:read_header", "{path} {error}")
def weights_that_are_cut_off(bench: Bench) -> None:
    path = bench.saved() / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    load(path.parent)


@raises(CheckpointError, "files/tensor_file.py:read_tensors", "{path} {error}")
def weights_that_lie_over_each_other(bench: Bench) -> None:
    path = bench.saved() / WEIGHTS
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    sizes: dict[int, str] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            twin = sizes.setdefault(stop - start, name)
            if start != 0 and twin != name:
                entry["data_offsets"] = header[twin]["data_offsets"]
                break
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])
    load(path.parent)


@raises(CheckpointError, "files/description.py:read", "no adapter's config")
def a_config_without_an_end(bench: Bench) -> None:
    (bench.folder / CONFIG).write_text(" " * 2**21)
    load(bench.folder)


@raises(CheckpointError, "files/untrusted.py:open_regular", "nothing outside of an adapter's folder is read")
def a_config_that_leads_elsewhere(bench: Bench) -> None:
    folder = bench.saved()
    (folder / CONFIG).rename(bench.folder / "elsewhere.json")
    (folder / CONFIG).symlink_to(bench.folder / "elsewhere.json")
    load(folder)


@raises(CheckpointError, "files/untrusted.py:open_regular", "can't be read")
def a_config_that_leads_to_itself(bench: Bench) -> None:
    (bench.folder / CONFIG).symlink_to(CONFIG)
    load(bench.folder)


@raises(CheckpointError, "files/untrusted.py:_require_regular", "it should be a file")
def a_config_that_is_a_folder(bench: Bench) -> None:
    (bench.folder / CONFIG).mkdir()
    load(bench.folder)


@raises(CheckpointError, "files/tensor_folder.py:check_finite", "diverged")
def saving_what_diverged(bench: Bench) -> None:
    adapter = bench.adapter()
    next(adapter.parameters()).data.fill_(float("nan"))
    adapter.save_pretrained(bench.folder)


@raises(CheckpointError, "adapter/compatibility.py:check_fit", "its own number of visual tokens")
def an_adapter_for_images_of_any_size(bench: Bench) -> None:
    def drop_positions(values: dict[str, Any]) -> None:
        for name in [name for name in values if name.endswith("position")]:
            del values[name]

    def change(description: dict[str, Any]) -> None:
        description["config"].update(num_visual_tokens=None, visual_grid=None)

    load(edit(bench.saved(), change, tensors=drop_positions))


@raises(EncoderError, "adapter/compatibility.py:check_encoder", "comes from the hub")
def an_adapter_from_the_hub_that_names_a_path(bench: Bench) -> None:
    tower = tiny.clip_text_folder(bench.folder / "clip")
    folder = bench.saved(instruction_encoder=str(tower))
    bench.monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **settings: str(folder))
    load("user/adapter")


@raises(CheckpointError, "files/tensor_folder.py:open_folder", "its metadata lacks")
def weights_of_another_tool(bench: Bench) -> None:
    folder = bench.saved()
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)
    load(folder)


@raises(CheckpointError, "checkpoints/reading.py:_expected_alignment", "describes no adapter that can be built")
def a_config_without_sizes(bench: Bench) -> None:
    load(edit(bench.saved(), lambda description: description["config"].update(visual_dim=None)))


# -------------------------------------------------------------------------------------------- another model


@raises(CheckpointError, "adapter/compatibility.py:check_fit", "model_type")
def an_adapter_of_another_family(bench: Bench) -> None:
    load(bench.saved(), ZOO["qwen2_vl"].model())


@raises(CheckpointError, "adapter/compatibility.py:check_fit", "are quantized")
def a_trained_projector_for_one_of_integers(bench: Bench) -> None:
    bench.adapter().train_only(projector=True).save_pretrained(bench.folder)
    model = tiny.llava()
    linear = model.model.multi_modal_projector.linear_1
    linear.weight = torch.nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    load(bench.folder, model)


@raises(CheckpointError, "adapter/compatibility.py:check_fit", "it was trained on another")
def an_adapter_of_another_vision_tower(bench: Bench) -> None:
    vision = tiny.vision_config()
    vision.hidden_size = 48
    load(bench.saved(), tiny.llava(vision_config=vision))


@raises(CheckpointError, "adapter/compatibility.py:check_fit", "visual tokens an image")
def an_adapter_for_smaller_images(bench: Bench) -> None:
    vision = tiny.vision_config()
    vision.image_size = 2 * tiny.IMAGE_SIZE
    load(bench.saved(), tiny.llava(vision_config=vision))


@raises(CheckpointError, "adapter/compatibility.py:check_fit", "deepstack projectors")
def an_adapter_for_fewer_deepstack_projectors(bench: Bench) -> None:
    model = ZOO["qwen3_vl"].model()
    patch_model(model, EmmaConfig(align_deepstack=True)).save_pretrained(bench.folder)
    other = ZOO["qwen3_vl"].model()
    del other.model.visual.deepstack_merger_list[0]
    load(bench.folder, other)


@raises(CheckpointError, "adapter/compatibility.py:_check_range", "beyond the range of")
def weights_beyond_the_range_of_the_model(bench: Bench) -> None:
    adapter = bench.adapter()
    with torch.no_grad():
        next(adapter.parameters()).fill_(1e5)
    adapter.save_pretrained(bench.folder)
    load(bench.folder, tiny.llava().half())


@raises(CheckpointError, "adapter/restoring.py:read_for", "is damaged")
def weights_with_another_value(bench: Bench) -> None:
    folder = bench.saved()
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    values = load_file(folder / WEIGHTS)
    values[min(values)].view(-1)[0] += 1
    save_file(values, folder / WEIGHTS, metadata=metadata)
    load(folder)


@raises(CheckpointError, "adapter/compatibility.py:check_encoder", "made for a language model")
def an_adapter_of_another_language_model(bench: Bench) -> None:
    text = tiny.llama_config(380)
    text.hidden_size = 48
    text.head_dim = 12
    load(bench.saved(), tiny.llava(text_config=text))


@raises(PatchError, "adapter/restoring.py:restore", "another kind of adapter")
def an_adapter_of_another_kind(bench: Bench) -> None:
    load(bench.saved(), bench.adapter(EmmaConfig(fusion="attention")).model)


@raises(PatchError, "adapter/compatibility.py:check_not_offloaded", "are offloaded")
def loading_into_an_offloaded_adapter(bench: Bench) -> None:
    folder, model = bench.saved(), bench.adapter().model
    cpu_offload(model, execution_device=torch.device("cpu"))
    load(folder, model)


@raises(PatchError, "adapter/loading.py:load_adapter", "the first adapter of a model")
def another_name_for_the_first_adapter(bench: Bench) -> None:
    load(bench.saved(), name="other")


# ------------------------------------------------------------------------------------------------- the hub


@raises(CheckpointError, "files/hub.py:local_folder", "neither a folder here nor an adapter")
def a_repository_that_was_never_downloaded(bench: Bench) -> None:
    load("someone/an-adapter", local_files_only=True)


@raises(CheckpointError, "files/hub.py:_checked_subfolder", "leads out of the folder or repository")
def a_subfolder_that_leads_out(bench: Bench) -> None:
    load(bench.saved(), subfolder="../elsewhere")


@raises(CheckpointError, "files/hub.py:_folder_within", "is a link out of")
def a_subfolder_that_is_a_link_out(bench: Bench) -> None:
    (bench.folder / "run").mkdir()
    (bench.folder / "run" / "linked").symlink_to(bench.saved())
    load(bench.folder / "run", subfolder="linked")


# ------------------------------------------------------------------------------------ the authors' checkpoint

OFFICIAL = {
    "text_projection.weight": torch.ones(8, 6),
    "text_projection.bias": torch.ones(8),
    "image_text_infusion.weight": torch.ones(4, 9),
    "image_text_infusion.bias": torch.ones(4),
}


def official(bench: Bench, content: Any = None, **changes: Any) -> None:
    path = bench.folder / "vision_tower.bin"
    tensors = {**OFFICIAL, **{name.replace("__", "."): value for name, value in changes.items()}}
    torch.save(tensors if content is None else content, path)
    EmmaAlignment.from_official(path)


@raises(CheckpointError, "alignment/official_weights.py:read_official", "learnable tokens")
def a_later_variant(bench: Bench) -> None:
    official(bench, learnable_tokens=torch.ones(2))


@raises(CheckpointError, "alignment/official_weights.py:read_official", "none empty")
def matrices_that_do_not_fit(bench: Bench) -> None:
    official(bench, image_text_infusion__weight=torch.ones(4, 4))


@raises(CheckpointError, "alignment/official_weights.py:read_official", "should be [{size}]")
def a_bias_that_does_not_fit(bench: Bench) -> None:
    official(bench, text_projection__bias=torch.ones(9))


@raises(CheckpointError, "alignment/official_weights.py:_load", "there is no file")
def an_official_file_that_does_not_exist(bench: Bench) -> None:
    EmmaAlignment.from_official(bench.folder / "vision_tower.bin")


@raises(CheckpointError, "alignment/official_weights.py:_load", "never unpickled")
def a_file_that_holds_objects(bench: Bench) -> None:
    official(bench, content={"model": EmmaConfig()})


@raises(CheckpointError, "alignment/official_weights.py:_load", "can't be read as a PyTorch checkpoint")
def an_official_file_that_is_cut_off(bench: Bench) -> None:
    path = bench.folder / "vision_tower.bin"
    torch.save(OFFICIAL, path)
    path.write_bytes(path.read_bytes()[:200])
    EmmaAlignment.from_official(path)


@raises(CheckpointError, "alignment/official_weights.py:_load", "instead of a state dict")
def a_file_with_one_tensor(bench: Bench) -> None:
    official(bench, content=torch.ones(2))


@raises(CheckpointError, "alignment/official_weights.py:_one_of", "floating-point weights")
def an_official_file_of_integers(bench: Bench) -> None:
    official(bench, text_projection__bias=torch.ones(8, dtype=torch.long))


@raises(CheckpointError, "alignment/official_weights.py:read_official", "; download or copy it again")
def an_official_file_that_diverged(bench: Bench) -> None:
    official(bench, text_projection__bias=torch.full((8,), float("nan")))


@raises(CheckpointError, "alignment/official_weights.py:_one_of", "more than is in the file")
def an_official_file_that_would_be_huge(bench: Bench) -> None:
    official(bench, image_text_infusion__bias=torch.ones(1).expand(10**9))


@raises(CheckpointError, "alignment/official_weights.py:_one_of", "not an EMMA checkpoint")
def a_checkpoint_of_something_else(bench: Bench) -> None:
    official(bench, content={"weight": torch.ones(2)})
