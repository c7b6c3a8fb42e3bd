from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPTextModel

from emma_adapter import EmmaAlignment, EmmaConfig, UnifiedConfig, load_adapter, patch_model
from emma_adapter.cli import info as info_command
from emma_adapter.cli import main
from tests.alignment.test_official_weights import paper, stored, write
from tests.support import tiny
from tests.support.workspace import MODEL_ID, make_workspace

#: The sizes of the tiny LLaVA and of the CLIP in ``clip_folder``.
SIZES = {"n": tiny.TOKENS_PER_IMAGE, "t": 16, "d": tiny.WIDTH, "dt": 24}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = make_workspace(tmp_path_factory.mktemp("workspace"))
    adapter = patch_model(tiny.llava())
    adapter.save_pretrained(folder / "adapter")
    tiny.train_randomly(adapter.alignment)
    adapter.save_pretrained(folder / "trained")
    adapter.model.save_pretrained(folder / "model-with-adapter")
    (folder / "lora").mkdir()
    (folder / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    return folder


@pytest.fixture(autouse=True)
def _inside(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def refused(*arguments):
    """What is said on the one line; before it may be what transformers logs while it loads."""
    line = run(*arguments, code=2).stderr.splitlines()[-1]
    assert line.startswith("Error: ")
    return line


# ---------------------------------------------------------------------------------------------- the program


COMMANDS = [[], ["info"], ["convert"], ["finetune"], ["report"], ["diff"], ["draw"], ["edit"]]


def test_help_waits_for_nothing():
    """Importing torch alone takes seconds."""
    heavy = {"torch", "numpy", "transformers", "trl", "datasets", "peft", "matplotlib", "jinja2", "PIL"}
    code = f"""
import sys
from emma_adapter.cli import main
for arguments in {[*([*command, "--help"] for command in COMMANDS), ["--version"]]}:
    try:
        main(arguments)
    except SystemExit as done:
        assert not done.code, arguments
    print("imported:", arguments, sorted({heavy} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    told = [line for line in done.stdout.splitlines() if line.startswith("imported:")]
    assert len(told) == len(COMMANDS) + 1 and all(line.endswith("[]") for line in told), told


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_waits_for_nothing(shell):
    words = {"COMP_WORDS": "emma-adapter finetune --fus", "COMP_CWORD": "2" if shell != "fish" else "--fus"}
    code = """
import sys
from emma_adapter.cli import main
try:
    main(prog_name="emma-adapter")
finally:
    print("imported:", sorted({"torch", "transformers"} & set(sys.modules)))
"""
    environment = {**os.environ, **words, "_EMMA_ADAPTER_COMPLETE": f"{shell}_complete"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert "--fusion" in done.stdout and done.stdout.splitlines()[-1] == "imported: []", done.stderr


def test_help_names_the_defaults_of_the_config():
    """As text, because reading them off EmmaConfig imports torch."""
    told = {option.name: option.help for option in main.commands["finetune"].params if hasattr(option, "help")}
    for name in ("fusion", "instruction_encoder", "instruction_policy"):
        assert f'Default: "{getattr(EmmaConfig(), name)}"' in told[name]
    assert f"Default: {UnifiedConfig().decoupling}" in told["rank"]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help(command):
    assert "Usage: " in run(*command, "--help").stdout


def test_version():
    assert "emma-adapter, version" in run("--version").stdout


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["--nonsense"], ["info"], ["info", "a", "b"]], ids=" ".join)
def test_bad_usage_is_one_line(arguments):
    assert "--help" in refused(*arguments)


def test_runs_as_a_module():
    command = [sys.executable, "-m", "emma_adapter.cli", "info", "nowhere/at-all"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Error: nowhere/at-all ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (OSError("disk full"), 2)])
def test_exit_codes(monkeypatch, error, code):
    def fail(**_):
        raise error

    monkeypatch.setattr(info_command, "callback", fail)
    run("info", "x", code=code)


def fail_with(error):
    def fail(**_):
        raise error

    return fail


@pytest.mark.parametrize(
    "error", [ZeroDivisionError(), ValueError("ours"), RuntimeError("size mismatch"), KeyError("a")]
)
def test_errors_of_the_program_keep_their_traceback(monkeypatch, error):
    monkeypatch.setattr(info_command, "callback", fail_with(error))
    assert CliRunner().invoke(main, ["info", "x"]).exception is error


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")])
def test_memory_that_is_too_small_is_one_line(monkeypatch, error):
    monkeypatch.setattr(info_command, "callback", fail_with(error))
    assert "out of memory" in refused("info", "x")
    assert "smaller batches" in refused("info", "x")


def test_what_other_packages_refuse_is_one_line(monkeypatch):
    monkeypatch.setattr(info_command, "callback", lambda **_: torch.utils.data.DataLoader([1], batch_size=0))
    assert "torch refuses what it was given (batch_size should be a positive integer" in refused("info", "x")


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors", "tokenizer.json", "processor_config.json"])
def test_a_damaged_model_is_one_line(tmp_path, workspace, damage):
    shutil.copytree(workspace / MODEL_ID, tmp_path / "model")
    path = tmp_path / "model" / damage
    path.write_bytes(path.read_bytes()[:100])
    more = ["--adapter", "adapter", "--data", "birds", "--device", "cpu"]
    assert "model can't be loaded as a vision-language model" in refused("report", "--model", tmp_path / "model", *more)


@pytest.fixture
def foreign(tmp_path):
    """A LLaVA of a class of its own, whose code is in its folder."""
    code = tmp_path / "code" / "modeling_foreign.py"
    code.parent.mkdir()
    code.write_text(
        "from transformers import LlavaForConditionalGeneration\n\n\n"
        "class ForeignLlava(LlavaForConditionalGeneration):\n    pass\n"
    )
    spec = importlib.util.spec_from_file_location("modeling_foreign", code)
    module = importlib.util.module_from_spec(spec)
    sys.modules["modeling_foreign"] = module
    spec.loader.exec_module(module)
    module.ForeignLlava.register_for_auto_class("AutoModelForImageTextToText")
    module.ForeignLlava(tiny.llava().config).save_pretrained(tmp_path / "model")
    tiny.processor().save_pretrained(tmp_path / "model")
    yield tmp_path / "model"
    del sys.modules["modeling_foreign"]


def test_a_model_of_a_class_of_its_own(tmp_path, foreign, monkeypatch):
    """Loaded as another class it would be another model."""
    for command in (["info", foreign], ["report", "--model", foreign, "--adapter", "adapter", "--data", "birds"]):
        line = refused(*command)
        assert "ForeignLlava" in line and "--trust-remote-code" in line
    facts = json.loads(run("info", "--json", "--trust-remote-code", foreign).stdout)
    assert facts["parameters"] == tiny.llava().num_parameters()


# ---------------------------------------------------------------------------------------------- info


@pytest.mark.parametrize(
    "place", [["adapter"], ["model-with-adapter"], [".", "--subfolder", "adapter"]], ids=lambda place: place[-1]
)
def test_info_of_an_adapter(place):
    facts = json.loads(run("info", "--json", *place).stdout)
    assert facts["kind"] == "adapter"
    assert (facts["model_type"], facts["fusion"], facts["instruction_encoder"]) == ("llava", "modulation", "llm")
    assert facts["visual_grid"] == [2, 2]
    assert facts["parameters"] == patch_model(tiny.llava()).num_parameters()
    assert facts["checksum"] == "right"
    assert "2 x 2" in run("info", *place).stdout


@pytest.mark.parametrize("fusion", ["attention", "linear", "modulation"])
def test_info_of_a_model(fusion):
    facts = json.loads(run("info", "--json", MODEL_ID).stdout)
    assert facts["kind"] == "model"
    model = tiny.llava()
    assert facts["parameters"] == model.num_parameters()
    own = patch_model(model, EmmaConfig(fusion=fusion)).num_parameters()
    assert facts["adapters"][fusion] == {"parameters": own, "share": own / (own + facts["parameters"])}
    assert f"{own:,} parameters" in run("info", MODEL_ID).stdout


def test_info_reads_no_weights(tmp_path):
    model = tiny.llava()
    model.config.save_pretrained(tmp_path)
    assert json.loads(run("info", "--json", tmp_path).stdout)["parameters"] == model.num_parameters()


def test_info_tells_a_damaged_file(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    patch_model(tiny.llava()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    next(iter(tensors.values())).add_(1)
    save_file(tensors, path, metadata=metadata)
    assert "copy it again" in run("info", tmp_path).stdout


@pytest.mark.parametrize(
    ("target", "words"),
    [("nowhere/at-all", "hub"), ("images", "save_pretrained"), ("train.jsonl", "folder"), ("lora", "PEFT (LORA)")],
)
def test_info_of_something_else(target, words):
    assert words in refused("info", target)


def test_info_of_a_folder_that_is_not_in_it():
    assert "leads out" in refused("info", "adapter", "--subfolder", "../trained")
    assert "holds neither an adapter" in refused("info", "adapter", "--subfolder", "last-checkpoint")


def test_info_of_an_unsupported_model(tmp_path, clip_folder):
    CLIPTextModel.from_pretrained(clip_folder).save_pretrained(tmp_path)
    assert "vision-language" in refused("info", tmp_path)


# ---------------------------------------------------------------------------------------------- convert


def test_convert(tmp_path, clip_folder):
    tensors = stored(**SIZES)
    run("convert", write(tmp_path, tensors), tmp_path / "out", "--text-tower", clip_folder)

    model = AutoModelForImageTextToText.from_pretrained(MODEL_ID)
    processor = AutoProcessor.from_pretrained(MODEL_ID)
    adapter = load_adapter(model, tmp_path / "out", processor=processor, instruction_encoder=str(clip_folder))
    assert adapter.config.instruction_policy == "shortest_turn"
    seen = []
    adapter.alignment.register_forward_hook(lambda _, inputs, output: seen.append((*inputs[:2], output)))
    with torch.no_grad():
        model(**tiny.chat_inputs([[tiny.user("how many dogs?")], [tiny.user("what colour is the bird?")]]))
    [(visual_tokens, instruction_tokens, aligned)] = seen
    want = paper(tensors, "", visual_tokens, instruction_tokens)
    assert (want - visual_tokens).abs().max() > 0.1
    assert (aligned.double() - want).abs().max() <= 1e-5
    assert instruction_tokens.shape == (2, 16, 24)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"n": 9}, "9 visual tokens"), ({"d": 8}, "8 channels"), ({"t": 17}, "17 instruction"), ({"dt": 23}, "of 23")],
    ids=str,
)
def test_convert_for_other_sizes(tmp_path, clip_folder, change, words):
    source = write(tmp_path, stored(**{**SIZES, **change}))
    assert words in refused("convert", source, tmp_path / "out", "--text-tower", clip_folder)
    assert not (tmp_path / "out").exists()


def test_convert_for_another_family(tmp_path, clip_folder):
    config = tiny.llava().config
    config.model_type = "vipllava"
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "model_type": "vipllava"}))
    source = write(tmp_path, stored(**SIZES))
    line = refused("convert", source, tmp_path / "out", "--text-tower", clip_folder, "--model", tmp_path)
    assert "'vipllava'" in line


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", None])
def test_convert_of_something_else(tmp_path, content):
    source = tmp_path / "vision_tower.bin"
    if content is not None:
        source.write_bytes(content)
    assert str(source) in refused("convert", source, tmp_path / "out")


# ---------------------------------------------------------------------------------------------- diff


def test_diff_of_equal_adapters():
    assert run("diff", "trained", "model-with-adapter").stdout == ""


def test_diff_of_tensors():
    lines = run("diff", "adapter", "trained", code=1).stdout.splitlines()
    names = [name for name, _ in EmmaAlignment(patch_model(tiny.llava()).config).named_parameters()]
    assert [line.split(":")[0] for line in lines] == sorted(names)
    assert all("relative L2" in line and "cosine" in line for line in lines)


def test_diff_of_configs(tmp_path):
    patch_model(tiny.llava(), EmmaConfig(fusion="linear")).save_pretrained(tmp_path)
    output = run("diff", "adapter", tmp_path, code=1).stdout
    assert "fusion: 'modulation' -> 'linear'" in output
    assert "only in the second" in output


@pytest.mark.parametrize("other", ["images", "nowhere", "lora"])
def test_diff_with_something_else(other):
    refused("diff", "adapter", other)
