"""The tables of the runs that are finished: ``python -m benchmarks.photos_vqa.report``."""

from __future__ import annotations

from pathlib import Path

import click

from ..digits_vqa.ablation import records
from ..digits_vqa.ablation.plan import RATES, SEEDS
from ..digits_vqa.ablation.recipes import BASE, joint, lora
from ..digits_vqa.ablation.results import ArmResult, Results
from ..digits_vqa.ablation.settings import Settings
from ..digits_vqa.ablation.summary import plain, signed, table, tokens
from ..digits_vqa.questions import Question
from .bases import WHOLE
from .data import ask_for_pairs, ask_for_test
from .questions import QUESTION_TYPES
from .settings import PhotoSettings
from .study import ARMS, FUSION, POOLINGS_MEASURED

RESULTS = Path("benchmarks/results/photos-vqa.jsonl")

#: What an arm is compared with: LoRA of as many parameters in all.
_OF_ITS_SIZE = {FUSION: lora(), joint(FUSION): lora(2)}


class PhotoResults(Results):
    """The test runs of this study."""

    def asked(self, settings: Settings) -> tuple[list[Question], list[Question]]:
        _, questions = ask_for_test(settings.test_scenes, "test")
        _, _, pairs = ask_for_pairs(settings.test_scenes, "test")
        return questions, pairs


def markdown(results: Results) -> str:
    parts = []
    for pooling in POOLINGS_MEASURED:
        found = results.found((BASE, *ARMS), pooling)
        if found:
            parts += [f"{tokens(pooling)}:", _arms_table(results, found), _types_table(results, found)]
    parts.append(_notes())
    return "\n\n".join(parts) + "\n"


def _arms_table(results: Results, arms: list[ArmResult]) -> str:
    rows = []
    for arm in arms:
        control = results.get(_OF_ITS_SIZE.get(arm.arm, ""), arm.pooling)
        complete = arm.arm == BASE or arm.runs == len(SEEDS)
        rows.append(
            [
                ("nothing" if arm.arm == BASE else arm.arm) + ("" if complete else f" ({arm.runs} runs)"),
                f"{arm.parameters:,}",
                "" if not arm.parameters else f"{arm.rate:g}" + ("*" if arm.rate_at_edge else ""),
                f"{arm.seconds:.0f}",
                plain(results.mean(arm)),
                plain(results.pair_accuracy(arm)),
                "" if control is None else signed(results.gain(arm, control)),
            ]
        )
    header = ["what is trained", "parameters", "rate", "CPU s a run", "mean, %", "pairs, both right, %"]
    return table([*header, "over LoRA of its size"], rows)


def _types_table(results: Results, arms: list[ArmResult]) -> str:
    columns = {arm.arm: arm for arm in arms}
    ceiling = results.get(BASE, WHOLE)
    if ceiling is not None:
        columns[f"{BASE}, {WHOLE} tokens"] = ceiling
    rows = [
        [type or "**mean**", *(f"{100 * results.mean_of_type(arm, type):.1f}" for arm in columns.values())]
        for type in (*QUESTION_TYPES, None)
    ]
    return table(["", *columns], rows)


def _notes() -> str:
    return (
        f"Means over {len(SEEDS)} seeds on one base model, of photographs that were in no training; ± and ranges are "
        "95 % intervals of a bootstrap over scenes, paired by question where two arms are compared. They don't tell "
        "how far other photographs or other base models would move the results. Rates were chosen on the validation "
        f"photographs, from the same {len(RATES)} for every arm; *: the lowest or highest of them."
    )


def write_report(path: Path, settings: PhotoSettings) -> None:
    """``.md`` beside the results file."""
    found = records.of_settings(records.read(path), settings)
    text = markdown(PhotoResults(found, settings, FUSION))
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    click.echo(f"{text}\nWritten to {path.with_suffix('.md')}.")


@click.command(help=__doc__)
@click.option("--results", type=click.Path(path_type=Path, dir_okay=False, exists=True), default=RESULTS)
def main(results: Path) -> None:
    found = records.read(results)
    if not found:
        raise click.ClickException(f"{results} has no finished run yet")
    write_report(results, PhotoSettings(**found[-1].settings))


if __name__ == "__main__":
    main()
