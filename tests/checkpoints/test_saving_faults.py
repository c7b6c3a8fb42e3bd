"""Saves that are killed, run out of disk, may not write, or are not alone: the previous adapter or the new one is there
whole, and the next save cleans up."""

from __future__ import annotations

import ctypes
import errno
import itertools
import json
import multiprocessing
import os
import platform
import random
import resource
import shutil
import signal
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import huggingface_hub
import peft
import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from safetensors import safe_open

from emma_adapter import CheckpointError, get_adapter, load_adapter
from emma_adapter.checkpoints import reading, writing
from emma_adapter.checkpoints.format import ALIGNMENT_PREFIX, FORMAT, PROJECTOR_PREFIX
from emma_adapter.files import atomic, description
from emma_adapter.modules import private
from tests.checkpoints.test_checkpoint import CARD, CONFIG, FUSIONS, WEIGHTS, base_model, logits, same_values, trained
from tests.support import tiny
from tests.support.budget import SEED, budget

OLD, NEW = FUSIONS["attention"], FUSIONS["modulation"]
TRAINER = "model.safetensors"
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """OpenMP's threads don't survive a fork, nor do progress bars'."""
    before, bars = torch.get_num_threads(), transformers.utils.logging.is_progress_bar_enabled()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    yield
    torch.set_num_threads(before)
    if bars:
        transformers.utils.logging.enable_progress_bar()


@pytest.fixture
def old_and_new():
    """They differ in everything: config, kind and size of the weights, and whether the projector was trained."""
    return trained(OLD, seed=1), trained(NEW, seed=2, projector=True)


def values_of(model, adapter=None):
    """Config and tensors of an adapter, as :func:`found_in` finds them where it was saved whole."""
    adapter = adapter or get_adapter(model).active
    base = get_adapter(model).model
    own = {name: value.detach() for name, value in writing._own_tensors(base, adapter).items()}
    return base._emma.adapters[adapter].config, own


def found_in(folder):
    read = reading.read(folder)
    assert read.intact
    tensors = {ALIGNMENT_PREFIX + name: value for name, value in read.alignment.items()}
    return read.config, tensors | {PROJECTOR_PREFIX + name: value for name, value in read.projector.items()}


def which(folder, *candidates):
    """The number of the candidate, of :func:`values_of`, that is wholly in the folder."""
    config, tensors = found_in(folder)
    for number, (own_config, own_tensors) in enumerate(candidates):
        if config == own_config and same_values(tensors, own_tensors):
            return number
    return pytest.fail(f"a mixture was read: {config}")


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def checksum(folder):
    return json.loads((folder / CONFIG).read_text())["sha256"]


def embedded_checksum(folder):
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return json.loads(file.metadata()[FORMAT.name])["sha256"]


def scratch_of(folder):
    return list(folder.rglob(".emma-save-*"))


def started(task):
    process = FORK.Process(target=task, daemon=True)
    process.start()
    return process


def in_fork(task):
    """Run ``task`` in a child; its exit code, or minus the signal that ended it."""
    process = started(task)
    process.join(120)
    assert process.exitcode is not None, "the child hangs"
    return process.exitcode


# ---------------------------------------------------------------------------------------------- ways to save


def by_adapter(model, folder):
    get_adapter(model).save_pretrained(folder)


def by_model(model, folder):
    model.save_pretrained(folder)


def by_trainer(model, folder):
    """As ``Trainer`` does after ``train_only()``."""
    get_adapter(model).train_only(projector=get_adapter(model).projector is not None)
    with patch.object(private, "running_trainer", object):
        model.save_pretrained(folder, state_dict=model.state_dict())


def by_peft(model, folder):
    if not hasattr(model, "peft_model"):
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
        model.__dict__["peft_model"] = wrapped
    model.__dict__["peft_model"].save_pretrained(folder)


#: And where the adapter lies then.
WAYS = {by_adapter: ".", by_model: "emma_adapter", by_trainer: ".", by_peft: "emma_adapter/default"}
each_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


# ---------------------------------------------------------------------------------------------- killed

#: Calls of Python into the operating system that change files, or that others wait for.
CHANGING = frozenset(
    {"open", "write", "flush", "fsync", "close", "mkdir", "chmod", "replace", "unlink", "rmdir", "flock"}
)


