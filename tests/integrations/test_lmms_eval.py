"""``--model emma`` of lmms-eval, against scripts that use transformers and the adapter directly."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from lmms_eval import models
from lmms_eval.api.instance import Instance
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from emma_adapter import (
    ConfigError,
    EmmaConfig,
    PatchError,
    UnsupportedModelError,
    get_adapter,
    load_adapter,
    patch_model,
)
from emma_adapter.integrations.lmms_eval import Emma
from tests.support import tiny
from tests.support.budget import budget
from tests.support.zoo import ZOO

CONFIG = EmmaConfig(fusion="modulation", inner_dim=8, num_heads=2)
TOKENS = 8
# SmolVLM's real processor can't be loaded without num2words; PaliGemma's has no chat template.
FAMILIES = sorted(set(ZOO) - {"smolvlm", "paligemma"})


@dataclass(frozen=True)
class Doc:
    question: str
    pictures: tuple[int, ...] = ()
    videos: tuple[str, ...] = ()
    earlier: tuple[tuple[str, str], ...] = field(default=())

    def visuals(self) -> list[dict[str, Any]]:
        images = [{"type": "image", "url": tiny.picture(seed).resize((56, 56))} for seed in self.pictures]
        return [*images, *({"type": "video", "url": path} for path in self.videos)]

    def messages(self) -> list[dict[str, Any]]:
        """As lmms-eval's tasks make them."""
        return [{"role": "user", "content": [*self.visuals(), {"type": "text", "text": self.question}]}]


DOCS = (
    Doc("how many dogs are there?\nAnswer with a number.", (0, 1)),
    Doc("what colour is the left one, and is there a tree?\nAnswer with one word.", (2,)),
    Doc("two and three?"),
    Doc("is there a cat?\nAnswer yes or no.", (2,)),
)


def save_model(model, processor, folder: Path, config: EmmaConfig = CONFIG) -> Path:
    """A model with its processor in ``folder/model``, a trained adapter in ``folder/adapter``."""
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    adapter = patch_model(model, config, processor=processor)
    tiny.train_randomly(adapter.alignment, scale=1.0)
    adapter.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a saved model and adapter of a family, made once."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            entry = ZOO[family]
            made[family] = save_model(entry.model(), entry.processor(), tmp_path_factory.mktemp(family))
        return made[family]

    return folder


def emma(folder: Path, *, adapter: bool = True, **arguments: Any) -> Emma:
    if adapter:
        arguments["adapter"] = str(folder / "adapter")
    return Emma(str(folder / "model"), device="cpu", **arguments)


def ask(model: Emma, docs: tuple[Doc, ...] = DOCS, **settings: Any) -> list[str]:
    """What lmms-eval gets for ``docs``, each a request of the task ``pictures``."""
    model.task_dict = {"pictures": {"test": docs}}
    requests = [
        Instance(
            request_type="generate_until",
            arguments=(
                doc.question,
                Doc.messages,
                {"max_new_tokens": TOKENS, "until": ["\n\n"], **settings},
                number,
                "pictures",
                "test",
            ),
            idx=0,
            metadata={"task": "pictures", "doc_id": number, "repeats": 1},
        )
        for number, doc in enumerate(docs)
    ]
    return [answer.text for answer in model.generate_until(requests)]


