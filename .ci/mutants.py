"""Break the library on purpose, in one place after the other, and see whether the tests notice.

    python .ci/mutants.py                      # all of them: each must be noticed by the tests named beside it
    python .ci/mutants.py "a tile that spills"  # that one

Each mutant is a change that a test which was made smaller used to find. They are run in the everyday tier, but for
those that say ``night``. Exits with 1 if one is not noticed, or if its place in the source is gone.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("emma_adapter", "integrations", "tests", "benchmarks", "docs", "pyproject.toml", "README.md", "CHANGELOG.md")
#: A run that takes longer hangs, which is noticed too.
SECONDS = 900


@dataclass(frozen=True)
class Mutant:
    name: str
    path: str
    before: str
    """Text that is in the file once."""
    after: str
    tests: tuple[str, ...]
    """What of ``tests/`` is to notice it."""
    night: bool = False


MUTANTS = (
    # Families, fusions and encoders in pairs instead of all together; fewer modes of generation, policies, assistants.
    Mutant(
        "an image in another row",
        "emma_adapter/patching/routing.py",
        "rows = torch.searchsorted(row_ends, ends - lengths, right=True)",
        "rows = torch.searchsorted(row_ends, ends - lengths, right=False)",
        ("tests/patching/test_families.py",),
    ),
    Mutant(
        "a hook that stays",
        "emma_adapter/patching/hooks.py",
        "*(before_projector, after_projector, after_embedding),",
        "*(before_projector, after_embedding),",
        ("tests/patching/test_families.py", "-k", "identity"),
    ),
    Mutant(
        "any call is the prompt's",
        "emma_adapter/patching/call_plan.py",
        "return any(torch.equal(prompt, part) for part in",
        "return True or any(torch.equal(prompt, part) for part in",
        ("tests/patching/test_families.py", "-k", "assisted or inside_of_generate or modes"),
    ),
    Mutant(
        "the longest turn",
        "emma_adapter/instructions/reader.py",
        "return [min(filter(None, turns), key=len",
        "return [max(filter(None, turns), key=len",
        ("tests/instructions/test_reader.py",),
    ),
    # Fewer and shorter lives, fewer calls of threads, one fusion of what is recomputed.
    Mutant(
        "a context that threads share",
        "emma_adapter/modules/per_thread.py",
        "class PerThread(threading.local, Generic[Value]):",
        "class PerThread(Generic[Value]):",
        ("tests/patching/test_concurrency.py", "-k", "thousand or training_in_threads"),
    ),
    Mutant(
        "recomputed for another call",
        "emma_adapter/patching/recomputation.py",
        "if is_recomputing() and (remembered := state.memories.routes.recall(visual_tokens)) is not None:",
        "if False and (remembered := state.memories.routes.recall(visual_tokens)) is not None:",
        ("tests/modules/test_gradient_checkpointing.py",),
    ),
    Mutant(
        "a trained projector that stays",
        "emma_adapter/adapter/patch.py",
        "trainable_parameters.undo_train_only(model)",
        "pass",
        ("tests/patching/test_life_cycle.py",),
    ),
    Mutant(
        "compiled before it was patched",
        "emma_adapter/modules/private.py",
        "        torch.compiler.reset()",
        "        pass",
        ("tests/patching/test_wrapped.py", "-k", "ran_compiled"),
        night=True,
    ),
    # A tenth of the damaged folders, a twentieth of the guided runs, fewer kills.
    Mutant(
        "a checksum that nobody compares",
        "emma_adapter/checkpoints/reading.py",
        "intact = digest(tensors) == saved.sha256",
        "intact = True",
        ("tests/checkpoints/test_checkpoint.py",),
    ),
    Mutant(
        "a file longer than its header says",
        "emma_adapter/files/tensor_file.py",
        "if 8 + length + end != size:",
        "if 8 + length + end > size:",
        ("tests/files/test_tensor_file.py",),
    ),
    Mutant(
        "JSON of any depth",
        "emma_adapter/files/untrusted.py",
        "if nests_deeper(value, MAX_NESTING):",
        "if False:",
        ("tests/files/test_untrusted.py",),
    ),
    Mutant(
        "a file written in its place",
        "emma_adapter/files/atomic.py",
        "os.replace(scratch / name, directory / name)",
        "(directory / name).write_bytes((scratch / name).read_bytes())",
        ("tests/checkpoints/test_saving_faults.py", "-k", "killed or sequence"),
    ),
    # All variants of the kernels for one GPU instead of four, half of the random shapes.
    Mutant(
        "a tile that spills",
        "emma_adapter/kernels/cross_attention/tiles.py",
        'torch.bfloat16: {"BLOCK_M": 64,',
        'torch.bfloat16: {"BLOCK_M": 256,',
        ("tests/kernels/test_compiled.py", "-k", "bfloat16"),
    ),
    Mutant(
        "an instruction that is all masked",
        "emma_adapter/alignment/fusion/nonfinite.py",
        "return uninstructed if bool(uninstructed.any()) else None",
        "return None",
        ("tests/alignment/test_numbers.py", "tests/alignment/test_fusion.py", "-k", "masked"),
    ),
    Mutant(
        "grids a half token apart",
        "emma_adapter/alignment/fusion/resampling.py",
        "(torch.arange(target, dtype=torch.float64) + 0.5) * step - 0.5",
        "torch.arange(target, dtype=torch.float64) * step",
        ("tests/alignment/test_fusion.py",),
    ),
    # One engine a launcher, the command line in the tests' own process, a minute of load at night.
    Mutant(
        "a process without images that others wait for",
        "emma_adapter/patching/without_images.py",
        "    state.context.ties_embeddings = True",
        "    state.context.ties_embeddings = False",
        ("tests/distributed/test_processes.py",),
    ),
    Mutant(
        "an option by another name",
        "emma_adapter/cli/report.py",
        '@click.option("--limit",',
        '@click.option("--at-most", "limit",',
        ("tests/cli/test_report_command.py",),
    ),
    Mutant(
        "a cache without bounds",
        "emma_adapter/instructions/cache.py",
        "while len(self._values) > self.maxsize:",
        "while len(self._values) > 10**9:",
        ("tests/instructions/test_cache.py",),
    ),
    Mutant(
        "a cache without bounds, under load",
        "emma_adapter/instructions/cache.py",
        "while len(self._values) > self.maxsize:",
        "while len(self._values) > 10**9:",
        ("tests/patching/test_soak.py",),
        night=True,
    ),
    Mutant(
        "handwriting in two splits",
        "benchmarks/digits_vqa/scenes.py",
        '"test": (1400, 1797)',
        '"test": (1300, 1797)',
        ("tests/benchmarks/test_digits_vqa.py",),
        night=True,
    ),
)


def run(folder: Path, tests: Sequence[str], *, night: bool) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-rfE", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(folder), "TEST_BUDGET": "full" if night else ""}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS
    )
    if done.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(command)}: pytest could not run\n{done.stdout}\n{done.stderr}")
    return done


def noticed_by(mutant: Mutant) -> str | None:
    """The test that fails once the library is broken, and passes when it is whole again; None if there is none."""
    source = (ROOT / mutant.path).read_text()
    if source.count(mutant.before) != 1:
        raise SystemExit(f"{mutant.name}: {mutant.before!r} is {source.count(mutant.before)} times in {mutant.path}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for copied in COPIED:
            copy = shutil.copytree if (ROOT / copied).is_dir() else shutil.copy
            copy(ROOT / copied, folder / copied)
        # As an installation does, so that the copy is what is imported.
        (folder / "emma_adapter" / "integrations").symlink_to(folder / "integrations")
        (folder / mutant.path).write_text(source.replace(mutant.before, mutant.after))
        done = run(folder, mutant.tests, night=mutant.night)
        if done.returncode == 0:
            return None
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
        assert failed is not None, done.stdout
        test = failed[1] if "[" not in failed[1] else failed[1].partition("[")[0]
        (folder / mutant.path).write_text(source)
        if run(folder, [test], night=mutant.night).returncode != 0:
            raise SystemExit(f"{mutant.name}: {test} fails where nothing is broken, too")
        return test


def main(names: list[str]) -> int:
    survived = 0
    for mutant in MUTANTS:
        if names and mutant.name not in names:
            continue
        test = noticed_by(mutant)
        survived += test is None
        print(f"{mutant.name:46} {'at night ' if mutant.night else 'each time'} {test or 'SURVIVED'}", flush=True)
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