class Killer:
    """Counts such calls, whoever makes them, while files are replaced; kills the process before one of them."""

    def __init__(self, number: int | None = None):
        self.number, self.count = number, 0

    def __call__(self, frame, event, called):
        if event != "c_call" or called.__name__ not in CHANGING:
            return
        owner = type(getattr(called, "__self__", None)).__module__
        if called.__module__ in ("posix", "fcntl", "_io") or owner == "_io":
            if self.count == self.number:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1

    def watch(self, task: Callable[[], object]) -> None:
        """Run ``task``, and count whenever it replaces files."""
        replace_files = writing.replace_files

        def watched(*args):
            sys.setprofile(self)
            try:
                replace_files(*args)
            finally:
                sys.setprofile(None)

        writing.replace_files = watched
        try:
            task()
        finally:
            writing.replace_files = replace_files


def killed_at(number: int, task: Callable[[], object]) -> bool:
    """Whether ``task``, killed before its call of that number, had so many."""
    code = in_fork(lambda: Killer(number).watch(task))
    assert code in (0, -signal.SIGKILL)
    return code != 0


#: A kill may come before each change of a file; of slower saves fewer of them are taken.
KILLED_AT_EVERY = {by_adapter: budget(3, 1), by_model: budget(8, 4), by_trainer: budget(5, 2), by_peft: budget(8, 4)}


@pytest.mark.slow
@pytest.mark.parametrize(("way", "step"), KILLED_AT_EVERY.items())
def test_killed_before_each_change_of_a_file(way, step, old_and_new, tmp_path):
    old, new = old_and_new
    way(old, tmp_path / "old")
    way(new, tmp_path / "new")
    both, found = (values_of(old), values_of(new)), []
    for number in itertools.count(step=step):
        folder = Path(shutil.copytree(tmp_path / "old", tmp_path / "folder"))
        adapter = folder / WAYS[way]
        killed = killed_at(number, lambda folder=folder: way(new, folder))
        found.append(which(adapter, *both))
        if way is by_trainer:
            trained_tensors = [safetensors.torch.load_file(f / TRAINER) for f in (tmp_path / "old", tmp_path / "new")]
            assert any(same_values(safetensors.torch.load_file(folder / TRAINER), one) for one in trained_tensors)
        if not killed:
            break
        way(old, folder)
        assert which(adapter, *both) == 0
        assert not scratch_of(folder), "leftovers are cleaned at the next save"
        assert set(contents(folder)) == set(contents(tmp_path / "old"))
        shutil.rmtree(folder)
    assert len(found) * step > 25, "a save makes so many calls"
    # The previous adapter, and from one moment on the new one.
    assert found == sorted(found)
    assert 1 < sum(found) < len(found) - 1


def test_killed_during_the_first_save(old_and_new, tmp_path):
    """Nothing was there before: there is no adapter, or the new one."""
    new = old_and_new[1]
    there = []
    for number in itertools.count(step=2):
        folder = tmp_path / str(number) / "parent" / "adapter"
        killed = killed_at(number, lambda folder=folder: by_adapter(new, folder))
        try:
            there.append(which(folder, values_of(new)) == 0)
        except CheckpointError:
            there.append(False)
        if not killed:
            break
    assert there == sorted(there)
    assert {False, True} == set(there)


@pytest.mark.parametrize("number", range(1, 70, budget(14, 7)))
def test_killed_while_several_adapters_are_saved(number, tmp_path):
    """Each of them is the previous or the new one."""
    models = []
    for seeds in ((1, 2), (3, 4)):
        model = trained(OLD, seed=seeds[0])
        get_adapter(model).add("other", NEW).set_active("other")
        tiny.train_randomly(get_adapter(model).alignment, seed=seeds[1])
        get_adapter(model).set_active("default")
        models.append(model)
    models[0].save_pretrained(tmp_path)
    killed_at(number, lambda: models[1].save_pretrained(tmp_path))
    found = [
        which(tmp_path / "emma_adapter" / folder, *[values_of(model, name) for model in models])
        for name, folder in (("default", "."), ("other", "other"))
    ]
    assert found in ([0, 0], [1, 0], [1, 1])
    models[0].save_pretrained(tmp_path)
    assert not scratch_of(tmp_path)


@pytest.mark.parametrize("size", [0, 1, 1000, 4096, 8192, 12288])
def test_killed_in_the_middle_of_a_write(size, old_and_new, tmp_path):
    """By the kernel, when a file has grown to so many bytes."""
    old, new = old_and_new
    by_adapter(old, tmp_path)

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        by_adapter(new, tmp_path)

    assert in_fork(limited) == -signal.SIGXFSZ
    assert which(tmp_path, values_of(old), values_of(new)) == 0
    [scratch] = scratch_of(tmp_path)
    assert [path.stat().st_size for path in scratch.iterdir()] == [size]
    by_adapter(old, tmp_path)
    assert sorted(contents(tmp_path)) == sorted([CONFIG, WEIGHTS, CARD])
    assert not scratch_of(tmp_path)


