"""The stages of the GPU quarter hour; ``python -m benchmarks.kernels.stages NAME --output FOLDER`` runs one."""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import correctness, patched_model
from .bare_checkout import ROOT, prepare
from .comparison import OUT_OF_TIME, Budget, Effort, compare
from .gpu_quarter_hour import Log
from .machine import copy_bandwidth, describe_machine, median_microseconds
from .operations import OPERATIONS
from .profiling import host_times, kernel_times
from .records import Results
from .schedules import CANDIDATES, changed, shipped
from .shapes import BATCHES, PHASES, SHAPES, Setting, applies
from .stage import CASES, Run, told
from .sweep import sweep

# --- facts -----------------------------------------------------------------------------------------------------


def facts(run: Run) -> bool:
    """Versions, and the two ceilings: copying, and a matrix product in bfloat16."""
    import transformers
    import triton  # type: ignore[import-untyped, unused-ignore]

    run.log(python=sys.version.split()[0], torch=torch.__version__, cuda=torch.version.cuda)
    run.log(triton=triton.__version__, transformers=transformers.__version__, ptxas=_tool_version(_ptxas()))
    if not run.dry:
        properties = torch.cuda.get_device_properties(run.device)
        run.log(card=properties.name, multiprocessors=properties.multi_processor_count, memory=properties.total_memory)
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
        if shutil.which(query[0]):
            run.log(driver_and_clocks=subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip())
        run.log(copy_terabytes_per_second=copy_bandwidth(run.device) / 1e12)
    n, dtype = (64, torch.float32) if run.dry else (8192, torch.bfloat16)
    a, b = (torch.randn(n, n, device=run.device, dtype=dtype) for _ in range(2))
    microseconds = median_microseconds(lambda: a @ b, run.device, rounds=15)
    run.log(product_teraflops=2 * n**3 / microseconds / 1e6)
    return True


def _ptxas() -> Path:
    import triton  # type: ignore[import-untyped, unused-ignore]

    chosen = os.environ.get("TRITON_PTXAS_PATH")
    return Path(chosen) if chosen else Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


def _tool_version(tool: Path) -> str:
    if not tool.exists():
        return "missing"
    lines = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()
    return next((line.split("release")[-1].strip() for line in lines if "release" in line), "unknown")


# --- compile ---------------------------------------------------------------------------------------------------


def compile_all(run: Run) -> bool:
    """Every bfloat16 variant and all that the sweep tries, on all cores: fills Triton's cache, and names what fails or
    spills."""
    names = list(range(len(_configurations())))
    names = names[:1] + names[-1:] if run.dry else names
    target = "sm_90" if run.dry else "sm_{}{}".format(*torch.cuda.get_device_capability())
    failed = 0
    # From a process without threads and without a GPU's context, neither of which a fork carries along.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__spec__.name])
    with ProcessPoolExecutor(1 if run.dry else max(1, (os.cpu_count() or 2) - 2), context) as pool:
        for future in as_completed(pool.submit(_compile_one, number, target) for number in names):
            found = future.result()
            if "error" in found or found["spilled_bytes"]:
                failed += 1
                run.log(**found)
    run.log(compiled=len(names) - failed, target=target)
    return failed == 0


def _configurations() -> list[Any]:
    from emma_adapter.kernels import cross_attention, token_mixing

    from . import one_program

    every = (own for module in (cross_attention, token_mixing) for own in module.configurations())
    return [
        *(own for own in every if own.dtype == torch.bfloat16 or own.kernel.__name__ == "add_splits"),
        *(changed(shipped(candidate), candidate) for _, candidate in CANDIDATES),
        *(
            one_program.configuration(torch.bfloat16, schedule, inner=128, heads=4, modulate=True)
            for schedule in one_program.SCHEDULES
        ),
    ]


def _compile_one(number: int, target: str) -> dict[str, Any]:
    prepare()
    from tests.kernels.compilation import compiled, local_memory, name_of

    configuration = _configurations()[number]
    name = f"{name_of(configuration)} w{configuration.num_warps} s{configuration.num_stages}"
    try:
        kernel = compiled(configuration, target)
        with tempfile.TemporaryDirectory() as folder:
            return {"kernel": name, "spilled_bytes": local_memory(kernel, target, Path(folder))}
    except Exception as error:  # noqa: BLE001 (whatever a compiler may raise)
        return {"kernel": name, "error": f"{type(error).__name__}: {error}"[:300]}


