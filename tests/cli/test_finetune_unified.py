from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments, set_seed

from emma_adapter import UnifiedConfig, load_unified, unify_model
from emma_adapter.cli import main
from tests.support import tiny
from tests.support.workspace import AUTOENCODER_ID, make_workspace

pytestmark = pytest.mark.filterwarnings("ignore")
MODEL = "Qwen/Qwen3-VL-8B-Instruct"
COMMON = ["--unified", "--model", MODEL, "--use_cpu", "true", "--per_device_train_batch_size", 2]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """With ``drawings.jsonl``: eight pictures of 64 x 96, every second one an edit of another."""
    folder = make_workspace(tmp_path_factory.mktemp("workspace"), f"{MODEL} {AUTOENCODER_ID}")
    rows = []
    for number in range(8):
        tiny.picture(number).resize((96, 64)).save(folder / f"{number}.png")
        rows.append({"prompt": f"a {number}", "target": f"{number}.png"} | ({"image": "0.png"} if number % 2 else {}))
    (folder / "drawings.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(autouse=True)
def _inside(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


def finetune(output, *arguments, code=0, data="drawings.jsonl", common=(*COMMON, "--rank", 2)):
    command = ["finetune", *common, "--data", data, "--output", output, *arguments]
    result = CliRunner().invoke(main, [str(part) for part in command])
    assert result.exit_code == code, result.output
    return result


def refused(tmp_path, *arguments, **options):
    """What is said on the one line, after the progress bars; nothing is written."""
    said = finetune(tmp_path / "refused", *arguments, code=2, **options)
    assert not (tmp_path / "refused").exists() and "Loading weights" not in said.output
    line = said.stderr.splitlines()[-1]
    assert line.startswith("Error: ")
    return line


def told_by(folder):
    told = json.loads((folder / "unified_config.json").read_text())
    del told["sha256"]
    return told


def assert_same(one, other):
    assert told_by(one) == told_by(other)
    tensors, others = (load_file(folder / "unified_model.safetensors") for folder in (one, other))
    assert tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)


def base():
    return AutoModelForImageTextToText.from_pretrained(MODEL), AutoProcessor.from_pretrained(MODEL)


def test_it_is_the_training_that_a_script_does_and_draw_reads_it(tmp_path):
    said = finetune(tmp_path / "a", "--max_steps", 3, "--save_strategy", "no", "--eval-data", "drawings.jsonl").stdout
    model, processor = base()
    set_seed(42)
    unified = unify_model(model, UnifiedConfig(decoupling=2), processor=processor, autoencoder=AUTOENCODER_ID)
    before = {name: value.clone() for name, value in model.state_dict().items() if "emma" not in name}
    rows = [json.loads(line) for line in Path("drawings.jsonl").read_text().splitlines()]
    unified.measure_latents([Image.open(row["target"]) for row in rows])
    unified.train_only()
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=3, save_strategy="no", per_device_train_batch_size=2, learning_rate=1e-3,
        use_cpu=True, remove_unused_columns=False, label_names=["target_pixel_values"], report_to=[],
    )  # fmt: skip
    trained = Trainer(model, arguments, data_collator=unified.collator(), train_dataset=rows).train()
    unified.save_pretrained(tmp_path / "b")
    assert_same(tmp_path / "a", tmp_path / "b")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert f"mean loss {trained.training_loss:.4f}" in said and "Loss on drawings.jsonl" in said

    drawing = ["draw", "a 3", "--model", MODEL, "--adapter", tmp_path / "a", "--output", tmp_path / "3.png"]
    drawing += ["--steps", 2, "--seed", 1, "--height", 64, "--width", 96]
    assert CliRunner().invoke(main, [str(part) for part in drawing]).exit_code == 0
    own = unified.set_progress_bar_config(disable=True)
    model.eval()
    want = own.generate_images(
        "a 3", height=64, width=96, num_inference_steps=2, generator=torch.Generator().manual_seed(1)
    ).images[0]
    assert np.array_equal(np.array(Image.open(tmp_path / "3.png")), np.array(want))