def test_killed_at_random_moments(old_and_new, tmp_path):
    models = old_and_new
    candidates = [values_of(model) for model in models]
    dice = random.Random(SEED)
    by_adapter(models[0], tmp_path)
    found = set()
    for number in itertools.count():
        if number >= budget(4, 8) and len(found) == 2:  # both were met, so that a mixture could have been
            break
        assert number < 100
        begun = FORK.Event()

        def save_forever(begun=begun):
            for model in itertools.cycle(reversed(models)):
                by_adapter(model, tmp_path)
                begun.set()

        process = started(save_forever)
        assert begun.wait(60)
        time.sleep(dice.uniform(0, 0.3))
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        found.add(which(tmp_path, *candidates))
        model = base_model()
        load_adapter(model, tmp_path)
        assert torch.equal(logits(model), logits(models[which(tmp_path, *candidates)]))
    by_adapter(models[0], tmp_path)
    assert not scratch_of(tmp_path)


class Saves(RuleBasedStateMachine):
    """Any sequence of saves that end, are killed or run out of disk, and of edits by the user."""

    models: tuple[torch.nn.Module, ...] = ()

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        #: Number of the model whose adapter is there, and what ``cache_size`` was edited to.
        self.there: int | None = None
        self.cache_size = OLD.cache_size
        self.edits: set[int] = set()

    def teardown(self):
        shutil.rmtree(self.folder)

    @rule(number=st.integers(0, 3))
    def save(self, number):
        by_adapter(self.models[number], self.folder)
        self.there, self.cache_size = number, OLD.cache_size
        assert not scratch_of(self.folder)
        assert checksum(self.folder) == embedded_checksum(self.folder)

    @rule(number=st.integers(0, 3), call=st.integers(0, 50))
    def save_and_be_killed(self, number, call):
        before = contents(self.folder).get(WEIGHTS)
        killed = killed_at(call, lambda: by_adapter(self.models[number], self.folder))
        after = contents(self.folder)
        if not killed:
            assert checksum(self.folder) == embedded_checksum(self.folder)
        if after.get(WEIGHTS) != before or not killed:
            self.there = number
        if not {CONFIG, WEIGHTS} <= set(after):
            self.there = None
        elif checksum(self.folder) == embedded_checksum(self.folder):
            # Saved whole; or the config file is of an earlier save of the same values, edits included.
            self.there = number if after[WEIGHTS] != before or self.there is None else self.there
            self.cache_size = json.loads(after[CONFIG])["config"]["cache_size"]
            assert self.cache_size in {OLD.cache_size, *self.edits}
        else:
            self.cache_size = OLD.cache_size

    @rule(number=st.integers(0, 3), size=st.integers(0, 2000))
    def save_without_room(self, number, size):
        before = contents(self.folder)
        with_limit(size, lambda: by_adapter(self.models[number], self.folder))
        after = contents(self.folder)
        assert {name: after.get(name) for name in before if ".emma-save" not in name} == {
            name: content for name, content in before.items() if ".emma-save" not in name
        }
        assert not scratch_of(self.folder), "those of earlier saves too"

    @precondition(lambda self: self.there is not None)
    @rule(cache_size=st.integers(1, 9))
    def edit(self, cache_size):
        described = json.loads((self.folder / CONFIG).read_text())
        described["config"]["cache_size"] = cache_size
        self.edits.add(cache_size)
        (self.folder / CONFIG).write_text(json.dumps(described))
        if described["sha256"] == embedded_checksum(self.folder):
            self.cache_size = cache_size

    @invariant()
    def is_whole(self):
        if self.there is None:
            with pytest.raises(CheckpointError):
                reading.read(self.folder)
        else:
            config, tensors = values_of(self.models[self.there])
            assert which(self.folder, (config.replace(cache_size=self.cache_size), tensors)) == 0


@pytest.mark.slow
def test_any_sequence_of_saves(old_and_new):
    Saves.models = (*old_and_new, trained(OLD, seed=3, projector=True), trained(FUSIONS["linear"], seed=4))
    Saves.TestCase.settings = settings(max_examples=budget(4, 12), stateful_step_count=budget(8, 10))
    Saves.TestCase("runTest").debug()


# ---------------------------------------------------------------------------------------------- no room, no permission


