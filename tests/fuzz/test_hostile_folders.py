"""Adapter folders that are damaged or made up, in the full tier more than ten thousand.

Each is refused with an error of this library, or loaded as it is; the model is otherwise left alone.
"""

from __future__ import annotations

import json
import resource
import signal
import warnings
from contextlib import contextmanager

import pytest
import torch
from safetensors import safe_open

from emma_adapter import EmmaError, get_adapter, load_adapter, unpatch_model
from tests.fuzz import mutations
from tests.fuzz.mutations import CONFIG, WEIGHTS
from tests.fuzz.victims import FUSIONS, Patched, fingerprint, logits, patched, same_values
from tests.support import tiny
from tests.support.budget import SEED, budget

CHUNKS, FOLDERS_IN_ONE = budget((2, 200), (24, 430))  # 400, and 10,320
LOOKED_AT_EVERY = 5
#: Of a load. Generous: a machine may be slow, but nothing here is waited for.
_SECONDS = 60
#: Of messages: they are for people, whatever was in the file.
_MAX_MESSAGE = 4_000
_MAX_MEMORY = 400  # MB


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Good adapters of several kinds, to be mutated."""
    made = []
    for number, (fusion, projector, dtype) in enumerate(
        [
            ("attention", False, torch.float32),
            ("attention", False, torch.float32),
            ("linear", False, torch.float32),
            ("modulation", False, torch.bfloat16),
            ("attention", True, torch.float32),
        ]
    ):
        folder = tmp_path_factory.mktemp("original")
        model = patched(FUSIONS[fusion], seed=number, projector=projector).to(dtype)
        get_adapter(model).save_pretrained(folder)
        made.append(mutations.Folder.read(folder))
        files = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
        assert json.loads(made[-1].content()[CONFIG]) == json.loads(files[CONFIG])
    return made


@contextmanager
def time_limit(seconds):
    def stop(*_):
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def load(model, folder):
    """The adapter, or None if the folder was refused as it should be."""
    try:
        with time_limit(_SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load_adapter(model, folder)
    except EmmaError as error:
        refusal = str(error)
    assert len(refusal) <= _MAX_MESSAGE
    assert refusal.isprintable()
    return None


def check_loaded(adapter, folder):
    """Against the files as safetensors and json read them."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        embedded = json.loads(file.metadata()["emma_adapter"])
    written = json.loads((folder / CONFIG).read_bytes())
    if written.get("sha256") != embedded.get("sha256"):
        written = embedded
    found = {f"alignment.{name}": value for name, value in adapter.alignment.state_dict().items()}
    own = adapter.projector
    for name, value in ({} if own is None else own.state_dict()).items():
        if (key := f"projector.{name}") in tensors:
            found[key] = value
            # The adapter comes in the dtype that it was saved in, a projector in the model's.
            tensors[key] = tensors[key].to(value.dtype)
    assert same_values(found, tensors)
    assert all(value.float().isfinite().all() for value in found.values())
    config = adapter.config.to_dict()
    # Sizes that are left out are the model's; what computes it, and the cache, are what a patched model was told.
    told = {name: value for name, value in written["config"].items() if value is not None} | {
        name: config[name] for name in ("kernel", "cache_size")
    }
    assert {name: config[name] for name in told} == told


def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_mutated_folders(chunk, originals, tmp_path):
    plain, trained = tiny.llava(), Patched()
    logits(plain)  # transformers adds attributes at the first call
    untouched = fingerprint(plain)
    load(plain, tmp_path)  # imports what it needs
    memory, loaded = peak_memory(), 0
    for number in range(FOLDERS_IN_ONE):
        kind, files = mutations.mutated(originals[number % len(originals)], f"{SEED} {chunk} {number}")
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        for model in (plain, trained.model):
            adapter = load(model, tmp_path)
            if adapter is not None:
                loaded += 1
                check_loaded(adapter, tmp_path)
                if model is plain:
                    unpatch_model(model)
                else:
                    trained.put_back()
        # A change stays until it is looked for.
        if number % LOOKED_AT_EVERY == LOOKED_AT_EVERY - 1:
            where = f"seeds '{SEED} {chunk} {number - LOOKED_AT_EVERY + 1}' to '… {number}', at last {kind}"
            assert fingerprint(plain) == untouched, where
            assert fingerprint(trained.model) == trained.before, where
    assert peak_memory() - memory < _MAX_MEMORY
    assert 0 < loaded < FOLDERS_IN_ONE, "both were met"
