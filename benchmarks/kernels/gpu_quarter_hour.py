"""Everything that a GPU has to answer that is at hand for a quarter of an hour, the most important first.

    python -m benchmarks.kernels.gpu_quarter_hour --seconds 330 --output gpu-results
    python -m benchmarks.kernels.gpu_quarter_hour --seconds 200 --only correct --only bench --output gpu-results
    python -m benchmarks.kernels.gpu_quarter_hour --dry-run --output dry-results
    python -m benchmarks.kernels.publish gpu-results

Runs from a bare checkout: with torch, triton, transformers, einops and safetensors, without installing anything. Each
stage is a process of its own with a limit of its own: a crash, a hang or an illegal access ends that stage alone. Each
result is a line of JSON in OUTPUT/results.jsonl as soon as it is known; a summary comes last. ``--dry-run`` tries the
runner and the stages without a GPU, on small sizes, with the kernels in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[2]
LINES = "results.jsonl"
#: Stages of which the summary tells everything.
_TOLD = ("facts", "host", "sweep")
#: Below this many seconds no stage begins.
_LEAST = 10.0


@dataclass(frozen=True)
class Stage:
    """Args:
    name: as ``stages.py`` knows it.
    limit: seconds, after which its processes are killed.
    beside: whether others may run at the same time. A stage that measures time waits until it is alone.
    """

    name: str
    limit: float
    beside: bool = False


#: In order of worth.
STAGES = (
    Stage("facts", 60),
    Stage("compile", 90),
    Stage("correct-modulation", 90, beside=True),
    Stage("correct-linear", 90, beside=True),
    Stage("correct-attention", 90, beside=True),
    Stage("model", 100, beside=True),
    Stage("memcheck", 90, beside=True),
    Stage("bench", 90),
    Stage("kernels", 40),
    Stage("host", 30),
    Stage("bench-compile", 140),
    Stage("sweep", 80),
    Stage("correct-rest", 90),
    Stage("table", 240),
)


class Log:
    """Appends an object a line, at once: what is killed leaves what it found."""

    def __init__(self, folder: Path, stage: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.stage = folder, stage
        self._began = time.perf_counter()

    def __call__(self, **entry: Any) -> None:
        seconds = round(time.perf_counter() - self._began, 1)
        line = json.dumps({"stage": self.stage, "at": seconds, **entry}, default=str)
        with open(self.folder / LINES, "a") as file:
            file.write(line + "\n")
        print(line[:300], flush=True)


def run(
    stages: Sequence[Stage], output: Path, seconds: float, *, module: str, dry: bool = False, cwd: Path = ROOT
) -> int:
    """Run the stages in order until ``seconds`` are over.

    Returns:
        How many of them failed, ran out of time or were left out.
    """
    log = Log(output, "runner")
    end = time.perf_counter() + seconds
    beside: list[tuple[Stage, subprocess.Popen[bytes], float]] = []
    missed = 0

    def left() -> float:
        return end - time.perf_counter()

    def finish_all() -> int:
        missed = sum(
            not _finish(stage, process, min(deadline, end) - time.perf_counter(), log)
            for stage, process, deadline in beside
        )
        beside.clear()
        return missed

    try:
        for stage in stages:
            if not stage.beside:
                missed += finish_all()
            limit = min(stage.limit, left())
            if limit < _LEAST:
                log(left_out=stage.name, because="out of time")
                missed += 1
                continue
            process = _start(stage, output, limit, module=module, dry=dry, cwd=cwd)
            if stage.beside:
                beside.append((stage, process, time.perf_counter() + limit))
            else:
                missed += not _finish(stage, process, limit, log)
        missed += finish_all()
    finally:
        for _, process, _ in beside:
            _kill(process)
    log(took=round(seconds - left(), 1), missed=missed)
    return missed


def _start(stage: Stage, output: Path, limit: float, *, module: str, dry: bool, cwd: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", module, stage.name, "--output", str(output), "--seconds", f"{limit:.0f}"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(cwd), os.environ.get("PYTHONPATH")))),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if dry:
        command.append("--dry-run")
        # What is compiled for a GPU can't be interpreted in the same process.
        environment["TRITON_INTERPRET"] = "0" if stage.name in ("compile", "sweep") else "1"
    # A session of its own, so that the processes that it starts end with it.
    return subprocess.Popen(command, cwd=cwd, env=environment, start_new_session=True)


def _finish(stage: Stage, process: subprocess.Popen[bytes], limit: float, log: Log) -> bool:
    """Wait until the stage has ended, or end it."""
    try:
        code = process.wait(timeout=max(limit, 0.1))
    except subprocess.TimeoutExpired:
        _kill(process)
        log(ended=stage.name, ok=False, because=f"not finished after {stage.limit:.0f} s or the end of the run")
        return False
    _kill(process)
    log(ended=stage.name, ok=code == 0, code=code)
    return code == 0


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The processes of our own child's session; those that it left behind too."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def summary(output: Path, out: TextIO = sys.stdout) -> None:
    """Times, then everything that went wrong."""
    entries = [json.loads(line) for line in (output / LINES).read_text().splitlines()]
    for entry in entries:
        if "us" in entry:
            place = f"{entry['operation']:10} {entry['shape']:20} B={entry['batch']:<3} {entry['phase']:16}"
            out.write(f"{place} {entry['variant']:20} {entry['us']:10.0f} us  x{entry['ratio'] or 0:.2f}\n")
        elif "kernels_us" in entry:
            out.write(f"{entry['operation']} {entry['shape']} B={entry['batch']}: {json.dumps(entry['kernels_us'])}\n")
        elif (entry["stage"] in _TOLD and entry.keys() - {"stage", "at", "ok"}) or "note" in entry:
            found = {name: value for name, value in entry.items() if name not in ("stage", "at", "ok")}
            out.write(f"{entry['stage']}: {json.dumps(found)}\n")
    wrong = [entry for entry in entries if entry.get("ok") is False or "error" in entry or "left_out" in entry]
    for entry in wrong:
        out.write("!! " + json.dumps(entry)[:400] + "\n")
    out.write(f"{len(entries)} results, {len(wrong)} of them wrong or missing, in {output / LINES}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="Folder; its results are added to.")
    parser.add_argument("--seconds", type=float, default=330.0, help="For everything. Default: 330.")
    parser.add_argument("--only", action="append", default=[], help="Stages whose names begin with this.")
    parser.add_argument("--dry-run", action="store_true", help="Without a GPU.")
    given = parser.parse_args(arguments)
    chosen = [stage for stage in STAGES if not given.only or stage.name.startswith(tuple(given.only))]
    if not chosen:
        parser.error(f"--only {given.only}: the stages are {', '.join(stage.name for stage in STAGES)}")
    output = given.output.resolve()
    missed = run(chosen, output, given.seconds, module="benchmarks.kernels.stages", dry=given.dry_run)
    summary(output)
    return min(missed, 1)


if __name__ == "__main__":
    raise SystemExit(main())
