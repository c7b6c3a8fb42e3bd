"""Run what is left of the plan: whatever is ready, the most valuable first."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from pathlib import Path

import click
from tqdm import tqdm

from . import bases, records, worker
from .duration import seconds
from .plan import Cell, Job, Towers, needs, with_needs
from .records import Record
from .settings import Settings


class Sweep:
    """The state of a sweep: what is finished is in the results file and the work folder, and nowhere else.

    Another benchmark's sweep says how its own jobs are done, by a subclass.
    """

    #: ``execute(job, settings, work)``, in a process of its own.
    execute = staticmethod(worker.execute)
    #: ``needs(job, settings)``: the job that has to be done before it.
    needs = staticmethod(needs)
    #: ``is_made(job, settings, work)``, of a job that isn't a run.
    is_made = staticmethod(bases.is_made)
    #: ``seconds(job, settings)`` on one core.
    seconds = staticmethod(seconds)

    def __init__(self, jobs: Sequence[Job], settings: Settings, results: Path, work: Path) -> None:
        self.settings, self.results, self.work = settings, results, work
        self._records = records.of_settings(records.read(results), settings)
        self._finished = {record.cell for record in self._records}
        cells = {job for job in jobs if isinstance(job, Cell) and not self.is_done(job)}
        self.pending = [job for job in with_needs(jobs, cells, settings, self.needs) if not self.is_done(job)]

    def is_done(self, job: Job) -> bool:
        if not isinstance(job, Cell):
            return self.is_made(job, self.settings, self.work)
        resolved = self._resolved(job)
        return resolved is not None and resolved in self._finished

    def run(self, executor: Executor, workers: int) -> None:
        """Until nothing is pending; after an interruption, what was running is lost and nothing else.

        Raises:
            click.ClickException: if a job failed, naming it.
        """
        self.results.parent.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(parents=True, exist_ok=True)
        records.drop_cut_off_line(self.results)
        running: dict[Future[Record | None], Job] = {}
        total = sum(self.seconds(job, self.settings) for job in self.pending)
        # In seconds of one core, because jobs differ: the time left is then right.
        layout = "{desc}: {percentage:3.0f}% |{bar}| {elapsed} < {remaining}{postfix}"
        with tqdm(total=total, bar_format=layout, desc="0 done", mininterval=1) as bar:
            done, number = 0, len(self.pending)
            while self.pending or running:
                while len(running) < workers and (job := self._next()) is not None:
                    future = executor.submit(self.execute, self._resolved(job) or job, self.settings, self.work)
                    running[future] = job
                for future in wait(running, timeout=5, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    self._finish(job, future)
                    done += 1
                    bar.update(self.seconds(job, self.settings))
                    bar.set_postfix_str(_name(job), refresh=False)
                bar.set_description(f"{done} of {number} jobs")

    def run_in_processes(self, workers: int) -> None:
        """:meth:`run` in processes of one thread, whose logs are in the work folder.

        Raises:
            click.ClickException: if it is interrupted, or a job failed.
        """
        context = multiprocessing.get_context("spawn")
        others = set(multiprocessing.active_children())
        executor = ProcessPoolExecutor(
            workers, mp_context=context, initializer=worker.start_process, initargs=(self.work / "worker.log",)
        )
        try:
            self.run(executor, workers)
        except KeyboardInterrupt:
            raise click.ClickException("interrupted; start the command again to go on where it stopped") from None
        finally:
            # What is still running would only keep the console waiting.
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            executor.shutdown(wait=False, cancel_futures=True)

    def _next(self) -> Job | None:
        """The first that waits for nothing, taken out."""
        for place, job in enumerate(self.pending):
            if self._is_ready(job):
                return self.pending.pop(place)
        return None

    def _is_ready(self, job: Job) -> bool:
        needed = self.needs(job, self.settings)
        waits = isinstance(job, Cell) and self._resolved(job) is None
        return not waits and (needed is None or self.is_done(needed))

    def _resolved(self, job: Job) -> Cell | None:
        """The run with its rate; None if that isn't known yet, or it is no run."""
        if not isinstance(job, Cell):
            return None
        if job.rate is not None:
            return job
        rate = records.best_rate(self._records, job.arm, job.pooling)
        return None if rate is None else job._replace(rate=rate)

    def _finish(self, job: Job, future: Future[Record | None]) -> None:
        try:
            record = future.result()
        except Exception as error:
            raise click.ClickException(
                f"the job {_name(job)} failed: {type(error).__name__}: {error}. What was finished before is kept; "
                f"start the command again to go on. Logs are in {self.work}"
            ) from error
        if record is not None:
            records.append(self.results, record)
            self._records.append(record)
            self._finished.add(record.cell)


def _name(job: Job) -> str:
    if isinstance(job, Towers):
        return f"towers {job.base}"
    base = f"base {job.base}, pooled to {job.pooling}"
    return f"{job.arm}, {base}, seed {job.seed}, {job.split}" if isinstance(job, Cell) else base
