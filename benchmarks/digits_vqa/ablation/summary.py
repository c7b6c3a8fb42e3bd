"""The results in short tables: whether it helps, at what, which parts matter, and with how much compression."""

from __future__ import annotations

from ..questions import QUESTION_TYPES
from . import recipes
from .results import Results
from .statistics import Estimate


def plain(estimate: Estimate) -> str:
    # Spaces that no narrow column breaks.
    return f"{100 * estimate.value:.1f}\u00a0±\u00a0{100 * estimate.half_width:.1f}"


def signed(estimate: Estimate) -> str:
    return f"{100 * estimate.value:+.1f} ({100 * estimate.low:+.1f} to {100 * estimate.high:+.1f})"


def arms_table(results: Results) -> str:
    """Markdown: the arms at one token an image but for the parts of a fusion."""
    fusion = results.fusion
    names = [recipes.BASE, *recipes.controls(fusion), recipes.random_tower(fusion), recipes.llm_embeddings(fusion)]
    names += [other for other in recipes.FUSIONS if other != fusion] + [fusion]
    names += [recipes.with_projector(other) for other in recipes.FUSIONS if other != fusion]
    names.append(recipes.with_projector(fusion))
    lines = [
        "| what is trained | parameters | mean, % | pairs, both right, % | over the best control of its size |",
        "|---|---:|---:|---:|---:|",
    ]
    for arm in results.found(names):
        control = results.best_control(arm)
        gain = "" if control is None else signed(results.gain(arm, control))
        name = {recipes.BASE: "nothing", fusion: f"**{fusion}**"}.get(arm.arm, arm.arm)
        cells = [name, f"{arm.parameters:,}", plain(results.mean(arm)), plain(results.pair_accuracy(arm)), gain]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def types_table(results: Results) -> str:
    """Markdown: which questions gain."""
    fusion = results.fusion
    names = [recipes.BASE, recipes.LORA_ALL, recipes.shuffled(fusion), *recipes.FUSIONS, recipes.with_projector(fusion)]
    arms = results.found(names)
    lines = ["| | " + " | ".join(arm.arm for arm in arms) + " |", "|---|" + "---:|" * len(arms)]
    for type in QUESTION_TYPES:
        shares = [f"{100 * results.mean_of_type(arm, type):.1f}" for arm in arms]
        lines.append(f"| {type} | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def parts_table(results: Results) -> str:
    """Markdown: fusions with one thing changed, over the fusion as it is."""
    lines = ["| one thing changed | mean, % | over the fusion as it is |", "|---|---:|---:|"]
    for fusion, names in (("linear", recipes.LINEAR_PARTS), ("attention", recipes.ATTENTION_CHANGES)):
        whole = results.get(fusion)
        if whole is None:
            continue
        for arm in results.found(names):
            lines.append(f"| {arm.arm} | {plain(results.mean(arm))} | {signed(results.gain(arm, whole))} |")
    return "\n".join(lines)


def pooled_arms(fusion: str) -> list[str]:
    """What there is with other poolings."""
    return [recipes.BASE, recipes.LORA_ALL, recipes.PROJECTOR_LORA, fusion, recipes.with_projector(fusion)]


def poolings_table(results: Results) -> str:
    """Markdown: the adapter and LoRA with less and less compression."""
    fusion = results.fusion
    names = pooled_arms(fusion)
    lines = [f"| tokens an image | {' | '.join(names)} | {fusion} over the best control of its size |"]
    lines.append("|---|" + "---:|" * (len(names) + 1))
    for tokens in results.poolings:
        means = [plain(results.mean(arm)) if (arm := results.get(name, tokens)) else "" for name in names]
        arm = results.get(fusion, tokens)
        control = None if arm is None else results.best_control(arm)
        gain = "" if arm is None or control is None else signed(results.gain(arm, control))
        lines.append(f"| {tokens} | " + " | ".join([*means, gain]) + " |")
    return "\n".join(lines)