def test_an_interrupted_training_tells_how_it_goes_on_and_goes_on_exactly(tmp_path, monkeypatch):
    steps = ["--max_steps", 4, "--save_steps", 2]
    # Evaluating on the way changes nothing.
    finetune(tmp_path / "a", *steps, "--eval-data", "drawings.jsonl", "--eval_strategy", "steps", "--eval_steps", 1)
    real, calls = Trainer.training_step, []

    def interrupted(self, *args, **kwargs):
        calls.append(0)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", interrupted)
        said = finetune(tmp_path / "b", *steps, code=130).stderr
    assert "Stopped at step 3" in said and "--resume_from_checkpoint true" in said and "checkpoint-2" in said
    # One that was being written when the power went.
    (tmp_path / "b" / "checkpoints" / "checkpoint-3").mkdir()
    # The statistics of the latents are those of the checkpoint, not measured anew.
    monkeypatch.setattr("emma_adapter.unified.handle.EmmaUnified.measure_latents", None)
    finetune(tmp_path / "b", *steps, "--resume_from_checkpoint", "true")
    assert_same(tmp_path / "a", tmp_path / "b")
    line = finetune(tmp_path / "b", *steps, "--resume_from_checkpoint", "true", "--rank", 3, code=2).stderr
    assert "--rank 3" in line.splitlines()[-1]


def test_interrupted_before_the_first_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "training_step", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
    assert "no checkpoint was written yet; --save_steps" in finetune(tmp_path, code=130).stderr


def test_a_branch_goes_on_learning_from_where_it_was(tmp_path):
    """With a learning rate of zero it stays what it was, latent statistics too, whatever the new pictures are."""
    finetune(tmp_path / "a", "--max_steps", 1, "--save_strategy", "no")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "other", "target": "5.png"}))
    go_on = ["--images", ".", "--adapter", tmp_path / "a", "--max_steps", 1, "--save_strategy", "no"]
    finetune(tmp_path / "b", *go_on, "--learning_rate", 0, data=tmp_path / "rows.jsonl", common=COMMON)
    assert_same(tmp_path / "a", tmp_path / "b")
    assert "brings its own rank" in refused(tmp_path, "--adapter", tmp_path / "a")
    assert "unified_config.json" in refused(tmp_path, "--adapter", "images", common=COMMON)


def dataset_of(tmp_path):
    import datasets

    rows = [json.loads(line) for line in Path("drawings.jsonl").read_text().splitlines()]
    table = datasets.Dataset.from_list([{"image": None, "other": 1, **row} for row in rows])
    table = table.cast_column("image", datasets.Image()).cast_column("target", datasets.Image())
    table.save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_dataset_and_sizes(tmp_path):
    """Pictures within a dataset are those of the files; ``--size`` is the collator's, height first."""
    arguments = ["--size", "32x64", "--max_steps", 1, "--save_strategy", "no", "--bf16", "true"]
    arguments += ["--gradient_checkpointing", "true"]
    finetune(tmp_path / "a", *arguments)
    finetune(tmp_path / "b", *arguments, data=dataset_of(tmp_path))
    assert_same(tmp_path / "a", tmp_path / "b")
    model, processor = base()
    unified = load_unified(model, tmp_path / "a", processor=processor)
    pictures = [Image.open(f"{number}.png").convert("RGB").resize((64, 32)) for number in range(8)]
    latents = unified.encode_images(torch.stack([torch.from_numpy(np.array(p)).movedim(2, 0) / 255 for p in pictures]))
    torch.testing.assert_close(latents.movedim(1, 0).flatten(1).std(1), torch.ones(8), atol=1e-3, rtol=0)