def with_limit(size, save):
    """Run ``save`` in a child whose files may not grow over ``size`` bytes, and which has to say so."""

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        with pytest.raises(OSError, match="nothing is half written") as caught:
            save()
        assert caught.value.errno == errno.EFBIG

    assert in_fork(limited) == 0


@pytest.mark.parametrize("size", [0, 1, 1000, 4096, 8192, 12288])
@each_way
def test_no_room_for_a_file(way, size, old_and_new, tmp_path):
    old, new = old_and_new
    way(old, tmp_path)
    if way in (by_model, by_peft):  # what transformers and PEFT write themselves is not the question here
        files = contents(tmp_path / WAYS[way])
        with_limit(size, lambda: writing.save_all(get_adapter(new).model, tmp_path / WAYS[way]))
        assert contents(tmp_path / WAYS[way]) == files
    else:
        files = contents(tmp_path)
        with_limit(size, lambda: way(new, tmp_path))
        assert contents(tmp_path) == files
    assert not scratch_of(tmp_path)


_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000
_READ_ONLY, _REMOUNT, _PRIVATE = 1, 32, 0x4000 | 1 << 18
_NOT_PERMITTED = 77


def call_libc(name, *args):
    if getattr(_LIBC, name)(*args) != 0:
        raise OSError(ctypes.get_errno(), name)


def mount(folder, flags, options):
    call_libc("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", flags, options.encode())


def with_own_mounts(task):
    """Run ``task`` in a child that may mount file systems nobody else sees."""

    def child():
        user, group = os.geteuid(), os.getegid()
        try:
            try:
                call_libc("unshare", _NEW_MOUNTS)
            except OSError:
                call_libc("unshare", _NEW_MOUNTS | _NEW_USER)
                Path("/proc/self/setgroups").write_text("deny")
                Path("/proc/self/uid_map").write_text(f"0 {user} 1")
                Path("/proc/self/gid_map").write_text(f"0 {group} 1")
            call_libc("mount", b"none", b"/", None, _PRIVATE, None)
        except OSError:
            os._exit(_NOT_PERMITTED)
        task()

    code = in_fork(child)
    if code == _NOT_PERMITTED:
        pytest.skip("this user may not mount file systems; test_no_room_for_a_file runs all the same")
    assert code == 0


def test_full_disk(old_and_new, tmp_path):
    """A real one, with one page more of room each time."""
    old, new = old_and_new

    def task():
        page = os.sysconf("SC_PAGE_SIZE")
        mount(tmp_path, 0, f"size={64 * page}")
        folder, ballast = tmp_path / "adapter", tmp_path / "ballast"
        by_adapter(old, folder)
        files = contents(folder)
        free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
        ballast.write_bytes(b"x" * free)
        failed = 0
        while True:
            try:
                by_adapter(new, folder)
                break
            except OSError as error:
                said = error
            failed += 1
            assert said.errno == errno.ENOSPC
            assert "as it was" in str(said)
            assert contents(folder) == files
            assert which(folder, values_of(old)) == 0
            assert not scratch_of(folder)
            os.truncate(ballast, ballast.stat().st_size - page)
        assert failed > 2
        assert which(folder, values_of(new)) == 0

    with_own_mounts(task)


def test_read_only_file_system(old_and_new, tmp_path):
    old, new = old_and_new

    def task():
        mount(tmp_path, 0, "size=256k")
        folder = tmp_path / "adapter"
        by_adapter(old, folder)
        files = contents(folder)
        mount(tmp_path, _REMOUNT | _READ_ONLY, "size=256k")
        for target in (folder, tmp_path / "another"):
            with pytest.raises(OSError, match="Read-only file system") as caught:
                by_adapter(new, target)
            assert caught.value.errno == errno.EROFS
        assert contents(folder) == files
        assert which(folder, values_of(old)) == 0

    with_own_mounts(task)