def script(folder: Path, docs: tuple[Doc, ...] = DOCS, *, adapter: bool = True, **settings: Any) -> list[str]:
    """What a script without lmms-eval answers, one question at a time."""
    model = AutoModelForImageTextToText.from_pretrained(folder / "model").eval()
    processor = AutoProcessor.from_pretrained(folder / "model")
    if adapter:
        load_adapter(model, folder / "adapter", processor=processor)
    answers = []
    for doc in docs:
        text = processor.apply_chat_template(doc.messages(), add_generation_prompt=True)
        images = [part["url"] for part in doc.visuals() if part["type"] == "image"]
        bos = processor.tokenizer.bos_token
        inputs = processor(
            text=[text],
            images=[images] if images else None,
            add_special_tokens=not (bos and text.startswith(bos)),
            return_tensors="pt",
        )
        row = {name: value(doc) for name, value in settings.items()}
        with torch.no_grad():
            output = model.generate(**inputs, **row, max_new_tokens=TOKENS, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
    return answers


def test_lmms_eval_finds_the_model_by_its_name_and_alias():
    assert models.get_model_manifest("emma_adapter").model_id == "emma"
    assert models.get_model("emma") is Emma
    assert models.get_model("emma_adapter", force_simple=True) is Emma


def test_lmms_eval_starts_without_torch():
    code = (
        "import sys, lmms_eval.models as models; models.get_model_manifest('emma'); "
        "print(sorted({'torch', 'transformers', 'datasets', 'emma_adapter'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_package_needs_no_lmms_eval():
    code = "import sys; sys.modules['lmms_eval'] = None; import emma_adapter, emma_adapter_lmms_eval"
    subprocess.run([sys.executable, "-c", code], check=True)


TASK = """\
task: pictures
dataset_path: json
dataset_kwargs:
  data_files:
    test: docs.jsonl
test_split: test
output_type: generate_until
doc_to_visual: !function utils.pictures
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 8
  temperature: 0
  image_aspect_ratio: original
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
UTILS = """\
from PIL import Image


def pictures(doc):
    return [Image.open(path) for path in doc["pictures"]]
"""


@pytest.mark.slow
@pytest.mark.nightly
def test_the_command_line(saved, tmp_path):
    folder = saved("llava")
    docs = DOCS[:2]
    expected = script(folder, docs)
    assert expected != script(folder, docs, adapter=False)
    rows = []
    for doc in docs:
        paths = [tmp_path / f"{seed}.png" for seed in doc.pictures]
        for part, path in zip(doc.visuals(), paths, strict=True):
            part["url"].save(path)
        rows.append({"question": doc.question, "pictures": list(map(str, paths)), "answer": expected[0]})
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "pictures.yaml").write_text(TASK)
    (tmp_path / "task" / "utils.py").write_text(UTILS)
    command = [sys.executable, "-m", "lmms_eval", "--model", "emma", "--tasks", "pictures", "--include_path", "task"]
    arguments = f"pretrained={folder / 'model'},adapter={folder / 'adapter'},device=cpu"
    command += ["--model_args", arguments, "--batch_size", "2", "--log_samples", "--output_path", "results"]
    caches = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **caches}, capture_output=True, text=True, check=False
    )
    results = list(tmp_path.glob("results/**/*_results.json"))
    assert len(results) == 1, done.stdout + done.stderr
    score = np.mean([answer == expected[0] for answer in expected])
    assert json.loads(results[0].read_text())["results"]["pictures"]["exact_match,none"] == score
    (samples,) = tmp_path.glob("results/**/*_samples_pictures.jsonl")
    logged = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [sample["filtered_resps"] for sample in sorted(logged, key=lambda sample: sample["doc_id"])] == expected


@pytest.mark.parametrize("family", budget(["internvl", "llava_next", "mistral3", "qwen2_5_vl"], FAMILIES))
def test_answers_are_those_of_a_script(saved, family):
    folder = saved(family)
    expected = script(folder)
    assert ask(emma(folder, batch_size=3)) == expected
    assert ask(emma(folder, batch_size=1)) == expected
    assert expected != script(folder, adapter=False)


def test_photos_that_a_task_opened_are_upright(saved, tmp_path):
    """As those that the processor opens."""
    model = emma(saved("llava"), adapter=False)
    exif = Image.Exif()
    exif[0x0112] = 6
    tiny.picture(0).save(tmp_path / "photo.png", exif=exif)

    def pixels(**image: Any) -> np.ndarray:
        part = {"type": "image", **image}
        return model._encode([[{"role": "user", "content": [part, {"type": "text", "text": "what?"}]}]])["pixel_values"]

    with Image.open(tmp_path / "photo.png") as opened:
        assert torch.equal(pixels(image=opened), pixels(path=str(tmp_path / "photo.png")))
        assert not torch.equal(pixels(image=opened), pixels(image=tiny.picture(0)))


def test_the_instruction_is_the_question_of_its_row(saved):
    folder = saved("llava")
    expected = script(folder, instruction=lambda doc: [doc.question])
    assert ask(emma(folder, batch_size=4)) == expected
    assert script(folder, instruction=lambda doc: ["describe the image in detail."]) != expected


def test_first_line(saved):
    folder = saved("llava")
    expected = script(folder, instruction=lambda doc: [doc.question.split("\n")[0]])
    assert ask(emma(folder, batch_size=4, instruction="first_line")) == expected
    assert expected != script(folder)


def test_the_set_up_of_the_paper(tmp_path, clip_folder):
    entry = ZOO["llava"]
    folder = save_model(entry.model(), entry.processor(), tmp_path, EmmaConfig.paper(str(clip_folder)))
    expected = script(folder, instruction=lambda doc: [doc.question.split("\n")[0]])
    assert ask(emma(folder, batch_size=4, instruction="first_line", kernel="eager")) == expected
    assert expected != script(folder, adapter=False)


def test_without_an_adapter_it_is_the_base_model(saved):
    folder = saved("llava")
    model = emma(folder, adapter=False, batch_size=2)
    assert ask(model) == script(folder, adapter=False)
    with pytest.raises(PatchError, match="not patched"):
        get_adapter(model.model)


def test_answers_end_at_a_stop_string(saved):
    model = emma(saved("llava"), batch_size=4)
    whole = ask(model)
    stop = whole[0][len(whole[0]) // 2 :][:2]
    cut = ask(model, until=[stop, "\n\n"])
    assert cut == [answer.split(stop)[0].strip() for answer in whole] != whole
    assert ask(model, until=stop) == cut


def test_generation_settings_of_a_task(saved, monkeypatch):
    model = emma(saved("llava"), max_new_tokens=3)
    seen = []
    generate = model.model.generate
    monkeypatch.setattr(model.model, "generate", lambda **given: seen.append(given) or generate(**given))
    docs = DOCS[2:3]

    def used(**settings: Any) -> dict[str, Any]:
        ask(model, docs, **settings)
        return seen[-1]

    assert not used()["do_sample"] and seen[-1]["max_new_tokens"] == TOKENS
    assert "stop_strings" not in seen[-1]  # lmms-eval's own "\n\n"
    assert used(until=["\n"])["stop_strings"] == ["\n"]
    greedy = used(temperature=0.0, top_p=0.9, do_sample=True)
    assert not greedy["do_sample"] and greedy["temperature"] is greedy["top_p"] is None
    assert not used(temperature=0.7, do_sample=False)["do_sample"]
    assert used(temperature=0.7)["do_sample"] and seen[-1]["temperature"] == 0.7
    assert used(do_sample=True)["do_sample"]
    assert used(num_beams=2)["num_beams"] == 2
    assert "image_aspect_ratio" not in used(image_aspect_ratio="original")
    assert used(max_new_tokens=5)["max_new_tokens"] == 5


def test_without_settings_of_the_task(saved):
    model = emma(saved("llava"), max_new_tokens=3)
    model.task_dict = {"pictures": {"test": DOCS}}
    request = Instance(
        request_type="generate_until",
        arguments=("", Doc.messages, {"until": ["\n\n"]}, 0, "pictures", "test"),
        idx=0,
        metadata={"task": "pictures", "doc_id": 0, "repeats": 1},
    )
    (answer,) = model.generate_until([request])
    assert answer.token_counts.output_tokens == 3


def write_video(path: Path, frames: int, seed: int) -> str:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 56, 56, "yuv420p"
        for number in range(frames):
            picture = tiny.picture(seed + number).resize((56, 56), Image.Resampling.NEAREST)
            file.mux(stream.encode(av.VideoFrame.from_image(picture)))
        file.mux(stream.encode())
    return str(path)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl"])
def test_videos(saved, family, tmp_path):
    long, short = write_video(tmp_path / "long.mp4", 12, 0), write_video(tmp_path / "short.mp4", 4, 50)
    docs = (Doc("how many dogs are there?", (0,)), Doc("what colour?", videos=(long,)), Doc("what?", videos=(short,)))
    model = emma(saved(family), batch_size=3, num_frames=4)
    together = ask(model, docs)
    assert together == [ask(model, (doc,))[0] for doc in docs]
    assert together[1] != ask(model, (Doc("what colour?", videos=(short,)),))[0]


def test_frames_of_a_video(saved, tmp_path):
    path = write_video(tmp_path / "video.mp4", 12, 0)
    model = emma(saved("qwen2_5_vl"), adapter=False, num_frames=4)

    def chosen(**part: Any) -> tuple[list[int], int]:
        given = {"type": "video", "video": path, **part}
        metadata = model._load_video(given)
        return list(metadata.frames_indices), len(given["video"])

    assert chosen() == ([0, 4, 7, 11], 4)
    assert chosen(video_start=1.0, video_end=1.5) == ([4, 5, 6], 3)
    assert chosen(video_start=99.0) == ([11], 1)


def test_a_processor_takes_the_frames_as_they_are(saved, tmp_path):
    path = write_video(tmp_path / "video.mp4", 12, 0)
    model = emma(saved("qwen3_vl"), num_frames=8)
    # Left to itself, as checkpoints have it, it takes two frames a second out of these three seconds.
    model.processor.video_processor.do_sample_frames = True
    inputs = model._encode([model._conversation(Doc("what?", videos=(path,)).messages())])
    assert inputs["video_grid_thw"][0, 0] * model.processor.video_processor.temporal_patch_size == 8


def test_processor_kwargs(saved):
    folder = saved("qwen2_5_vl")
    small = emma(folder, processor_kwargs='{"size": {"shortest_edge": 784, "longest_edge": 784}}')
    talk = Doc("what?", (0,)).messages()
    sizes = [model._encode([model._conversation(talk)])["image_grid_thw"].prod() for model in (small, emma(folder))]
    assert sizes[0] < sizes[1]


def test_system_prompt(saved):
    model = emma(saved("llava"), system_prompt="two, three.")
    talk = model._conversation(DOCS[2].messages())
    assert talk[0] == {"role": "system", "content": [{"type": "text", "text": "two, three."}]}


def test_chat_template_of_a_file(saved, tmp_path):
    folder = tmp_path / "bare"
    entry = ZOO["llava"]
    processor = entry.processor()
    template, processor.chat_template = processor.chat_template, None
    entry.model().save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    with pytest.raises(UnsupportedModelError, match="chat_template=FILE"):
        emma(folder, adapter=False)
    (tmp_path / "template.jinja").write_text(template)
    model = emma(folder, adapter=False, chat_template=str(tmp_path / "template.jinja"))
    assert ask(model) == script(saved("llava"), adapter=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"colour": "red"}, r"unknown model argument\(s\) \['colour'\]; known are .*'adapter'.*'pretrained'"),
        ({"pretrained": None}, "pretrained is missing"),
        ({"adapter": ""}, "adapter must be a text that is not empty"),
        ({"revision": 1234567}, "revision must be a text"),
        ({"kernel": "triton"}, r"\['kernel'\].*add adapter="),
        ({"instruction": "first_line", "adapter_revision": "main"}, r"\['adapter_revision', 'instruction'\]"),
        ({"adapter": "a", "kernel": "cuda"}, "kernel must be one of"),
        ({"adapter": "a", "instruction": "last"}, "instruction must be one of"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"trust_remote_code": "perhaps"}, "trust_remote_code must be one of"),
        ({"batch_size": "auto"}, "batch_size must be an integer >= 1; got 'auto'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1"),
        ({"num_frames": 2.5}, "num_frames must be an integer >= 1"),
        ({"processor_kwargs": "{min_pixels: 1}"}, "processor_kwargs must be a JSON object"),
        ({"processor_kwargs": "[1]"}, "processor_kwargs must be a JSON object"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Emma(**{"pretrained": "nowhere", **arguments})


def test_a_template_that_is_no_file(saved):
    with pytest.raises(ConfigError, match="is no file"):
        emma(saved("llava"), chat_template="nowhere.jinja")


def test_what_a_model_cannot_take_is_named(saved):
    model = emma(saved("llava"))
    with pytest.raises(UnsupportedModelError, match="videos, which LlavaProcessor doesn't take"):
        ask(model, (Doc("what?", videos=("clip.mp4",)),))
    model.task_dict = {"sounds": {"test": [None]}}
    talk = [{"role": "user", "content": [{"type": "audio", "url": "bark.wav"}, {"type": "text", "text": "what?"}]}]
    with pytest.raises(UnsupportedModelError, match="audio"):
        model._encode([model._conversation(talk)])
    for request_type in ("loglikelihood", "generate_until_multi_round"):
        with pytest.raises(NotImplementedError, match="output_type: generate_until"):
            getattr(model, request_type)([])


def test_every_task_of_the_benchmarks_page_exists():
    page = (Path(__file__).parents[2] / "benchmarks" / "README.md").read_text().split("## The paper's tables")[1]
    named = set(re.findall(r"^\| [^|]+ \| `(\w+)` \|", page, re.MULTILINE))
    for tasks in re.findall(r"^(?:TASKS=|run )([a-z][\w,]+)", page, re.MULTILINE):
        named |= set(tasks.split(","))
    assert {"pope", "mmvp", "vqav2_val"} <= named
    files = (Path(models.__file__).parents[1] / "tasks").rglob("*.yaml")
    known = {name for path in files for name in re.findall(r'^task: *"?([\w-]+)"?\s*$', path.read_text(), re.MULTILINE)}
    assert named <= known