def test_many_pictures_are_measured_by_a_sample_from_all_over(monkeypatch):
    from emma_adapter.cli import train_unified

    monkeypatch.setattr(train_unified, "_MEASURED", 3)
    rows = [{"target": Image.new("RGB", (n + 1, 1))} for n in range(9)]
    assert [picture.width for picture in train_unified._sample(rows, None, progress=False)] == [1, 4, 7]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--fusion", "linear"], "--fusion has no effect on drawing"),
        (["--projector"], "--projector has no effect"),
        (["--projector", "--projector-lr", "0"], "--projector"),
        (["--instruction-encoder", "llm"], "--instruction-encoder"),
        (["--size", "65"], "take 64 x 64"),
        (["--size", "64x"], "no size in pixels"),
        (["--rank", "0"], "--rank"),
        (["--rank", "all"], "--rank"),
        (["--autoencoder", "nowhere/at-all"], "autoencoder"),
        (["--subfolder", "x"], "--adapter"),
        (["--resume_from_checkpoint", "images"], "unified_config.json"),
        (["--resume_from_checkpoint", "true"], "no checkpoint"),
        (["--max_length", "5"], "transformers.TrainingArguments"),
        (["--label_names", "labels"], "read by this command"),
        (["--learning_rate", "-1"], "below 0"),
        (["--eval-data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--model", "nowhere/at-all"], "nowhere/at-all"),
        (["--data", "train.jsonl"], 'lacks "prompt" or "target"'),
        (["--data", "nowhere/at-all"], "nowhere/at-all"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(tmp_path, arguments, words):
    assert words in refused(tmp_path, *arguments)


@pytest.mark.parametrize("arguments", [["--rank", "4"], ["--size", "64"], ["--autoencoder", "x"]])
def test_what_needs_unified(tmp_path, arguments):
    common = [part for part in COMMON if part != "--unified"]
    assert f"{arguments[0]} needs --unified" in refused(tmp_path, *arguments, common=common)


GOOD = {"prompt": "a", "target": "0.png"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "JSON"),
        ("[]", "list"),
        ({"prompt": "a"}, "lacks"),
        ({"target": "0.png"}, "lacks"),
        ({**GOOD, "prompt": " \n"}, "what to draw"),
        ({**GOOD, "prompt": 3}, "what to draw"),
        ({**GOOD, "prompt": "\ud800"}, "surrogate"),
        ({**GOOD, "prompt": "a <|image_pad|>"}, "stands for a picture"),
        ({**GOOD, "target": "nowhere.png"}, "nowhere.png"),
        ({**GOOD, "target": 3}, "file names"),
        ({**GOOD, "target": ["0.png"]}, "file names"),
        ({**GOOD, "target": "drawings.jsonl"}, "can't be read as an image"),
        ({**GOOD, "target": "cut.png"}, "cut.png can't be read"),
        ({**GOOD, "image": "nowhere.png"}, "nowhere.png"),
        ({**GOOD, "images": ["0.png", "cut.png"]}, "cut.png"),
        ({**GOOD, "image": "0.png", "images": ["1.png"]}, "different images"),
        ({**GOOD, "target": "odd.png"}, "take 64 x 96"),
        ({**GOOD, "target": "small.png"}, "--size 64x96"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else "",
)
def test_bad_rows_are_named_before_the_model_is_loaded(tmp_path, workspace, monkeypatch, row, words):
    (workspace / "cut.png").write_bytes((workspace / "0.png").read_bytes()[:300])
    tiny.picture(0).resize((97, 64)).save(workspace / "odd.png")
    tiny.picture(0).resize((32, 64)).save(workspace / "small.png")
    monkeypatch.setattr("emma_adapter.models.loading.load_model", lambda *args, **kwargs: pytest.fail("loaded"))
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join([json.dumps(GOOD), "", row if isinstance(row, str) else json.dumps(row)]))
    line = refused(tmp_path, "--images", workspace, data=path)
    assert f"{path}, line 3" in line and words in line


def test_several_sizes_go_one_at_a_time(tmp_path):
    tiny.picture(0).resize((32, 64)).save(tmp_path / "small.png")
    tiny.picture(0).resize((96, 64)).save(tmp_path / "large.png")
    rows = [{"prompt": "a", "target": name, "image": "small.png"} for name in ("small.png", "large.png")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--per_device_train_batch_size", 1, "--max_steps", 2, "--save_strategy", "no", "--rank", "full"]
    said = finetune(tmp_path / "out", *arguments, data=tmp_path / "rows.jsonl").stdout
    loss = float(said.split("mean loss ")[1].split()[0])
    assert math.isfinite(loss)
    assert told_by(tmp_path / "out")["config"]["decoupling"] == "full"


@pytest.mark.slow
@pytest.mark.nightly
def test_two_processes_share_the_pictures_and_save_once(tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "emma_adapter.cli"]
    command += ["finetune", *map(str, COMMON), "--data", "drawings.jsonl", "--output", str(tmp_path), "--rank", "2"]
    done = subprocess.run(
        [sys.executable, *command, "--num_train_epochs", "1"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Saved to") == 1
    assert json.loads((tmp_path / "checkpoints" / "checkpoint-2" / "trainer_state.json").read_text())["epoch"] == 1
    model, processor = base()
    load_unified(model, tmp_path, processor=processor)