@pytest.fixture
def shared_folder():
    """One that other users may reach, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_folder_that_may_not_be_written(old_and_new, shared_folder):
    old, new = old_and_new
    folder = shared_folder / "adapter"
    by_adapter(old, folder)
    files = contents(folder)
    folder.chmod(0o555)

    def task():
        if os.geteuid() == 0:
            try:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            except OSError:
                os._exit(_NOT_PERMITTED)
        for target in (folder, folder / "within"):
            with pytest.raises(PermissionError, match="as it was"):
                by_adapter(new, target)
        assert which(folder, values_of(old)) == 0

    code = in_fork(task)
    if code == _NOT_PERMITTED:
        pytest.skip("root may not become another user here; test_read_only_file_system runs all the same")
    assert code == 0
    folder.chmod(0o755)
    assert contents(folder) == files


@pytest.mark.parametrize("step", range(3))
def test_replacement_fails(step, old_and_new, tmp_path, monkeypatch):
    old, new = old_and_new
    by_adapter(old, tmp_path)
    calls, replace = itertools.count(), os.replace

    def failing(source, target):
        if next(calls) == step:
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(OSError, match=["as it was", f"{WEIGHTS} of", f"{WEIGHTS}, {CONFIG} of"][step]):
            by_adapter(new, tmp_path)
    assert which(tmp_path, values_of(old), values_of(new)) == (step > 0)
    assert not scratch_of(tmp_path)


def test_flush_fails(old_and_new, tmp_path, monkeypatch):
    """Where a network file system first tells that its disk is full."""
    old, new = old_and_new
    by_adapter(old, tmp_path)
    files = contents(tmp_path)

    def failing(descriptor):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(OSError, match="quota"):
            by_adapter(new, tmp_path)
    assert contents(tmp_path) == files
    assert not scratch_of(tmp_path)


def test_folders_that_cannot_be_flushed_or_locked(old_and_new, tmp_path, monkeypatch):
    """As on some network file systems: files are flushed all the same."""
    flush, flushed = os.fsync, []

    def only_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flushed.append(descriptor)
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    monkeypatch.setattr(atomic.fcntl, "flock", no_locks)
    by_adapter(old_and_new[0], tmp_path / "adapter")
    assert which(tmp_path / "adapter", values_of(old_and_new[0])) == 0
    assert len(flushed) == 3


def no_locks(*args):
    raise OSError(errno.ENOLCK, "No locks available")


def test_everything_is_on_disk_before_the_first_file_is_replaced(old_and_new, tmp_path, monkeypatch):
    """A power cut keeps renames and loses content that was not flushed."""
    steps = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor):
        steps.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def noted_replace(source, target):
        steps.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    folder = tmp_path / "a" / "b"
    by_trainer(old_and_new[0], folder)
    first, last = steps.index("replace"), len(steps) - steps[::-1].index("replace")
    # Those that list the new folders, then the files; at last what lists the files.
    assert set(steps[:2]) == {str(tmp_path), str(tmp_path / "a")}
    assert sorted(Path(step).name for step in steps[2:first]) == sorted([WEIGHTS, CONFIG, TRAINER, CARD])
    assert steps[first:last] == ["replace"] * 4
    assert steps[last:] == [str(folder)]


# ---------------------------------------------------------------------------------------------- odd folders


@pytest.mark.parametrize("name", ["with spaces", "übung-日本語-🦜", "-n", "%s{}", "a" * 200])
def test_any_name(name, old_and_new, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_adapter(old_and_new[0], name)
    assert which(tmp_path / name, values_of(old_and_new[0])) == 0


def test_folder_behind_a_link(old_and_new, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    by_adapter(old_and_new[0], tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert which(tmp_path / "real", values_of(old_and_new[0])) == 0


@pytest.mark.parametrize("kind", ["file", "link to nothing", "link to a file", "in a file"])
def test_no_folder(kind, old_and_new, tmp_path):
    (tmp_path / "file").write_text("mine")
    target = {"file": tmp_path / "file", "in a file": tmp_path / "file" / "adapter"}.get(kind, tmp_path / "link")
    if target.name == "link":
        target.symlink_to(tmp_path / ("file" if "file" in kind else "nothing"))
    with pytest.raises(NotADirectoryError):
        by_adapter(old_and_new[0], target)
    assert (tmp_path / "file").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1 + (target.name == "link")


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_folder_in_the_place_of_a_file(name, old_and_new, tmp_path):
    old, new = old_and_new
    by_adapter(old, tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    files = contents(tmp_path)
    with pytest.raises(IsADirectoryError, match="move it away"):
        by_adapter(new, tmp_path)
    assert contents(tmp_path) == files
    assert not scratch_of(tmp_path)


def test_links_in_the_place_of_files_lead_where_they_led(old_and_new, tmp_path):
    """As in a snapshot of the hub's cache, or where data is versioned: what they lead to is not ours."""
    old, new = old_and_new
    by_adapter(old, tmp_path / "blobs")
    files = contents(tmp_path / "blobs")
    (tmp_path / "adapter").mkdir()
    for name in files:
        (tmp_path / "adapter" / name).symlink_to(tmp_path / "blobs" / name)
    by_adapter(new, tmp_path / "adapter")
    assert which(tmp_path / "adapter", values_of(new)) == 0
    assert contents(tmp_path / "blobs") == files
    assert not any(path.is_symlink() for path in (tmp_path / "adapter").iterdir())


