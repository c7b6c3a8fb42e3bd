"""Table and figure of the runs that are finished: ``python -m benchmarks.digits_vqa.ablation.report``."""

from __future__ import annotations

from pathlib import Path

import click

from . import recipes, records
from .figure import draw
from .plan import Settings
from .results import Results
from .table import markdown

RESULTS = Path("benchmarks/results/digits-ablation.jsonl")


def write_report(results: Path, settings: Settings, fusion: str, picture: Path | None = None) -> None:
    """``.md`` beside the results file, and the figure as ``.png`` beside it or as ``picture``."""
    found = Results(records.of_settings(records.read(results), settings), settings, fusion)
    picture = picture or results.with_suffix(".png")
    table = markdown(found)
    results.with_suffix(".md").write_text(table, encoding="utf-8")
    draw(found, picture)
    click.echo(f"{table}\nWritten to {results.with_suffix('.md')} and {picture}.")


@click.command(help=__doc__)
@click.option("--results", type=click.Path(path_type=Path, dir_okay=False, exists=True), default=RESULTS)
@click.option("--fusion", type=click.Choice(recipes.FUSIONS), default="modulation", show_default=True)
@click.option("--figure", type=click.Path(path_type=Path, dir_okay=False), help="Default: beside the results.")
def main(results: Path, fusion: str, figure: Path | None) -> None:
    found = records.read(results)
    if not found:
        raise click.ClickException(f"{results} has no finished run yet")
    write_report(results, Settings(**found[-1].settings), fusion, figure)


if __name__ == "__main__":
    main()
