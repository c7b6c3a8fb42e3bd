"""Adapter folders whose files aren't files, are links to elsewhere, are huge, or are another tool's."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from emma_adapter import CheckpointError, get_adapter, load_adapter, patch_model
from emma_adapter.cli import main
from tests.fuzz.mutations import CONFIG, WEIGHTS, Folder
from tests.fuzz.victims import FUSIONS, Patched, fingerprint, logits, patched
from tests.support import ROOT, tiny


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("intact")
    get_adapter(patched()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(intact, tmp_path):
    return Path(shutil.copytree(intact, tmp_path / "adapter"))


@pytest.fixture(scope="module")
def victims():
    plain, trained = tiny.llava(), Patched()
    logits(plain)
    return {plain: fingerprint(plain), trained.model: trained.before}


def refused(victims, folder, match=None):
    for model, before in victims.items():
        with pytest.raises(CheckpointError, match=match) as caught:
            load_adapter(model, folder)
        assert fingerprint(model) == before
        assert len(str(caught.value)) < 2_000


# ---------------------------------------------------------------------------------------------- no files


def make_socket(path):
    # A socket's path has at most a hundred characters; pytest's are longer.
    before = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)


def make_sparse(path, size=2**36):
    with path.open("wb") as file:
        file.truncate(size)


NO_FILES = {
    "pipe": os.mkfifo,
    "socket": make_socket,
    "folder": Path.mkdir,
    "link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "link to /dev/full": lambda path: path.symlink_to("/dev/full"),
    "link to /dev/stdin": lambda path: path.symlink_to("/dev/stdin"),
    "link to /proc": lambda path: path.symlink_to("/proc/self/mem"),
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "sparse": make_sparse,
    "empty": Path.touch,
}


#: Only met in a process with limits: what goes wrong here waits in the kernel, or eats all memory.
DANGEROUS = ("pipe", "link to /dev/zero", "link to /dev/stdin", "link to /proc", "sparse")


def test_what_never_ends_is_refused_at_once(intact, tmp_path):
    folders = []
    for name in (CONFIG, WEIGHTS):
        for kind in DANGEROUS:
            folder = Path(shutil.copytree(intact, tmp_path / f"{kind} for {name}".replace("/", "")))
            (folder / name).unlink()
            NO_FILES[kind](folder / name)
            folders.append(folder)
    done = in_limits(
        """
from emma_adapter import CheckpointError
from emma_adapter.checkpoints import reading
for folder in folders:
    try:
        reading.read(folder)
    except CheckpointError as error:
        assert "adapter_config.json" in str(error) or "adapter_model.safetensors" in str(error)
        print(folder.name)
""",
        folders,
        stdin=subprocess.PIPE,  # a pipe that nobody writes to
    )
    assert done.stdout.splitlines() == [folder.name for folder in folders]


@pytest.mark.parametrize("kind", [kind for kind in NO_FILES if kind not in DANGEROUS])
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_what_is_no_file_is_refused(kind, name, folder, victims):
    (folder / name).unlink()
    NO_FILES[kind](folder / name)
    refused(victims, folder, match=name)


def in_limits(script, folders, **options):
    """Run a script in a process that may have 256 MB more than after a good load, and 120 seconds of a processor."""
    begin = """