def test_permissions_of_files_stay(old_and_new, tmp_path):
    """A private adapter stays private. Whether files may be replaced is up to the folder, as for any rename."""
    old, new = old_and_new
    by_trainer(old, tmp_path)
    modes = {WEIGHTS: 0o600, CONFIG: 0o444, CARD: 0o664, TRAINER: 0o640}
    for name, mode in modes.items():
        (tmp_path / name).chmod(mode)
    by_trainer(new, tmp_path)
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == modes
    assert which(tmp_path, values_of(new)) == 0


def test_the_umask_of_the_process_is_left_alone(old_and_new, tmp_path, monkeypatch):
    """Another thread may make a file at the same moment."""
    before = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask was changed"))
        by_trainer(old_and_new[0], tmp_path)
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


def make_folder(path):
    path.mkdir()
    (path / "notes").write_text("mine")


CARDS = {
    "folder": make_folder,
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "pipe": os.mkfifo,
    "own, not UTF-8": lambda path: path.write_bytes("Meine Lösung".encode("latin-1")),
    "own, UTF-16": lambda path: path.write_bytes("my own".encode("utf-16")),
    "link to an own one": lambda path: path.symlink_to(__file__),
}


@pytest.mark.parametrize("kind", CARDS)
def test_what_is_not_our_card_stays(kind, old_and_new, tmp_path):
    CARDS[kind](tmp_path / CARD)
    before = os.lstat(tmp_path / CARD)
    by_adapter(old_and_new[0], tmp_path)
    after = os.lstat(tmp_path / CARD)
    # All but when it was last read.
    for name in ("st_ino", "st_mode", "st_size", "st_mtime_ns"):
        assert getattr(after, name) == getattr(before, name)
    assert which(tmp_path, values_of(old_and_new[0])) == 0


@each_way
def test_an_adapter_of_another_tool_is_not_overwritten(way, old_and_new, tmp_path):
    folder = tmp_path / WAYS[way]
    peft.get_peft_model(base_model(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    files = contents(folder)
    with pytest.raises(FileExistsError, match="adapter of PEFT, which would be lost"):
        way(old_and_new[0], tmp_path)
    assert contents(folder) == files or way is by_model
    assert {name: contents(folder)[name] for name in files} == files
    assert not scratch_of(tmp_path)


@pytest.mark.parametrize("text", ["", "{", '{"format": "other"}', "[]"])
def test_config_of_nobody(text, old_and_new, tmp_path):
    (tmp_path / CONFIG).write_text(text)
    if "other" in text:
        with pytest.raises(FileExistsError, match="another tool"):
            by_adapter(old_and_new[0], tmp_path)
    else:
        by_adapter(old_and_new[0], tmp_path)
        assert which(tmp_path, values_of(old_and_new[0])) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@each_way
def test_weights_that_cannot_be_loaded_are_not_saved(way, value, old_and_new, tmp_path):
    """Over an adapter that can."""
    old, new = old_and_new
    way(old, tmp_path)
    files = contents(tmp_path / WAYS[way])
    with torch.no_grad():
        next(get_adapter(new).parameters()).view(-1)[0] = value
    with pytest.raises(CheckpointError, match="diverged"):
        way(new, tmp_path)
    assert contents(tmp_path / WAYS[way]) == files


# ---------------------------------------------------------------------------------------------- not alone


@pytest.mark.parametrize(("way", "writers"), [(by_adapter, 4), (by_trainer, 2), *budget([], [(by_adapter, 2)])])
def test_processes_save_while_another_loads(way, writers, tmp_path):
    kinds = [(OLD, False), (NEW, True), (FUSIONS["linear"], False), (OLD, True)] * 2
    models = [trained(config, seed=seed, projector=projector) for seed, (config, projector) in enumerate(kinds)]
    candidates = [values_of(model) for model in models]
    trainers = []
    if way is by_trainer:
        for number, model in enumerate(models):
            way(model, tmp_path / str(number))
            trainers.append(safetensors.torch.load_file(tmp_path / str(number) / TRAINER))
    folder = tmp_path / "adapter"

    enough = FORK.Event()

    def save_often(number):
        for i in itertools.count():
            way(models[number + i % 2], folder)
            if i >= budget(4, 10) and enough.is_set():
                return

    processes = [started(lambda number=2 * number: save_often(number)) for number in range(writers)]
    seen, refused, reads = set(), [], 0
    deadline = time.monotonic() + 300
    while any(process.is_alive() for process in processes):
        assert time.monotonic() < deadline
        reads += 1
        if reads >= budget(40, 100) and len(seen) > 2:
            enough.set()
        try:
            seen.add(which(folder, *candidates))
        except CheckpointError as error:
            assert not seen, "it was there before"
            refused.append(str(error))
        if seen and trainers:
            found = safetensors.torch.load((folder / TRAINER).read_bytes())
            assert any(same_values(found, one) for one in trainers)
    assert [process.exitcode for process in processes] == [0] * writers
    assert all("there is no" in message for message in refused)
    which(folder, *candidates)
    assert not scratch_of(folder)
    assert checksum(folder) == embedded_checksum(folder), "the last save's files, and no other's"


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
def test_threads_save_to_one_folder(locks, old_and_new, tmp_path, monkeypatch):
    if not locks:
        monkeypatch.setattr(atomic.fcntl, "flock", no_locks)
    candidates = [values_of(model) for model in old_and_new]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: by_adapter(old_and_new[i % 2], tmp_path), range(60)))
    which(tmp_path, *candidates)
    assert not scratch_of(tmp_path)
    assert not locks or checksum(tmp_path) == embedded_checksum(tmp_path)


