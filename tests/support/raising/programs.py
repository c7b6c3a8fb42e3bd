"""Errors of the command line and of ``--model emma`` in lmms-eval."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import torch
from PIL import Image

from emma_adapter import AnalysisError, CheckpointError, ConfigError, DataError, ShapeError, UnsupportedModelError
from emma_adapter.cli import main
from emma_adapter.data.rows import open_rows
from emma_adapter.report import Question, make_report
from tests.support import tiny
from tests.support.workspace import MODEL_ID, make_workspace
from tests.support.zoo import ZOO
from tests.unified.small import autoencoder

from .files import OFFICIAL
from .triggers import Bench, raises


def command(*arguments: object) -> None:
    """``emma-adapter``, without the part that turns errors into a line and an exit code."""
    click.Group.main(main, [str(argument) for argument in arguments], standalone_mode=False)


# --------------------------------------------------------------------------------------------------- info


@raises(CheckpointError, "cli/info.py:_adapter_folder", "is a file")
def info_about_a_file(bench: Bench) -> None:
    command("info", bench.saved() / "adapter_config.json")


@raises(CheckpointError, "cli/info.py:_adapter_folder", "neither an adapter")
def info_about_an_empty_folder(bench: Bench) -> None:
    command("info", bench.folder)


@raises(UnsupportedModelError, "models/loading.py:_check_class", "which transformers doesn't have")
def info_about_a_model_of_a_class_of_its_own(bench: Bench) -> None:
    config = tiny.llava().config
    config.architectures = ["ForeignLlava"]
    config.save_pretrained(bench.folder)
    command("info", bench.folder)


@raises(UnsupportedModelError, "models/loading.py:load_processor", "has no processor for images and text")
def a_model_without_a_processor(bench: Bench) -> None:
    """For which transformers gives its tokenizer."""
    from transformers import AutoProcessor

    bench.monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *args, **settings: tiny.tokenizer())
    finetune(bench, talk(USER, ANSWER))


@raises(UnsupportedModelError, "models/loading.py:_explained", "can't be loaded as a vision-language model")
def info_about_a_language_model(bench: Bench) -> None:
    tiny.llava().config.text_config.save_pretrained(bench.folder)
    command("info", bench.folder)


# ------------------------------------------------------------------------------------------------ convert


def convert(bench: Bench, entry: str, tensors: dict[str, torch.Tensor]) -> None:
    made = ZOO[entry]
    made.model().config.save_pretrained(bench.folder / "model")
    made.processor().save_pretrained(bench.folder / "model")
    clip = tiny.clip_text_folder(bench.folder / "clip")
    source = bench.folder / "vision_tower.bin"
    torch.save(tensors, source)
    command("convert", source, bench.folder / "out", "--model", bench.folder / "model", "--text-tower", clip)


@raises(UnsupportedModelError, "cli/convert.py:convert", "the authors' weights are for LLaVA-1.5")
def converting_for_another_family(bench: Bench) -> None:
    convert(bench, "qwen2_vl", OFFICIAL)


@raises(CheckpointError, "cli/convert.py:convert", "was trained for")
def converting_for_another_vision_tower(bench: Bench) -> None:
    convert(bench, "llava", OFFICIAL)


# ----------------------------------------------------------------------------------------------- finetune


def finetune(bench: Bench, data: str | bytes | dict[str, Any], name: str = "data.jsonl", *more: object) -> None:
    """With a data file of this content, or the one row."""
    folder = bench.folder if (bench.folder / "train.jsonl").is_file() else make_workspace(bench.folder)
    text = json.dumps(data) if isinstance(data, dict) else data
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    bench.monkeypatch.chdir(folder)
    fast = ["--use_cpu", "true", "--max_steps", 1, "--save_strategy", "no", "--gradient_checkpointing", "false"]
    command("finetune", "--model", MODEL_ID, "--data", name, "--output", "out", *more, *fast)


IMAGE = "images/0.png"
USER = {"role": "user", "content": "is there a cat?"}
ANSWER = {"role": "assistant", "content": "no"}


def talk(*messages: object, images: object = (IMAGE,)) -> dict[str, Any]:
    return {"images": list(images) if isinstance(images, tuple) else images, "messages": list(messages)}


@raises(DataError, "data/tables.py:FileTable.__init__", "is not UTF-8")
def data_in_another_encoding(bench: Bench) -> None:
    finetune(bench, '{"messages": "für"}'.encode("latin-1"))


@raises(DataError, "data/tables.py:FileTable.__init__", "must hold a list of rows")
def one_row_where_a_list_is_expected(bench: Bench) -> None:
    finetune(bench, talk(USER, ANSWER), "data.json")


@raises(DataError, "data/tables.py:FileTable.row", "should be a JSON object")
def a_row_that_is_a_list(bench: Bench) -> None:
    finetune(bench, "[1, 2]")


def image(bench: Bench, source: object) -> None:
    finetune(bench, talk(USER, ANSWER, images=[source]))


IN_IMAGES = "data/images.py"


@raises(DataError, f"{IN_IMAGES}:_file", "images must be file names")
def an_image_that_is_a_number(bench: Bench) -> None:
    image(bench, 1)


@raises(DataError, f"{IN_IMAGES}:_file", "is a folder")
def an_image_that_is_a_folder(bench: Bench) -> None:
    image(bench, "images")


@raises(DataError, f"{IN_IMAGES}:_file", "is on the web")
def an_image_that_would_be_downloaded(bench: Bench) -> None:
    image(bench, "https://example.com/a.png")


@raises(DataError, f"{IN_IMAGES}:_file", "there is no image")
def an_image_that_does_not_exist(bench: Bench) -> None:
    image(bench, "nowhere.png")


@raises(DataError, f"{IN_IMAGES}:_decoded", "is not valid base64")
def an_image_in_broken_base64(bench: Bench) -> None:
    image(bench, "data:image/png;base64,#")


@raises(DataError, f"{IN_IMAGES}:_explained", "can't be read as an image")
def an_image_that_is_a_text(bench: Bench) -> None:
    image(bench, "data.jsonl")


def floats(bench: Bench) -> Path:
    path = bench.folder / "floats.tiff"
    Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(path)
    return path


@raises(DataError, f"{IN_IMAGES}:_explained", "can't be used")
def an_image_of_floats(bench: Bench) -> None:
    image(bench, str(floats(bench)))


@raises(DataError, f"{IN_IMAGES}:to_rgb", "which is white can't be known")
def a_question_about_an_image_of_floats(bench: Bench) -> None:
    Question.about(Image.open(floats(bench)), "is there a cat?")


@raises(DataError, "data/tables.py:_parse", "is not valid JSON")
def a_row_that_is_cut_off(bench: Bench) -> None:
    finetune(bench, '{"images": [')


@raises(DataError, "data/rows.py:_check_columns", "has the columns")
def a_dataset_with_other_columns(bench: Bench) -> None:
    from datasets import Dataset

    Dataset.from_list([{"question": "is there a cat?"}]).save_to_disk(bench.folder / "questions")
    make_workspace(bench.folder)
    bench.monkeypatch.chdir(bench.folder)
    command("finetune", "--model", MODEL_ID, "--data", "questions", "--output", "out")


@raises(DataError, "data/tables.py:_load_dataset", "can't be loaded with split")
def a_split_that_does_not_exist(bench: Bench) -> None:
    from datasets import Dataset, DatasetDict

    DatasetDict(test=Dataset.from_list([{"messages": [], "images": []}])).save_to_disk(bench.folder / "split")
    make_workspace(bench.folder)
    bench.monkeypatch.chdir(bench.folder)
    command("finetune", "--model", MODEL_ID, "--data", "split", "--output", "out")


def finetune_unified(bench: Bench, *rows: dict[str, Any], batch_size: int = 2) -> None:
    """With these rows, beside the pictures ``images/0.png``, ..., and the config of an autoencoder."""
    make_workspace(bench.folder)
    autoencoder().save_config(bench.folder / "autoencoder")
    (bench.folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    bench.monkeypatch.chdir(bench.folder)
    own = ["--unified", "--autoencoder", "autoencoder", "--per_device_train_batch_size", batch_size]
    command("finetune", "--model", MODEL_ID, "--data", "data.jsonl", "--output", "out", *own, "--use_cpu", "true")


def target(bench: Bench, height: int, width: int) -> str:
    tiny.picture(0).resize((width, height)).save(bench.folder / f"{height}x{width}.png")
    return f"{height}x{width}.png"


@raises(DataError, "data/drawings.py:Drawings.check", "has no rows")
def nothing_to_draw(bench: Bench) -> None:
    finetune_unified(bench)


@raises(DataError, "data/drawings.py:Drawings._read", "lacks")
def a_conversation_to_draw(bench: Bench) -> None:
    finetune_unified(bench, talk(USER, ANSWER))


@raises(DataError, "data/drawings.py:Drawings._read", "the prompt is")
def a_drawing_without_a_prompt(bench: Bench) -> None:
    finetune_unified(bench, {"prompt": " ", "target": IMAGE})


@raises(DataError, "data/drawings.py:Drawings.check", "{error}")
def a_row_with_a_placeholder(bench: Bench) -> None:
    finetune_unified(bench, {"prompt": "an <image>", "target": IMAGE})


@raises(ShapeError, "data/drawings.py:Drawings._size", "or give --size to all")
def a_target_that_is_no_multiple(bench: Bench) -> None:
    finetune_unified(bench, {"prompt": "a bird", "target": target(bench, 64, 65)}, batch_size=1)


@raises(ShapeError, "data/drawings.py:Drawings.check", "a batch has one size")
def targets_of_two_sizes(bench: Bench) -> None:
    sizes = (64, 64), (64, 96)
    finetune_unified(bench, *({"prompt": "a bird", "target": target(bench, *size)} for size in sizes))


@raises(DataError, "data/conversations.py:_matched", "the turns show")
def two_placeholders_for_one_image(bench: Bench) -> None:
    finetune(bench, talk({"role": "user", "content": "<image><image> which?"}, ANSWER))


@raises(DataError, "data/conversations.py:_matched", "leave one of them out")
def images_in_the_parts_and_others_beside_them(bench: Bench) -> None:
    finetune(bench, talk({**USER, "content": [{"type": "image", "path": "images/1.png"}, "a cat?"]}, ANSWER))


@raises(DataError, "data/conversations.py:named_images", "name different images")
def two_columns_of_images(bench: Bench) -> None:
    finetune(bench, {**talk(USER, ANSWER), "image": "images/1.png"})


@raises(DataError, "data/conversations.py:_source", "names its image")
def a_part_with_two_images(bench: Bench) -> None:
    finetune(bench, talk({**USER, "content": [{"type": "image", "path": IMAGE, "url": IMAGE}]}, ANSWER, images=[]))


@raises(DataError, "data/conversations.py:read_conversation", "_unsupported")
def a_row_with_a_video(bench: Bench) -> None:
    finetune(bench, {**talk(USER, ANSWER), "videos": ["clip.mp4"]})


@raises(DataError, "data/conversations.py:_parts", "_unsupported")
def a_part_that_is_a_video(bench: Bench) -> None:
    finetune(bench, talk({**USER, "content": [{"type": "video", "path": "clip.mp4"}]}, ANSWER))


@raises(DataError, "data/conversations.py:_turns", "must be a list of pairs")
def a_history_of_texts(bench: Bench) -> None:
    finetune(bench, {"query": "is there a cat?", "response": "no", "history": ["hello"], "images": [IMAGE]})


@raises(DataError, "data/conversations.py:_check_questions", "the question is empty")
def a_question_without_a_word(bench: Bench) -> None:
    finetune(bench, talk({**USER, "content": "<image>"}, ANSWER))


@raises(DataError, "data/conversations.py:_turns", "there are no messages")
def a_row_without_messages(bench: Bench) -> None:
    finetune(bench, talk())


@raises(DataError, "data/conversations.py:_message", "is no message but")
def a_message_that_is_a_text(bench: Bench) -> None:
    finetune(bench, talk("is there a cat?", ANSWER))


@raises(DataError, "data/conversations.py:_message", "the role is")
def a_role_that_does_not_exist(bench: Bench) -> None:
    finetune(bench, talk({**USER, "role": "critic"}, ANSWER))


@raises(DataError, "data/conversations.py:_message", "the content is")
def a_content_that_is_a_number(bench: Bench) -> None:
    finetune(bench, talk({**USER, "content": 5}, ANSWER))


@raises(DataError, "data/conversations.py:_message", "only users show images")
def an_answer_with_an_image(bench: Bench) -> None:
    finetune(bench, talk(USER, {**ANSWER, "content": "<image>"}))


@raises(DataError, "data/conversations.py:_message", "the answer is empty")
def an_answer_without_a_word(bench: Bench) -> None:
    finetune(bench, talk(USER, {**ANSWER, "content": " "}))


@raises(DataError, "data/conversations.py:_parts", "a part of the content is")
def a_part_without_a_type(bench: Bench) -> None:
    finetune(bench, talk({**USER, "content": [{"text": "is there a cat?"}]}, ANSWER))


@raises(DataError, "data/conversations.py:check_characters", "half a character")
def half_a_character(bench: Bench) -> None:
    finetune(bench, talk({**USER, "content": "\ud83d"}, ANSWER))


@raises(DataError, "data/conversations.py:_check_order", "no turn of the assistant")
def a_question_without_an_answer(bench: Bench) -> None:
    finetune(bench, talk(USER))


@raises(DataError, "data/conversations.py:_check_order", "must follow a turn of the user")
def an_answer_without_a_question(bench: Bench) -> None:
    finetune(bench, talk(ANSWER, USER))


def report(bench: Bench, row: dict[str, Any]) -> None:
    """Of an untrained adapter, with this one row."""
    folder = make_workspace(bench.folder)
    bench.saved()
    (folder / "data.jsonl").write_text(json.dumps(row))
    bench.monkeypatch.chdir(folder)
    command("report", "--model", MODEL_ID, "--adapter", "saved", "--data", "data.jsonl", "--device", "cpu")


@raises(DataError, "data/conversations.py:_check_order", "so that nothing is asked")
def a_conversation_without_a_question(bench: Bench) -> None:
    report(bench, talk({"role": "system", "content": "be brief"}, images=[]))


@raises(DataError, "data/rows.py:Rows.label", "must be a text or a number")
def an_attribute_that_is_a_list(bench: Bench) -> None:
    report(bench, {"image": IMAGE, "question": "is there a cat?", "attribute": ["a", "b"]})


@raises(AnalysisError, "report/compute.py:make_report", "shows an image")
def a_report_on_questions_without_images(bench: Bench) -> None:
    report(bench, {"question": "is there a cat?"})


@raises(AnalysisError, "report/compute.py:make_report", "has no chat template")
def a_report_without_a_chat_template(bench: Bench) -> None:
    processor = tiny.processor()
    processor.chat_template = None
    make_report(bench.adapter(), processor, [Question.about(tiny.picture(0), "is there a cat?")])


def picky_processor() -> Any:
    processor = tiny.processor()
    processor.chat_template = "{{ raise_exception('roles must alternate') }}"
    return processor


@raises(DataError, "models/prompts.py:Prompts._templated", "refuses a conversation")
def a_question_that_the_template_refuses(bench: Bench) -> None:
    make_report(bench.adapter(), picky_processor(), [Question.about(tiny.picture(0), "is there a cat?")])


@raises(DataError, "data/examples.py:Examples._check_template", "{where}: {error}")
def a_row_that_the_template_refuses(bench: Bench) -> None:
    from transformers import AutoProcessor

    bench.monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *args, **settings: picky_processor())
    finetune(bench, talk(USER, ANSWER))


@raises(DataError, "data/tables.py:_load_dataset", "is no .jsonl file")
def a_dataset_without_the_package(bench: Bench) -> None:
    bench.monkeypatch.setitem(sys.modules, "datasets", None)
    open_rows("somewhere", "train", None)


@raises(DataError, "data/examples.py:Examples.add", "nothing to learn from")
def conversations_without_images(bench: Bench) -> None:
    finetune(bench, talk(USER, ANSWER, images=[]))


@raises(DataError, "data/examples.py:Examples.__call__", "doesn't end a conversation with its answer")
def a_processor_that_writes_something_after_the_answer(bench: Bench) -> None:
    from transformers import LlavaProcessor

    original = LlavaProcessor.__call__

    def with_an_end(self: Any, *args: Any, **settings: Any) -> Any:
        made = original(self, *args, **settings)
        made["input_ids"][:, -1] = 9
        return made

    bench.monkeypatch.setattr(LlavaProcessor, "__call__", with_an_end)
    finetune(bench, talk(USER, ANSWER))


# ---------------------------------------------------------------------------------------------- lmms-eval


def emma(**arguments: Any) -> Any:
    from emma_adapter.integrations.lmms_eval import Emma

    return Emma(**{"pretrained": "nowhere", "device": "cpu", **arguments})


def emma_of(bench: Bench, entry: str = "llava", **arguments: Any) -> Any:
    """With a model and a processor that exist."""
    made = ZOO[entry]
    made.model().save_pretrained(bench.folder / "model")
    made.processor().save_pretrained(bench.folder / "model")
    return emma(pretrained=str(bench.folder / "model"), **arguments)


IN_LMMS_EVAL = "integrations/lmms_eval.py"


@raises(ConfigError, f"{IN_LMMS_EVAL}:Emma.__init__", "unknown model argument")
def a_model_argument_that_does_not_exist(bench: Bench) -> None:
    emma(adaptor="x")


@raises(ConfigError, f"{IN_LMMS_EVAL}:Emma.__init__", "pretrained is missing")
def no_model(bench: Bench) -> None:
    emma(pretrained=None)


@raises(ConfigError, f"{IN_LMMS_EVAL}:Emma.__init__", "add adapter=")
def an_instruction_without_an_adapter(bench: Bench) -> None:
    emma(instruction="first_line")


@raises(ConfigError, f"{IN_LMMS_EVAL}:_check_texts", "must be a text that is not empty")
def a_number_for_an_adapter(bench: Bench) -> None:
    emma(adapter=1)


@raises(ConfigError, f"{IN_LMMS_EVAL}:_check_choice", "must be one of")
def a_dtype_that_does_not_exist(bench: Bench) -> None:
    emma(dtype="int3")


@raises(ConfigError, f"{IN_LMMS_EVAL}:_positive", "must be an integer >= 1")
def batches_of_no_row(bench: Bench) -> None:
    emma(batch_size=0)


@raises(ConfigError, f"{IN_LMMS_EVAL}:_json_object", ": {error}")
def processor_settings_that_are_cut_off(bench: Bench) -> None:
    emma(processor_kwargs="{")


@raises(ConfigError, f"{IN_LMMS_EVAL}:_json_object", "must be a JSON object; got {value}$")
def processor_settings_in_a_list(bench: Bench) -> None:
    emma(processor_kwargs="[1]")


def in_two_processes(bench: Bench, kind: str) -> None:
    from emma_adapter.integrations import lmms_eval

    accelerator = SimpleNamespace(
        process_index=0, num_processes=2, distributed_type=lmms_eval.DistributedType[kind], device=torch.device("cpu")
    )
    bench.monkeypatch.setattr(lmms_eval, "Accelerator", lambda: accelerator)


@raises(ConfigError, f"{IN_LMMS_EVAL}:Emma._place", "has a whole model in each process")
def lmms_eval_under_fsdp(bench: Bench) -> None:
    in_two_processes(bench, "FSDP")
    emma()


@raises(ConfigError, f"{IN_LMMS_EVAL}:Emma._place", "spreads one model over all GPUs")
def a_device_map_in_two_processes(bench: Bench) -> None:
    in_two_processes(bench, "MULTI_CPU")
    emma(device_map="auto")


@raises(ConfigError, f"{IN_LMMS_EVAL}:Emma._prepare_processor", "is no file")
def a_chat_template_that_does_not_exist(bench: Bench) -> None:
    emma_of(bench, chat_template="nowhere.jinja")


@raises(UnsupportedModelError, f"{IN_LMMS_EVAL}:Emma._prepare_processor", "has no chat template")
def a_processor_without_a_chat_template(bench: Bench) -> None:
    from transformers import AutoProcessor

    processor = tiny.processor()
    processor.chat_template = None
    bench.monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *args, **settings: processor)
    emma()


def ask(bench: Bench, kind: str) -> None:
    emma_of(bench)._answer([[{"role": "user", "content": [{"type": kind, kind: "x"}]}]], {})


@raises(UnsupportedModelError, f"{IN_LMMS_EVAL}:Emma._encode", "the task has audio")
def a_task_with_audio(bench: Bench) -> None:
    ask(bench, "audio")


@raises(UnsupportedModelError, f"{IN_LMMS_EVAL}:Emma._encode", "the task has videos")
def a_task_with_videos(bench: Bench) -> None:
    ask(bench, "video")