# --- correct ---------------------------------------------------------------------------------------------------


def correct(run: Run, operations: tuple[str, ...], dtypes: tuple[torch.dtype, ...]) -> bool:
    sizes = correctness.TINY if run.dry else correctness.REAL
    good = True
    for operation, dtype in itertools.product(operations, dtypes):
        for check in correctness.checks(operation, dtype, run.device, sizes):
            try:
                entry = check()
            except Exception as error:  # noqa: BLE001
                entry = {"case": f"{operation}, {dtype}", "ok": False, "error": told(error)}
            run.log(**entry)
            good &= entry["ok"]
    return good


def correct_half(operation: str, run: Run) -> bool:
    """In bfloat16, which the interpreter is slow in."""
    return correct(run, (operation,), (torch.float16 if run.dry else torch.bfloat16,))


def correct_rest(run: Run) -> bool:
    """The other dtypes."""
    if run.dry:
        return correct(run, ("linear",), (torch.float32,))
    return correct(run, tuple(OPERATIONS), (torch.float16, torch.float32))


# --- memory ----------------------------------------------------------------------------------------------------


def memcheck(run: Run) -> bool:
    """In bfloat16, without the kernels of C++, whose names are mangled: to watch those too takes minutes. No racecheck:
    it reports hazards in Triton's reductions that are none (triton-lang/triton#7264)."""
    workload = [sys.executable, str(ROOT / "tests" / "kernels" / "gpu_workload.py")]
    sanitizer = shutil.which("compute-sanitizer")
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "WORKLOAD_DTYPES": "bfloat16"}
    if run.dry or sanitizer is None:
        run.log(left_out="compute-sanitizer", because="no GPU" if run.dry else "not installed")
        return run.dry
    code = 0
    for left_out in (["--kernel-name-exclude", "kernel_substring=_Z"], []):
        command = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", "--print-limit", "5", *left_out, *workload]
        found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
        code = found.returncode
        run.log(ok=code == 0, code=code, options=left_out, tail=found.stdout[-1500:] + found.stderr[-500:])
        if code in (0, 9):  # Otherwise it may be the sanitizer that doesn't know an option.
            break
    return code == 0


# --- time ------------------------------------------------------------------------------------------------------


def bench(run: Run, *, compiled: bool, file: str) -> bool:
    """The cases beside the authors' formulation, PyTorch and ``varlen``; with ``compiled``, ``torch.compile`` too."""
    cases = CASES[:1] if run.dry else CASES
    return _measure(run, [(name, run.setting(shape, batch)) for name, shape, batch in cases], file, compiled=compiled)


def table(run: Run) -> bool:
    """All shapes and batches without ``torch.compile``, the largest first: for what ``kernel="auto"`` goes by."""
    settings = [
        (operation, run.setting(shape.name, batch))
        for batch in sorted(BATCHES, reverse=True)
        for operation in ("modulation", "linear", "attention")
        for shape in SHAPES
        if applies(operation, shape, batch)
    ]
    return _measure(run, settings[:1] if run.dry else settings, "table.json", compiled=False)