def test_trained_by_another_thread_meanwhile(old_and_new, tmp_path, monkeypatch):
    """What is saved are values of one moment: it would be refused as damaged otherwise."""
    model = old_and_new[0]
    digest = description.digest

    def trains_meanwhile(tensors):
        found = digest(tensors)
        tiny.train_randomly(get_adapter(model).alignment, seed=9)
        return found

    config, tensors = values_of(model)
    before = {name: value.clone() for name, value in tensors.items()}
    monkeypatch.setattr(description, "digest", trains_meanwhile)
    by_adapter(model, tmp_path)
    assert which(tmp_path, (config, before)) == 0


# ---------------------------------------------------------------------------------------------- leftovers


def leftover(folder, host=None, days=0.0):
    """A scratch folder that nobody holds, of another machine if ``host`` is given."""
    made = folder / f".emma-save-{host or platform.node()}-a1b2c3"
    made.mkdir(parents=True)
    (made / WEIGHTS).write_bytes(b"half")
    then = time.time() - days * 24 * 3600
    os.utime(made, (then, then))
    return made


@pytest.mark.parametrize(
    ("host", "days", "locks", "stays"),
    [
        (None, 0, True, False),
        ("elsewhere", 0, True, True),
        ("elsewhere", 2, True, False),
        (None, 0, False, True),
        (None, 2, False, False),
    ],
)
def test_leftovers(host, days, locks, stays, old_and_new, tmp_path, monkeypatch):
    """Where nothing tells that its maker is dead, a scratch folder stays for a day."""
    made = leftover(tmp_path, host, days)
    if not locks:
        monkeypatch.setattr(atomic.fcntl, "flock", no_locks)
    by_adapter(old_and_new[0], tmp_path)
    assert made.exists() == stays
    assert scratch_of(tmp_path) == [made] * stays


def hold_scratch(folder, ready, done):
    """A save that takes its time."""
    with atomic._scratch_folder(folder) as scratch:
        (scratch / WEIGHTS).write_bytes(b"half")
        ready.set()
        done.wait(120)


@pytest.mark.parametrize("where", ["process", "thread"])
def test_scratch_of_a_running_save_stays(where, old_and_new, tmp_path):
    """However old it looks: a clock may be wrong."""
    ready, done = (FORK.Event(), FORK.Event()) if where == "process" else (threading.Event(), threading.Event())
    holder = (FORK.Process if where == "process" else threading.Thread)(
        target=hold_scratch, args=(tmp_path, ready, done), daemon=True
    )
    holder.start()
    assert ready.wait(60)
    [scratch] = scratch_of(tmp_path)
    os.utime(scratch, (0, 0))
    by_adapter(old_and_new[0], tmp_path)
    assert (scratch / WEIGHTS).read_bytes() == b"half"
    done.set()
    holder.join(60)
    assert not scratch_of(tmp_path)


def test_scratch_that_vanishes_while_it_is_looked_at(old_and_new, tmp_path, monkeypatch):
    made = leftover(tmp_path)
    monkeypatch.setattr(atomic, "_try_lock", lambda descriptor: shutil.rmtree(made, ignore_errors=True))
    by_adapter(old_and_new[0], tmp_path)
    assert which(tmp_path, values_of(old_and_new[0])) == 0


