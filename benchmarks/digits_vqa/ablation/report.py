"""Table and figure of the runs that are finished: ``python -m benchmarks.digits_vqa.ablation.report``."""

from __future__ import annotations

from pathlib import Path

import click

from . import recipes, records
from .figure import draw
from .results import Results
from .settings import Settings
from .studies import STUDIES, Study

study_option = click.option(
    "--study",
    "study_name",
    type=click.Choice(sorted(STUDIES)),
    default="practice",
    show_default=True,
    help="What practice does, or the parts of the fusions, on bases that were trained for less time.",
)


def write_report(study: Study, results: Path, settings: Settings, fusion: str, picture: Path | None = None) -> None:
    """``.md`` beside the results file, and the figure as ``.png`` beside it or as ``picture``."""
    found = Results(records.of_settings(records.read(results), settings), settings, fusion)
    picture = picture or results.with_suffix(".png")
    table = study.markdown(found)
    results.with_suffix(".md").write_text(table, encoding="utf-8")
    draw(found, picture)
    click.echo(f"{table}\nWritten to {results.with_suffix('.md')} and {picture}.")


@click.command(help=__doc__)
@study_option
@click.option("--results", type=click.Path(path_type=Path, dir_okay=False, exists=True), help="Default: the study's.")
@click.option("--fusion", type=click.Choice(recipes.FUSIONS), default="modulation", show_default=True)
@click.option("--figure", type=click.Path(path_type=Path, dir_okay=False), help="Default: beside the results.")
def main(study_name: str, results: Path | None, fusion: str, figure: Path | None) -> None:
    study = STUDIES[study_name]
    results = results or study.results
    found = records.read(results)
    if not found:
        raise click.ClickException(f"{results} has no finished run yet")
    write_report(study, results, type(study.settings)(**found[-1].settings), fusion, figure)


if __name__ == "__main__":
    main()
