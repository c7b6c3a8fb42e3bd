"""The authors' checkpoint, ``vision_tower.bin``: a format that can hold code. None of it runs, and a file is not taken
for more than it is."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections import Counter, OrderedDict

import pytest
import torch
from click.testing import CliRunner

from emma_adapter import CheckpointError, EmmaAlignment
from emma_adapter.cli import main
from tests.alignment.test_official_weights import SMALL, stored, write

NAMES = ["text_projection.weight", "text_projection.bias", "image_text_infusion.weight", "image_text_infusion.bias"]
both_containers = pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])


def refused(path, match=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CheckpointError, match=match) as caught:
            EmmaAlignment.from_official(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 2_000


# ---------------------------------------------------------------------------------------------- code


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class State:
    """Calls a function when its state is set."""

    def __init__(self, canary):
        self.canary = canary

    def __setstate__(self, state):
        os.mkdir(state["canary"])


class Subclass(torch.Tensor):
    """A tensor of a class of one's own."""


PAYLOADS = {
    "os.system": lambda canary: Call(os.system, f"mkdir {canary}"),
    "os.mkdir": lambda canary: Call(os.mkdir, str(canary)),
    "eval": lambda canary: Call(eval, f"__import__('os').mkdir({str(canary)!r})"),
    "getattr": lambda canary: Call(getattr, Call(__import__, "os"), "getcwd"),
    "subprocess": lambda canary: Call(subprocess.call, ["mkdir", str(canary)]),
    "__setstate__": lambda canary: State(str(canary)),
    "torch.load": lambda canary: Call(torch.load, str(canary)),
    "torch.hub": lambda canary: Call(torch.hub.load, str(canary), "model", "local"),
    "module": lambda canary: torch.nn.Linear(2, 2),
    "subclass": lambda canary: torch.zeros(2).as_subclass(Subclass),
    "bytearray": lambda canary: Call(bytearray, 2**40),
    "counter": lambda canary: Counter("aab"),
    "set": lambda canary: {1, 2},
    "device": lambda canary: torch.device("cpu"),
}
PLACES = {
    "value": lambda tensors, payload: {**tensors, "more": payload},
    "nested": lambda tensors, payload: {**tensors, "more": {"a": [1, (payload,)]}},
    "weight": lambda tensors, payload: {**tensors, NAMES[0]: payload},
    "whole": lambda tensors, payload: payload,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", PAYLOADS)
@both_containers
def test_nothing_is_called(name, place, as_zip, tmp_path):
    canary = tmp_path / "canary"
    content = PLACES[place](stored(**SMALL), PAYLOADS[name](canary))
    refused(write(tmp_path, content, as_zip=as_zip))
    assert not canary.exists()


def test_the_canary_sings(tmp_path):
    """Else the test above could not fail."""
    for name in ("os.system", "os.mkdir", "eval", "subprocess", "__setstate__"):
        path = write(tmp_path, {"more": PAYLOADS[name](tmp_path / name)})
        torch.load(path, weights_only=False)
        assert (tmp_path / name).exists(), name


def test_payloads_in_every_pickle_of_the_older_format(tmp_path):
    """It holds five, one after the other."""
    whole = write(tmp_path, stored(**SMALL), as_zip=False).read_bytes()
    stream, ends = io.BytesIO(whole), [0]
    for _ in range(5):
        pickle.Unpickler(stream)
        list(pickle_operations(stream))
        ends.append(stream.tell())
    for number in range(5):
        canary = tmp_path / f"canary {number}"
        payload = pickle.dumps(Call(os.mkdir, str(canary)), protocol=2)
        path = tmp_path / "vision_tower.bin"
        path.write_bytes(whole[: ends[number]] + payload + whole[ends[number + 1] :])
        refused(path)
        assert not canary.exists()


def pickle_operations(stream):
    import pickletools

    return pickletools.genops(stream)


def test_archives_of_other_kinds(tmp_path):
    canary = tmp_path / "canary"
    payload = pickle.dumps(Call(os.mkdir, str(canary)), protocol=2)
    path = tmp_path / "vision_tower.bin"
    for compression in ("w", "w:gz"):
        # PyTorch's oldest format.
        with tarfile.open(path, compression) as archive:
            for name in ("sys_info", "pickle", "storages", "tensors", "../../escaped"):
                entry = tarfile.TarInfo(name)
                entry.size = len(payload)
                archive.addfile(entry, io.BytesIO(payload))
        refused(path)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    refused(path)
    path.write_bytes(payload)
    refused(path)
    assert not canary.exists()
    assert not list(tmp_path.parent.rglob("escaped"))


# ---------------------------------------------------------------------------------------------- archives


def repack(path, change, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path) as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    parts = change(parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, content in parts.items() if isinstance(parts, dict) else parts:
                archive.writestr(name, content)


def test_a_bomb_of_zeros(tmp_path):
    path = write(tmp_path, stored(**SMALL))
    repack(path, lambda parts: {**parts, "archive/data/0": b"\0" * 2**26}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**18
    refused(path, match="compressed")


def test_two_pickles(tmp_path):
    """Of which one reader might take the first, and another the last."""
    canary = tmp_path / "canary"
    payload = pickle.dumps(Call(os.mkdir, str(canary)), protocol=2)
    path = write(tmp_path, stored(**SMALL))
    whole = path.read_bytes()
    for name in ("data.pkl", "DATA.PKL", "../data.pkl", "constants.pkl"):
        path.write_bytes(whole)
        with zipfile.ZipFile(path) as archive:
            top = archive.namelist()[0].split("/")[0]
        repack(path, lambda parts, name=f"{top}/{name}": [(name, payload), *parts.items()])
        refused(path, match="2 pickles")
    assert not canary.exists()


def test_names_that_lead_elsewhere(tmp_path):
    path = write(tmp_path, stored(**SMALL))
    repack(path, lambda parts: {**parts, "../../escaped": b"x", str(tmp_path / "escaped"): b"x"})
    with contextlib.suppress(CheckpointError):
        EmmaAlignment.from_official(path)
    assert not list(tmp_path.parent.rglob("escaped"))


# ---------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("name", NAMES)
@both_containers
def test_few_bytes_that_stand_for_many(name, as_zip, tmp_path):
    """A tensor of strides 0: PyTorch stores its one number."""
    n, t, d, dt = 2**20, 2**20, 2**20, 2**20
    shape = {"text_projection.weight": (d, dt), "image_text_infusion.weight": (n, n + t)}.get(name, (d,))
    tensors = {**stored(**SMALL), name: torch.zeros(1).expand(shape)}
    path = write(tmp_path, tensors, as_zip=as_zip)
    assert path.stat().st_size < 10_000
    refused(path, match="more than is in the file")


def hashing_bomb(levels):
    """A dict with one key: a tuple of twice the same tuple of twice the same tuple ..."""
    key = b")q\0" + b"".join(b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(levels))
    return b"\x80\x02}" + key + b"Ns."


def deep_key(levels):
    return b"\x80\x02})" + b"\x85" * levels + b"Ns."


def test_keys_that_take_for_ever_to_hash(tmp_path):
    """Or that overflow the stack of the interpreter, which ends the process: hence in one of its own."""
    whole = write(tmp_path, stored(**SMALL), as_zip=False).read_bytes()
    # The first two pickles of the older format are numbers, the third says what machine wrote it.
    begin = whole.index(b"\x80\x02}", 1)
    paths = []
    for number, bomb in enumerate((hashing_bomb(200), deep_key(1_000_000))):
        for as_zip in (True, False):
            paths.append(write(tmp_path, stored(**SMALL), as_zip=as_zip).rename(tmp_path / f"{number} {as_zip}.bin"))
            if as_zip:
                repack(paths[-1], lambda parts, b=bomb: {n: b if n.endswith(".pkl") else x for n, x in parts.items()})
            else:
                paths[-1].write_bytes(whole[:begin] + bomb + whole[begin:])
    script = """
import sys
from emma_adapter import CheckpointError, EmmaAlignment
for path in sys.argv[1:]:
    try:
        EmmaAlignment.from_official(path)
    except CheckpointError as error:
        assert "tuple" in str(error), error
        print(path, flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, paths)], capture_output=True, text=True, check=False, timeout=180
    )
    assert done.stdout.splitlines() == list(map(str, paths)), (done.returncode, done.stderr)


def test_a_pickle_that_never_ends(tmp_path):
    path = tmp_path / "vision_tower.bin"
    path.write_bytes(b"\x80\x02" + b"]" * 2**21)
    refused(path, match="more than")


@pytest.mark.parametrize("kind", ["claim", "zip storage"])
def test_storages_that_are_longer_than_the_file(kind, tmp_path):
    """The pickle says how long a storage is."""
    path = write(tmp_path, stored(**SMALL), as_zip=kind == "zip storage")
    whole = path.read_bytes()
    # The number of elements of [D, Dt], 48, as the one-byte integer at the end of the persistent id.
    end = b"tq" if kind == "zip storage" else b"Ntq"
    assert whole.count(b"K\x30" + end) == 1
    path.write_bytes(whole.replace(b"K\x30" + end, b"K\xff" + end))
    refused(path)


@pytest.mark.parametrize(
    "kind", ["sparse", "csr", "quantized", "meta", "nested", "complex", "float8", "subclass", "conjugate"]
)
@both_containers
def test_tensors_of_other_kinds(kind, as_zip, tmp_path):
    weight = stored(**SMALL)[NAMES[0]]
    made = {
        "sparse": weight.to_sparse,
        "csr": weight.to_sparse_csr,
        "quantized": lambda: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
        "meta": lambda: weight.to("meta"),
        "nested": lambda: torch.nested.nested_tensor([weight, weight]),
        "complex": lambda: weight.to(torch.complex64),
        "float8": lambda: weight.to(torch.float8_e4m3fn),
        "subclass": lambda: weight.as_subclass(Subclass),
        "conjugate": lambda: weight.to(torch.complex64).conj(),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            path = write(tmp_path, {**stored(**SMALL), NAMES[0]: made[kind]()}, as_zip=as_zip)
        except (RuntimeError, NotImplementedError):
            assert not as_zip, "the older format has none of these"
            return
    refused(path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_values_that_are_not_finite(name, value, tmp_path):
    tensors = stored(**SMALL, dtype=torch.float64)
    tensors[name][(0,) * tensors[name].ndim] = value
    refused(write(tmp_path, tensors), match="NaN, infinite or too large")


# ---------------------------------------------------------------------------------------------- files


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe", "zero", "loop"):
        refused(tmp_path / name)


def test_a_link_to_a_checkpoint_is_one(tmp_path):
    """Whoever gives the path has named it: links lead where they lead."""
    path = write(tmp_path, stored(**SMALL))
    (tmp_path / "link").symlink_to(path)
    EmmaAlignment.from_official(tmp_path / "link")


@pytest.mark.parametrize("prefix", ["", "model.vision_tower."])
@both_containers
@pytest.mark.parametrize("wrapped", [OrderedDict, dict])
@pytest.mark.parametrize("parameters", [True, False])
def test_what_torch_saves_is_read(prefix, as_zip, wrapped, parameters, tmp_path):
    """Every form that a state dict has, with numbers and lists beside the tensors."""
    tensors = wrapped(stored(**SMALL, prefix=prefix))
    if parameters:
        tensors = wrapped(
            (name, torch.nn.Parameter(value) if value.is_floating_point() else value) for name, value in tensors.items()
        )
    tensors.update(step=3, rate=1e-3, names=["a", ("b", None)], flag=True, large=2**40)
    if wrapped is OrderedDict:
        tensors._metadata = OrderedDict({"": {"version": 1}})
    shared = tensors[f"{prefix}text_projection.weight"]
    tensors["view"] = shared.detach()[:2]
    expected = EmmaAlignment.from_official(write(tmp_path, stored(**SMALL))).state_dict()
    torch.manual_seed(0)
    found = EmmaAlignment.from_official(write(tmp_path, tensors, as_zip=as_zip)).state_dict()
    assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in expected.items()}
    assert torch.equal(found["fusion.instruction_projection.weight"], shared)


@both_containers
def test_damaged_files(as_zip, tmp_path):
    """Flipped, cut, and put together anew; what is read has the values that are in the file."""
    path = write(tmp_path, stored(n=2, t=1, d=2, dt=2), as_zip=as_zip)
    whole, dice, read = path.read_bytes(), random.Random(0), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(700):
            content = bytearray(whole)
            for _ in range(dice.choice([1, 1, 2, 5])):
                at = dice.randrange(len(content))
                kind = dice.randrange(4)
                if kind == 0:
                    content[at] ^= 1 << dice.randrange(8)
                elif kind == 1:
                    content[at : at + 4] = struct.pack("<I", dice.choice([0, 1, 2**16, 2**31 - 1, 2**32 - 1]))
                elif kind == 2:
                    content = content[:at] + content[at + dice.randrange(1, 9) :]
                else:
                    content[at:at] = dice.randbytes(dice.randrange(1, 5))
            path.write_bytes(content)
            try:
                alignment = EmmaAlignment.from_official(path)
            except CheckpointError as error:
                refusal = str(error)
                assert len(refusal) < 2_000
                continue
            read += 1
            assert all(value.isfinite().all() and value.numel() < 100 for value in alignment.state_dict().values())
    assert 0 < read < 600


@pytest.mark.parametrize("damage", ["payload", "pipe", "cut", "text"])
def test_convert_ends_in_one_line(damage, tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "vision_tower.bin"
    if damage == "payload":
        write(tmp_path, {**stored(**SMALL), "more": Call(os.mkdir, str(canary))})
    elif damage == "pipe":
        os.mkfifo(path)
    elif damage == "cut":
        path.write_bytes(write(tmp_path, stored(**SMALL)).read_bytes()[:-100])
    else:
        path.write_bytes(b"\x1b[2J" * 100_000)
    result = CliRunner().invoke(main, ["convert", str(path), str(tmp_path / "out")])
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert result.stderr.rstrip("\n").isprintable()
    assert len(result.stderr) < 2_000
    assert not canary.exists()
    assert not (tmp_path / "out").exists()