@pytest.mark.parametrize("removed", ["before it is opened", "before it is locked"])
def test_scratch_that_is_taken_for_left_over(removed, old_and_new, tmp_path, monkeypatch):
    """Between being made and being locked."""
    mkdtemp, try_lock, calls = tempfile.mkdtemp, atomic._try_lock, itertools.count()

    def unlucky_make(**options):
        made = mkdtemp(**options)
        if removed == "before it is opened" and next(calls) == 0:
            shutil.rmtree(made)
        return made

    def unlucky_lock(descriptor):
        if removed == "before it is locked" and next(calls) == 0:
            shutil.rmtree(scratch_of(tmp_path)[0])
        return try_lock(descriptor)

    monkeypatch.setattr(tempfile, "mkdtemp", unlucky_make)
    monkeypatch.setattr(atomic, "_try_lock", unlucky_lock)
    by_adapter(old_and_new[0], tmp_path)
    assert which(tmp_path, values_of(old_and_new[0])) == 0
    assert next(calls) > 1


@pytest.mark.parametrize("kind", ["link", "pipe", "file"])
def test_what_only_has_the_name_of_a_leftover_does_no_harm(kind, old_and_new, tmp_path):
    make_folder(tmp_path / "precious")
    path = tmp_path / "adapter" / f".emma-save-{platform.node()}-a1b2c3"
    path.parent.mkdir()
    {"link": lambda: path.symlink_to(tmp_path / "precious"), "pipe": lambda: os.mkfifo(path), "file": path.touch}[
        kind
    ]()
    os.utime(path, (0, 0), follow_symlinks=False)
    by_adapter(old_and_new[0], tmp_path / "adapter")
    assert (tmp_path / "precious" / "notes").read_text() == "mine"


def test_a_save_that_was_stopped_is_not_waited_for(old_and_new, tmp_path, monkeypatch):
    """In the middle of replacing files, by Ctrl-Z or a debugger."""
    monkeypatch.setattr(atomic, "_LONGEST_WAIT", 0.2)
    ready, done = FORK.Event(), FORK.Event()

    def stopped():
        with atomic._lock(tmp_path):
            ready.set()
            done.wait(120)

    process = started(stopped)
    assert ready.wait(60)
    by_adapter(old_and_new[0], tmp_path)
    assert which(tmp_path, values_of(old_and_new[0])) == 0
    done.set()
    process.join(60)


def test_a_worker_that_was_forked_meanwhile_holds_no_lock(tmp_path):
    """As a data loader's workers, which other threads start."""
    done = FORK.Event()
    with atomic._lock(tmp_path) as held:
        assert held
        worker = started(lambda: done.wait(120))
    with atomic._lock(tmp_path) as held:
        assert held
    done.set()
    worker.join(60)


# ---------------------------------------------------------------------------------------------- what is around it


def ignored(model):
    return set(model._keys_to_ignore_on_save)


def test_base_that_cannot_be_saved(old_and_new, tmp_path, monkeypatch):
    old, new = old_and_new
    by_model(old, tmp_path)
    files = contents(tmp_path)
    get_adapter(new).train_only(projector=True)
    before = ignored(new)

    def failing(self, save_directory, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(new), "save_pretrained", failing)
    with pytest.raises(OSError, match="No space left"):
        by_model(new, tmp_path)
    assert ignored(new) == before
    assert before
    assert contents(tmp_path) == files


def test_adapter_that_cannot_be_saved_with_its_base(old_and_new, tmp_path):
    new = old_and_new[1]
    get_adapter(new).train_only(projector=True)
    before = ignored(new)
    (tmp_path / "emma_adapter").write_text("mine")
    with pytest.raises(NotADirectoryError):
        by_model(new, tmp_path)
    assert ignored(new) == before
    assert torch.equal(logits(type(new).from_pretrained(tmp_path)), logits(base_model()))


@pytest.mark.parametrize("step", ["create_repo", "create_branch", "snapshot_download", "upload_folder"])
def test_upload_that_fails_leaves_nothing_here(step, old_and_new, tmp_path, monkeypatch):
    asked = []

    def answer(self, *args, **options):
        asked.append(sorted(path.name for path in tmp_path.rglob("*")))
        raise ConnectionError("no hub today")

    for name in ("create_repo", "create_branch", "snapshot_download", "upload_folder"):
        monkeypatch.setattr(huggingface_hub.HfApi, name, answer if name == step else lambda *args, **options: None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ConnectionError, match="no hub today"):
        get_adapter(old_and_new[0]).push_to_hub("someone/adapter", revision="main")
    assert {WEIGHTS, CONFIG, CARD} <= set(asked[0]), "it was made here"
    assert not list(tmp_path.iterdir())