import resource, sys
from pathlib import Path
import torch
from tests.support import tiny
from emma_adapter import load_adapter, unpatch_model
intact, *folders = map(Path, sys.argv[1:])
model = tiny.llava()
load_adapter(model, intact)
unpatch_model(model)
size = 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1])
resource.setrlimit(resource.RLIMIT_AS, (size + 2**28, size + 2**28))
resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
"""
    good = folders[0].parent / "good"
    get_adapter(patched()).save_pretrained(good)
    done = subprocess.run(
        [sys.executable, "-c", begin + script, *map(str, [good, *folders])],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        **options,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_file_that_may_not_be_read(folder, victims, monkeypatch):
    """Root may read anything: what the system says to others is made up."""

    def forbid(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", forbid)
    refused(victims, folder, match=r"adapter_config\.json can't be read.*Permission denied")


# ---------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("relative", [True, False], ids=["relative", "absolute"])
def test_links_out_of_the_folder_are_not_followed(name, relative, folder, intact, victims):
    """Also where the file they lead to is a good one."""
    (folder / name).unlink()
    target = intact / name
    (folder / name).symlink_to(os.path.relpath(target, folder) if relative else target)
    refused(victims, folder, match=f"{name} is a link out of .*Copy the file")


def test_a_way_out_of_the_folder_and_back_is_followed_and_one_over_a_linked_folder_is_not(folder, intact, victims):
    model = tiny.llava()
    (folder / "files").mkdir()
    (folder / CONFIG).rename(folder / "files" / "c")
    (folder / CONFIG).symlink_to(Path("..") / folder.name / "files" / "c")
    load_adapter(model, folder)
    (folder / "elsewhere").symlink_to(intact)
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to(Path("elsewhere") / CONFIG)
    refused(victims, folder, match="is a link out of")


def test_the_folder_itself_may_be_a_link(folder, tmp_path):
    (tmp_path / "latest").symlink_to(folder)
    load_adapter(tiny.llava(), tmp_path / "latest")


def in_cache(folder, blobs="blobs"):
    """The files as huggingface_hub stores them, and the folder that it gives."""
    repository = folder.parent / "hub" / "models--someone--adapter"
    snapshot = repository / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    (repository / blobs).mkdir()
    for number, name in enumerate((CONFIG, WEIGHTS)):
        shutil.copy(folder / name, repository / blobs / str(number))
        (snapshot / name).symlink_to(Path("..") / ".." / blobs / str(number))
    return snapshot


def test_snapshots_of_the_hubs_cache_lead_to_its_blobs(folder):
    load_adapter(tiny.llava(), in_cache(folder))


@pytest.mark.parametrize("lie", ["other folder", "blobs elsewhere", "other cache"])
def test_what_looks_like_the_hubs_cache_leads_to_its_own_blobs_only(lie, folder, victims):
    snapshot = in_cache(folder, blobs="stuff" if lie == "other folder" else "blobs")
    repository = snapshot.parent.parent
    if lie == "blobs elsewhere":
        (repository / "blobs").rename(folder.parent / "private")
        (repository / "blobs").symlink_to(folder.parent / "private")
    if lie == "other cache":
        repository.rename(repository.with_name("someone"))
        snapshot = repository.with_name("someone") / "snapshots" / snapshot.name
    refused(victims, snapshot, match="is a link out of")


@pytest.mark.parametrize("linked", ["emma_adapter", "emma_adapter/one"])
def test_adapters_beside_a_model_are_in_its_folder(linked, folder, tmp_path, victims):
    beside = tmp_path / "model" / linked
    beside.parent.mkdir(parents=True)
    beside.symlink_to(folder)
    refused(victims, tmp_path / "model")
    beside.unlink()
    shutil.copytree(folder, beside)
    load_adapter(tiny.llava(), tmp_path / "model")


def test_many_adapters_with_odd_names(folder, tmp_path, victims):
    names = ["..hidden", "a\nb", "\x1b[2J", "'", "x" * 200, *map(str, range(40))]
    for name in names:
        shutil.copytree(folder, tmp_path / "model" / "emma_adapter" / name)
    with pytest.raises(CheckpointError, match=r"holds the adapters .* and 40 more") as caught:
        load_adapter(tiny.llava(), tmp_path / "model")
    assert str(caught.value).isprintable()


# ---------------------------------------------------------------------------------------------- memory

HUGE = {
    "sparse weights of a good header": lambda folder: os.truncate(folder / WEIGHTS, 2**40),
    "sparse weights": lambda folder: make_sparse(folder / WEIGHTS, 2**40),
    "header of 2^62 bytes": lambda folder: edit_bytes(folder / WEIGHTS, lambda old: struct.pack("<Q", 2**62) + old[8:]),
    "header of all there is": lambda folder: make_header(folder / WEIGHTS, 2**34),
    "config of spaces": lambda folder: edit_bytes(folder / CONFIG, lambda old: old + b" " * 2**20),
    "config of lists": lambda folder: edit_bytes(folder / CONFIG, lambda _: b"[" + b"[]," * 2**20 + b"[]]"),
    "config that is sparse": lambda folder: os.truncate(folder / CONFIG, 2**40),
    **{
        f"{name} = {value}": lambda folder, name=name, value=value: edit_both(folder, **{name: value})
        for name in ("visual_dim", "instruction_dim", "num_visual_tokens", "max_instruction_tokens", "inner_dim")
        for value in (2**20, 2**31 - 1)
    },
    "rank": lambda folder: edit_both(folder, fusion="linear", num_visual_tokens=2**30, rank=2**30, visual_grid=None),
    "grid": lambda folder: edit_both(folder, num_visual_tokens=2**30, visual_grid=[2**15, 2**15]),
    "projector in a hole": lambda folder: make_projector(folder, 2**18),
}


def edit_bytes(path, change):
    path.write_bytes(change(path.read_bytes()))


def edit_both(folder, **changes):
    made = Folder.read(folder)
    made.description["config"].update(changes)
    for name, content in made.content().items():
        (folder / name).write_bytes(content)


def make_header(path, size):
    with path.open("wb") as file:
        file.write(struct.pack("<Q", size - 8))
        file.truncate(size)


def make_projector(folder, side):
    """A projector of 256 GB in a file of a few kB: all of it is a hole, and everything else is right."""
    made = Folder.read(folder)
    made.description["projector_trained"] = True
    header = made.make_header()
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    more = {"dtype": "F32", "shape": [side, side], "data_offsets": [end, end + 4 * side * side]}
    made.header = {**header, "projector.linear_1.weight": more}
    for name, content in made.content().items():
        (folder / name).write_bytes(content)
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size + 4 * side * side)


def test_no_load_allocates_more_than_the_file_justifies(intact, tmp_path):
    """And none asks the system for it in vain."""
    folders = [Path(shutil.copytree(intact, tmp_path / name)) for name in HUGE]
    for folder in folders:
        HUGE[folder.name](folder)
    done = in_limits(
        """
