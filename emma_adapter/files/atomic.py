"""Atomic replacement: each file is the old one or the new one, even if the process is killed or the disk is full.

New files are written to a scratch folder beside the old ones. The process that makes it locks it as long as it lives,
so that an unlocked scratch folder is a leftover: the operating system releases the locks of killed processes, and isn't
misled by reused process ids or containers. Where there are no such locks (Windows, some network file systems), a
scratch folder's age decides.
"""

from __future__ import annotations

import errno
import os
import platform
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_SCRATCH_PREFIX = ".emma-save-"
_ABANDONED_AFTER = 24 * 3600  # seconds
_LONGEST_WAIT = 10  # seconds


#: A file's content, or a function that writes it to a path, for files too large to hold in memory.
Content = bytes | Callable[[Path], None]


def replace_files(directory: Path, files: Mapping[str, Content]) -> None:
    """Put files into a folder, in their order; the folder is made if it isn't there.

    All are on disk before the first replaces its predecessor. Concurrent saves take turns in replacing, so that all
    files that remain are from one of them. Scratch folders of killed processes are removed.

    A file keeps its predecessor's permissions. A link is replaced by a file; its target stays.

    Raises:
        OSError: saying what the folder holds now.
    """
    if os.path.lexists(directory) and not directory.is_dir():
        raise NotADirectoryError(
            errno.ENOTDIR,
            "this is a file, or a link to nothing; save_pretrained needs the name of a folder",
            str(directory),
        )
    replaced: list[str] = []
    try:
        _make_folder(directory)
        _remove_leftovers(directory)
        with _scratch_folder(directory) as scratch:
            for name, content in files.items():
                _write(scratch / name, content, _mode(directory / name))
            # Not for long: a process may have been stopped while it held the lock.
            with _lock(directory, wait=_LONGEST_WAIT):
                for name in files:
                    os.replace(scratch / name, directory / name)
                    replaced.append(name)
        _flush_folder(directory)
    except OSError as error:
        if error.errno is None:
            raise
        now = f"{', '.join(replaced)} of {directory} are new already" if replaced else f"{directory} is as it was"
        # OSError chooses the subclass by the number.
        raise OSError(error.errno, f"{error.strerror} (nothing is half written: {now})", error.filename) from error


def _make_folder(directory: Path) -> None:
    missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        _flush_folder(folder.parent)


def _mode(path: Path) -> int | None:
    """Return the permissions of a file; None if there is no regular file.

    Raises:
        IsADirectoryError: if it is a folder.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "a folder is where a file is to go; move it away", str(path))
    return stat.S_IMODE(mode) if stat.S_ISREG(mode) else None


def _write(path: Path, content: Content, mode: int | None) -> None:
    """Write a file and flush it, so that no power cut leaves its new name without its content."""
    if not isinstance(content, bytes):
        content(path)
    with path.open("wb" if isinstance(content, bytes) else "rb+") as file:
        if isinstance(content, bytes):
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if mode is not None and mode != stat.S_IMODE(path.stat().st_mode):
        path.chmod(mode)


@contextmanager
def _scratch_folder(directory: Path) -> Iterator[Path]:
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=f"{_SCRATCH_PREFIX}{platform.node()}-", dir=directory))
        with _lock(scratch) as lock:
            # Before it was locked, another process may have removed it as a leftover.
            if lock is not False and scratch.exists():
                try:
                    yield scratch
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
                return


def _remove_leftovers(directory: Path) -> None:
    for leftover in directory.glob(f"{_SCRATCH_PREFIX}*"):
        if leftover.is_symlink() or not leftover.is_dir():
            continue  # not one of ours
        # Another machine's locks may not be seen here.
        made_here = leftover.name.removeprefix(_SCRATCH_PREFIX).rpartition("-")[0] == platform.node()
        with _lock(leftover) as lock:
            if (lock and made_here) or (lock is not False and _age(leftover) > _ABANDONED_AFTER):
                shutil.rmtree(leftover, ignore_errors=True)


def _age(path: Path) -> float:
    try:
        return time.time() - path.lstat().st_mtime
    except FileNotFoundError:  # its process has finished
        return 0.0


@contextmanager
def _lock(folder: Path, *, wait: float = 0.0) -> Iterator[bool | None]:
    """Take the lock of a folder, after at most ``wait`` seconds.

    Yields whether it is held here now; None if that folder has no lock.
    """
    descriptor = _open_folder(folder)
    if descriptor is None:
        yield None
        return
    deadline = time.monotonic() + wait
    held = None
    try:
        while (held := _try_lock(descriptor)) is False and time.monotonic() < deadline:
            time.sleep(0.002)
        yield held
    finally:
        if held:
            _unlock(descriptor)
        os.close(descriptor)


def _open_folder(folder: Path) -> int | None:
    """Open a folder; return None if there is none, or this user or system can't open it."""
    try:
        return os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR):
            raise
        return None


if sys.platform == "win32":

    def _try_lock(descriptor: int) -> bool | None:
        return None

    def _unlock(descriptor: int) -> None:
        pass

else:

    def _try_lock(descriptor: int) -> bool | None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return None
        return True

    def _unlock(descriptor: int) -> None:
        # Closing isn't enough: a process that was forked meanwhile has the descriptor too.
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _flush_folder(folder: Path) -> None:
    """Flush the entries of a folder to disk, where the system can."""
    descriptor = _open_folder(folder)
    if descriptor is None:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)
