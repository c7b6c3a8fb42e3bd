"""make_report, which computes a report from a patched model and questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from ..adapter.handle import EmmaAdapter
from ..errors import AnalysisError
from ..models.prompts import Prompts
from . import compute_sections
from .adapter_facts import facts_of
from .contents import Absent, Report
from .examples import explain, explain_twins
from .questions import Entry, Question, choose, entry_of, find_twins

T = TypeVar("T")
#: Takes a label and a sequence, and returns a context manager of what to iterate over instead, as does
#: ``click.progressbar``.
Watch = Callable[[str, Sequence[Any]], AbstractContextManager[Any]]


def make_report(
    adapter: EmmaAdapter,
    processor: Any,
    questions: Sequence[Question],
    *,
    model_name: str = "model",
    adapter_name: str = "adapter",
    show: int = 8,
    batch_size: int = 8,
    max_new_tokens: int = 32,
    watch: Watch | None = None,
) -> Report:
    """Compute everything that the page shows. The model is left as it was.

    Args:
        adapter: of a patched model; see :func:`~emma_adapter.load_adapter`.
        processor: the model's, with a chat template.
        questions: read one by one, several times; at most a batch of them is held at once.
        model_name: for the page.
        adapter_name: for the page.
        show: how many questions to show with their answers; the choice doesn't depend on the answers.
        batch_size: of the other sections, which read all questions.
        max_new_tokens: of each answer.
        watch: shows the progress; default: nothing does.

    Raises:
        AnalysisError: if no question shows an image, or the processor has no chat template.
    """
    if getattr(processor, "chat_template", None) is None:
        raise AnalysisError(
            f"the {type(processor).__name__} has no chat template, by which questions become prompts: set "
            "processor.chat_template, or take a model that has one"
        )
    prompts = Prompts(processor)
    watch = unwatched if watch is None else watch
    with watch("Reading the questions", range(len(questions))) as numbers:
        possible_entries = [entry_of(questions[number], number) for number in numbers]
    entries = [entry for entry in possible_entries if entry is not None]
    if not entries:
        raise AnalysisError(
            f"none of the {len(questions)} questions shows an image, and an adapter does nothing else: name the images "
            "of each question"
        )

    def batches(label: str | None, subset: Sequence[Entry]) -> AbstractContextManager[Iterator[Any]]:
        chunks = [subset[start : start + batch_size] for start in range(0, len(subset), batch_size)]
        return _Batches(nullcontext(chunks) if label is None else watch(label, chunks), questions, prompts)

    shown = choose(entries, show)
    with watch("Asking", shown) as watched:
        examples = [
            explain(adapter, prompts, questions[entry.place], entry.place + 1, max_new_tokens) for entry in watched
        ]
    couples = find_twins(entries, 2)
    with watch("Comparing questions", couples) as watched:
        twins = [
            explain_twins(
                adapter,
                prompts,
                [questions[entry.place] for entry in couple],
                (couple[0].place + 1, couple[1].place + 1),
                max_new_tokens,
            )
            for couple in watched
        ]
    return Report(
        model=model_name,
        adapter=adapter_name,
        facts=facts_of(adapter),
        rows=len(questions),
        imageless=len(questions) - len(entries),
        field="gain" if adapter.config.fusion == "modulation" else "relative",
        examples=tuple(examples),
        twins=tuple(twins) or Absent("No two of these questions with different words are about the same image."),
        reading=compute_sections.reading(adapter, entries, batches),
        information=compute_sections.information(adapter, entries, batches, prompts),
        pairs=compute_sections.pairs(adapter, entries, batches),
        diagnosis=compute_sections.diagnosis(adapter, entries, batches),
    )


class _Batches:
    """A context manager of the batches of some questions, which are made one at a time."""

    def __init__(self, chunks: AbstractContextManager[Any], questions: Sequence[Question], prompts: Prompts) -> None:
        self._chunks, self._questions, self._prompts = chunks, questions, prompts

    def __enter__(self) -> Iterator[Any]:
        return self._make(self._chunks.__enter__())

    def __exit__(self, *error: Any) -> None:
        self._chunks.__exit__(*error)

    def _make(self, chunks: Any) -> Iterator[Any]:
        for chunk in chunks:
            questions = [self._questions[entry.place] for entry in chunk]
            yield self._prompts.batch([each.messages for each in questions], [each.images for each in questions])


def unwatched(label: str, items: Sequence[T]) -> AbstractContextManager[Sequence[T]]:
    """Return a context manager of the items themselves: a ``Watch`` that shows nothing."""
    return nullcontext(items)