from emma_adapter import CheckpointError
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for folder in folders:
    try:
        load_adapter(model, folder)
    except CheckpointError as error:
        said = str(error)
        assert not any(words in said for words in ("not enough memory", "t allocate", "MemoryError")), said
        print(folder.name)
    else:
        # Only a length at which instructions are cut, and which needs no memory.
        assert folder.name.startswith("max_instruction_tokens")
        model(**tiny.token_inputs([1]))
        unpatch_model(model)
        print(folder.name)
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    assert more < 100, (folder, more)
""",
        folders,
    )
    assert done.stdout.splitlines() == list(HUGE)


def test_weights_do_not_change_with_the_file_they_were_loaded_from(folder):
    """As a view of the file would, or end the process where the file has become shorter."""
    model = tiny.llava()
    adapter = load_adapter(model, folder)
    before = {name: value.clone() for name, value in adapter.alignment.state_dict().items()}
    size = (folder / WEIGHTS).stat().st_size
    with (folder / WEIGHTS).open("r+b") as file:
        file.write(b"\xff" * size)
        file.flush()
        assert all(torch.equal(value, before[name]) for name, value in adapter.alignment.state_dict().items())
        file.truncate(0)
    assert all(torch.equal(value, before[name]) for name, value in adapter.alignment.state_dict().items())


# ---------------------------------------------------------------------------------------------- other tools


def lora(folder):
    get_peft_model(tiny.llava(), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)


def ip_adapter(folder):
    tensors = {"image_proj.proj.weight": torch.zeros(4, 4), "ip_adapter.1.to_k_ip.weight": torch.zeros(4, 4)}
    save_file(tensors, folder / "ip-adapter_sd15.safetensors")
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"_class_name": "IPAdapter", "_diffusers_version": "0.30"}))


def pickled(folder):
    torch.save({"alignment.fusion.bias": torch.zeros(4)}, folder / "adapter_model.bin")


def pickle_under_our_name(folder):
    get_adapter(patched()).save_pretrained(folder)
    torch.save({"alignment.fusion.bias": torch.zeros(4)}, folder / WEIGHTS)


OTHERS = {
    "LoRA": (lora, "an adapter of PEFT"),
    "IP-Adapter": (ip_adapter, "doesn't describe what adapter.save_pretrained writes"),
    "plain model": (lambda folder: tiny.llava().save_pretrained(folder), CONFIG),
    "pickle": (pickled, CONFIG),
    "pickle under our name": (pickle_under_our_name, "not a valid safetensors file"),
    "empty": (lambda folder: None, CONFIG),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_adapters_of_other_tools(kind, tmp_path, victims):
    make, match = OTHERS[kind]
    make(tmp_path)
    refused(victims, tmp_path, match=match)


# ---------------------------------------------------------------------------------------------- what is said


@pytest.mark.parametrize("name", ["base_model_name_or_path", "library_version", "model_type"])
@pytest.mark.parametrize("value", [3, ["x"], {"a": 1}, True, 1.5])
def test_facts_that_are_no_texts(name, value, folder, victims):
    made = Folder.read(folder)
    made.description[name] = value
    for file, content in made.content().items():
        (folder / file).write_bytes(content)
    refused(victims, folder, match=f"{name} should be a text")


ODD = "\x1b[2J\x1b]0;owned\x07\r\nError: all is well\u202e\ud800"


@pytest.mark.parametrize("name", ["base_model_name_or_path", "library_version", "model_type"])
@pytest.mark.parametrize("command", [["info"], ["info", "--json"], ["diff"]], ids=" ".join)
def test_nothing_in_a_file_reaches_the_terminal_as_it_is(name, command, folder, intact):
    made = Folder.read(folder)
    made.description[name] = ODD
    for file, content in made.content().items():
        (folder / file).write_bytes(content)
    result = CliRunner().invoke(main, [*command, *([str(intact)] if command == ["diff"] else []), str(folder)])
    assert result.exit_code in (0, 1)
    assert "owned" in result.stdout or (command, name) == (["diff"], "library_version")
    assert all(letter.isprintable() or letter == "\n" for letter in result.output)
    assert "\nError" not in result.output


@pytest.mark.parametrize("command", ["info", "diff"])
@pytest.mark.parametrize("damage", ["config", "weights", "pipe", "link", "huge text"])
def test_commands_end_in_one_line(command, damage, folder, intact):
    if damage == "config":
        (folder / CONFIG).write_bytes(b'{"format": "emma_adapter", "format_version": "\x1b[2J"}')
    elif damage == "weights":
        os.truncate(folder / WEIGHTS, 100)
    elif damage == "pipe":
        (folder / WEIGHTS).unlink()
        os.mkfifo(folder / WEIGHTS)
    elif damage == "link":
        (folder / WEIGHTS).unlink()
        (folder / WEIGHTS).symlink_to(intact / WEIGHTS)
    else:
        edit_both(folder, instruction_policy="\x07" * 500_000)
    result = CliRunner().invoke(main, [command, *([str(intact)] if command == "diff" else []), str(folder)])
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert result.stderr.rstrip("\n").isprintable()
    assert len(result.stderr) < 2_000


def test_position_blind_adapter_into_a_model_of_fixed_size(folder, victims):
    """It would get learned positions there, of which the file has none: they would be random."""
    made = Folder.read(folder)
    made.description["config"].update(num_visual_tokens=None, visual_grid=None)
    made.tensors = {name: tensor for name, tensor in made.tensors.items() if not name.endswith("position")}
    made.sign()
    for file, content in made.content().items():
        (folder / file).write_bytes(content)
    refused(victims, folder, match="its own number of visual tokens")


def test_what_may_be_saved_can_be_loaded(tmp_path):
    """The limits of a config are those that its file is read with."""
    options = {"deep": [], "long": "x" * 500_000}
    for _ in range(60):
        options["deep"] = [options["deep"]]
    config = FUSIONS["attention"].replace(fusion_options=options)
    patch_model(tiny.llava(), config).save_pretrained(tmp_path)
    assert load_adapter(tiny.llava(), tmp_path).config.fusion_options == options