def _measure(run: Run, settings: list[tuple[str, Setting]], file: str, *, compiled: bool) -> bool:
    command = "python -m benchmarks.kernels.gpu_quarter_hour"
    results = Results(describe_machine(run.device, date=time.strftime("%Y-%m-%d"), command=command))
    effort = Effort(0.05 if run.dry else 0.5, 60)
    good = True
    for number, (name, setting) in enumerate(settings):
        if run.left() < 8:
            run.log(ok=False, left_out=f"{len(settings) - number} of {len(settings)} cases", because="out of time")
            return False
        place = {"operation": name, "shape": setting.shape.name, "batch": setting.batch}
        try:
            operation = OPERATIONS[name](setting)
            # FlexAttention takes long to compile, and nobody would use it here.
            unwanted = [own for own, variant in operation.variants.items() if own == "flex" or variant.compiled]
            for own in unwanted:
                if own == "flex" or not compiled:
                    del operation.variants[own]
            # One compilation is enough to try it.
            for phase in PHASES[:1] if run.dry and compiled else PHASES:
                budget = Budget(run.left(), 1)
                for record in compare(name, operation, setting, phase, results.machine, budget, effort):
                    results.records.append(record)
                    entry = {**place, "phase": phase, "variant": record.variant}
                    if record.median_us is None:
                        good &= record.error == OUT_OF_TIME
                        run.log(**entry, error=record.error)
                    else:
                        run.log(
                            **entry,
                            us=record.median_us,
                            ratio=record.ratio,
                            percent_of_copy=record.bandwidth_percent,
                            launches=record.launches,
                            difference=record.difference,
                        )
                results.save(run.log.folder / file)
        except Exception as error:  # noqa: BLE001
            good = False
            run.log(**place, error=told(error))
        torch._dynamo.reset()
    return good


def kernels(run: Run) -> bool:
    """Microseconds of each kernel of forward and backward."""
    for name, shape, batch in CASES[: 1 if run.dry else None]:
        operation = OPERATIONS[name](run.setting(shape, batch))
        variant = operation.variants["eager" if run.dry else "triton"]
        times = kernel_times(operation.step(variant, "forward+backward"), run.device)
        run.log(operation=name, shape=shape, batch=batch, kernels_us=times)
    return True


def host(run: Run) -> bool:
    """Host microseconds of a call for one image and of each launch in it; the same where Triton looks up every kernel
    again; and in a CUDA graph."""
    from emma_adapter.kernels import launch

    repeats = 2 if run.dry else 100
    for name in ("modulation", "linear"):
        operation = OPERATIONS[name](run.setting("LLaVA-1.5", 1))
        for own in (own for own in ("authors", "eager", "triton") if own in operation.variants):
            call = operation.step(operation.variants[own], "forward")
            us, launches = host_times(call, run.device, repeats=repeats)
            run.log(operation=name, variant=own, host_us_of_call=us, host_us_of_launches=launches)
        direct, launch.DIRECT = launch.DIRECT, False
        try:
            us, launches = host_times(call, run.device, repeats=repeats)
        finally:
            launch.DIRECT = direct
        run.log(operation=name, variant="looked up by Triton", host_us_of_call=us, host_us_of_launches=launches)
        if not run.dry:
            replay, _ = patched_model.record_graph(call, warm_up=3)
            us, _ = host_times(replay, run.device, repeats=repeats)
            run.log(operation=name, variant="CUDA graph", host_us_of_call=us)
    return True


# --- all -------------------------------------------------------------------------------------------------------


def _interpreter() -> AbstractContextManager[None]:
    """What Triton's interpreter needs, if it runs the kernels."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return nullcontext()
    from tests.kernels.interpreter import scalars_as_indices

    found: AbstractContextManager[None] = scalars_as_indices()
    return found


STAGES: dict[str, Callable[[Run], bool]] = {
    "facts": facts,
    "compile": compile_all,
    **{f"correct-{name}": partial(correct_half, name) for name in OPERATIONS},
    "model": lambda run: patched_model.check(run.log, run.device, dry=run.dry),
    "memcheck": memcheck,
    "bench": lambda run: bench(run, compiled=False, file="bench.json"),
    "kernels": kernels,
    "host": host,
    "bench-compile": lambda run: bench(run, compiled=True, file="bench-compile.json"),
    "sweep": sweep,
    "correct-rest": correct_rest,
    "table": table,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    log = Log(given.output, given.stage)
    try:
        if not given.dry_run and not torch.cuda.is_available():
            raise RuntimeError("there is no GPU; --dry-run needs none")
        prepare()
        with _interpreter():
            good = STAGES[given.stage](Run(log, given.seconds, given.dry_run, time.perf_counter()))
    except Exception as error:  # noqa: BLE001
        log(ok=False, error=told(error), where=traceback.format_exc()[-800:])
        return 1
    log(ok=good)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
