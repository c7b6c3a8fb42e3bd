"""``emma-adapter evaluate-drawing``: measure how well a model draws and edits."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from .drawing import load_drawing_model, side
from .options import chosen_device, device_option, dtype_option, images_option, subfolder_option, trust_option

_SCALE, _SHARE = click.FloatRange(0), click.FloatRange(0, 1)


@click.command(name="evaluate-drawing")
@click.argument("prompts", type=click.Path(exists=True, path_type=Path, dir_okay=False), metavar="PROMPTS")
@click.option("--output", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder of pictures.")
@click.option("--model", help="The base model that draws. Default: score the pictures that are there.")
@click.option("--adapter", help="What unified.save_pretrained wrote: a folder or a hub id.")
@subfolder_option
@click.option("--autoencoder", help="A folder or a hub id. Default: the one it was trained with.")
@images_option
@click.option("--num-images", default=4, show_default=True, type=click.IntRange(1), help="For each prompt.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 1))
@click.option("--steps", default=20, show_default=True, type=click.IntRange(1), help="Steps of the solver.")
@click.option("--solver", default="euler", show_default=True, type=click.Choice(["euler", "heun"]))
@click.option("--guidance-scale", default=3.0, show_default=True, type=_SCALE, help="By the text; 1 is none.")
@click.option(
    "--image-guidance-scale", default=2.0, show_default=True, type=_SCALE, help="By an edit's image; 1 is none."
)
@click.option("--height", type=side, help="In pixels. Default: 512, or the image's.")
@click.option("--width", type=side, help="In pixels. Default: 512, or the image's.")
@click.option("--detector", help="Finds objects: a zero-shot detector, as OWLv2.")
@click.option("--colours", help="Names their colours: a CLIP model.")
@click.option("--judge", help="Answers questions and marks edits: a vision-language model.")
@click.option("--threshold", default=0.3, show_default=True, type=_SHARE, help="Confidence of the detector.")
@click.option("--counting-threshold", default=0.3, show_default=True, type=_SHARE, help='For rows tagged "counting".')
@click.option("--max-overlap", default=0.7, show_default=True, type=_SHARE, help="Of boxes of one class; 1 allows any.")
@click.option("--real", type=click.Path(exists=True, path_type=Path, file_okay=False), help="Folder of real pictures.")
@click.option("--features", help="Features for FID and KID: a vision model.")
@click.option(
    "--distance", "kinds", multiple=True, default=("fid", "kid"), show_default=True, type=click.Choice(["fid", "kid"])
)
@device_option
@dtype_option
@trust_option
def evaluate_drawing(
    prompts: Path,
    output: Path,
    model: str | None,
    adapter: str | None,
    images: Path | None,
    detector: str | None,
    colours: str | None,
    judge: str | None,
    threshold: float,
    counting_threshold: float,
    max_overlap: float,
    real: Path | None,
    features: str | None,
    kinds: tuple[str, ...],
    device: str | None,
    dtype: str,
    trust_remote_code: bool,
    **settings: Any,
) -> None:
    """Draw the pictures of PROMPTS, have them judged, and compare them with real ones.

    PROMPTS is a .jsonl file, or DPG-Bench's dpg_bench.csv. Rows are GenEval's metadata, {"prompt": "...", "questions":
    [{"question": "...", "after": [1]}]}, or {"prompt": "...", "image": "PATH"}. What is drawn already isn't drawn
    again. Pictures from elsewhere go to OUTPUT/00000/samples/ and so on, a folder a row.
    """
    if (model is None) != (adapter is None):
        raise click.UsageError("--model and --adapter go together: they draw. Leave out both to score what is there")
    if (real is None) != (features is None):
        raise click.UsageError("--real and --features go together: the pictures to compare with, and how")
    from ..evaluation.scoring import Judges, score
    from ..evaluation.summary import as_json, summarise, table
    from ..evaluation.tasks import read_tasks
    from ..files.atomic import replace_files

    tasks = read_tasks(prompts, images)
    place, folder = chosen_device(device), prompts.parent if images is None else images
    if model is not None:
        loading = {"device": place, "dtype": dtype, "trust_remote_code": trust_remote_code}
        _draw(tasks, output, folder, {"model": model, "adapter": adapter, **settings}, loading)
    judges = Judges(
        threshold=threshold,
        counting_threshold=counting_threshold,
        max_overlap=max_overlap,
        **_load(detector, colours, judge, place, dtype, trust_remote_code),
    )
    unjudged = Counter(task.kind for task in tasks if task.kind != "nothing" and not judges.can_judge(task))
    needed = {"objects": "--detector, and --colours for colours", "questions": "--judge", "edits": "--judge"}
    for kind, count in unjudged.items():
        click.echo(f"Not judged: {count} rows of {kind}; that takes {needed[kind]}")
    scores = list(score(tasks, output, folder, judges))
    summary: dict[str, Any] = {
        "judges": {"detector": detector, "colours": colours, "judge": judge},
        "threshold": threshold,
        "counting_threshold": counting_threshold,
        "max_overlap": max_overlap,
        "not_judged": dict(unjudged),
    }
    if scores:
        lines = summarise(scores)
        click.echo(table(lines))
        summary["scores"] = as_json(lines)
    lines_of_scores = "".join(json.dumps(asdict(task_score)) + "\n" for task_score in scores).encode()
    replace_files(output, {"scores.jsonl": lines_of_scores, "summary.json": _encoded(summary)})
    if real is not None and features is not None:
        # The scores are saved first: this fails if there are too few pictures.
        summary["distances"] = _distances(features, place, tasks, output, real, kinds)
        replace_files(output, {"summary.json": _encoded(summary)})
    click.echo(f"Saved to {output / 'summary.json'}")


def _encoded(summary: dict[str, Any]) -> bytes:
    return (json.dumps(summary, indent=1) + "\n").encode()


def _draw(tasks: Any, output: Path, folder: Path, settings: dict[str, Any], loading: dict[str, Any]) -> None:
    """Draw the missing pictures; the model's memory is free afterwards."""
    from ..evaluation.pictures import begin, draw_missing

    count = settings.pop("num_images")
    begin(output, {**settings, "dtype": loading["dtype"]})
    sources = {name: settings.pop(name) for name in ("model", "adapter", "subfolder", "autoencoder")}
    steps = settings.pop("steps")
    unified = load_drawing_model(**sources, **loading)
    unified.set_progress_bar_config(disable=True)
    with click.progressbar(tasks, label="Drawing") as shown_tasks:
        drawn = draw_missing(unified, shown_tasks, output, folder, count, num_inference_steps=steps, **settings)
    click.echo(f"Drawn: {drawn} pictures; {len(tasks) * count - drawn} were there")


def _load(
    detector: str | None, colours: str | None, judge: str | None, place: Any, dtype: str, trust: bool
) -> dict[str, Any]:
    from ..evaluation.judges import ColourClassifier, Detector, VisionLanguageJudge

    return {
        "detector": Detector(detector, place) if detector else None,
        "colours": ColourClassifier(colours, place) if colours else None,
        "asked": VisionLanguageJudge(judge, place, dtype, trust_remote_code=trust) if judge else None,
    }


def _distances(features: str, place: Any, tasks: Any, output: Path, real: Path, kinds: tuple[str, ...]) -> Any:
    from ..evaluation.distances import FeatureNetwork, distances
    from ..evaluation.pictures import listed_pictures, pictures_of

    drawn = [path for task in tasks for path in pictures_of(task, output)]
    results = distances(FeatureNetwork(features, place), drawn, listed_pictures(real), kinds)
    for kind in kinds:
        more = f" ± {results['kid_deviation']:.4f} over subsets" if kind == "kid" else ""
        click.echo(
            f"{kind.upper()}: {results[kind]:.4f}{more}, {results['drawn']} pictures beside {results['real']} real ones"
        )
    return results
