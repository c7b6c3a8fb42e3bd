"""The tables, and what they say, in Markdown."""

from __future__ import annotations

from . import recipes
from .plan import BASES, RATES, SEEDS
from .results import ArmResult, Results
from .summary import arms_table, parts_table, plain, pooled_arms, poolings_table, signed, types_table

#: The gain over the best control of equal size that is asked of the adapter.
GOAL = 0.05


def sections(fusion: str) -> dict[str, list[str]]:
    """Arms at one token an image, in the order of table and figure."""
    return {
        "controls": [recipes.BASE, *recipes.controls(fusion)],
        "adapter only": [*recipes.FUSIONS, recipes.llm_embeddings(fusion), recipes.random_tower(fusion)],
        "projector + adapter": [recipes.with_projector(other) for other in recipes.FUSIONS],
        "parts of linear": list(recipes.LINEAR_PARTS),
        "attention, one thing changed": list(recipes.ATTENTION_CHANGES),
    }


def markdown(results: Results) -> str:
    """The tables in short, what they say, and all arms."""
    lines = [_header("arm"), _RULE]
    for section, arms in sections(results.fusion).items():
        if found := results.found(arms):
            lines.append(f"| *{section}* |" + " |" * 7)
        lines += [_row(results, arm) for arm in found]
    for tokens in results.poolings:
        if tokens > 1:
            lines.append(f"| *{tokens} tokens an image* |" + " |" * 7)
            lines += [_row(results, arm) for arm in results.found(pooled_arms(results.fusion), tokens)]
    short = [
        *(arms_table(results), "", "By type of question, means in %:", "", types_table(results), ""),
        *("Parts:", "", parts_table(results), "", "Less compression, means in %:", "", poolings_table(results)),
    ]
    return "\n".join([*short, "", *_conclusions(results), "", "All arms:", "", *lines, "", _notes(results), ""])


_RULE = "|---|---:|---:|---:|---:|---:|---:|---:|"


def _header(name: str) -> str:
    return (
        f"| {name} | parameters | CPU s a run | rate | mean, % | pairs, both right, % | gain over the best control | "
        "by base checkpoint |"
    )


def _row(results: Results, arm: ArmResult) -> str:
    rate = "" if not arm.parameters else f"{arm.rate:g}" + ("*" if arm.rate_at_edge else "")
    gain = by_base = ""
    if (control := results.best_control(arm)) is not None:
        gain = signed(results.gain(arm, control))
        by_base = ", ".join(f"{100 * value:+.1f}" for value in results.gain_by_base(arm, control))
    complete = arm.arm == recipes.BASE or arm.runs == len(BASES) * len(SEEDS)
    cells = [
        arm.arm + ("" if complete else f" ({arm.runs} runs)"),
        f"{arm.parameters:,}",
        f"{arm.seconds:.0f}",
        rate,
        plain(results.mean(arm)),
        plain(results.pair_accuracy(arm)),
        gain,
        by_base,
    ]
    return "| " + " | ".join(cells) + " |"


def _notes(results: Results) -> str:
    return (
        f"Means over {len(BASES)} base checkpoints and {len(SEEDS)} seeds each, of the test split; ± and ranges are "
        "95 % intervals of a bootstrap over scenes, paired by question where two arms are compared. The best control "
        "is the one with the highest mean on the test itself, among the controls with at most 5 % more parameters than "
        f"the arm, or than {recipes.ADAPTER_SIZE:,}. Rates were chosen on the validation split, from the same "
        f"{len(RATES)} for every arm; *: the lowest or highest of them."
    )


def _conclusions(results: Results) -> list[str]:
    lines = []
    fusion = results.get(results.fusion)
    if fusion is not None:
        others = results.found((recipes.random_tower(results.fusion), recipes.llm_embeddings(results.fusion)))
        for other in (*results.controls(fusion), *others):
            lines.append(f"- `{fusion.arm}` over {other.arm}: {signed(results.gain(fusion, other))} points.")
    lines += _goal(results)
    not_gained: list[str] = []
    for arm in results.arms.values():
        control = results.best_control(arm)
        if control is not None:
            name = f"{arm.arm} ({arm.pooled_tokens} token{'s' * (arm.pooled_tokens > 1)})"
            if results.gain(arm, control).low <= 0:
                not_gained.append(name)
    lines.append(
        f"- No gain over the best control that the interval tells from zero: {'; '.join(not_gained) or 'none'}."
    )
    return lines


def _goal(results: Results) -> list[str]:
    lines = []
    for (name, tokens), arm in sorted(results.arms.items(), key=lambda item: item[0][1]):
        if name not in (results.fusion, recipes.with_projector(results.fusion)):
            continue
        control = results.best_control(arm)
        if control is not None:
            gain = results.gain(arm, control)
            verdict = "reached" if gain.value >= GOAL else "missed"
            lines.append(
                f"- {name}, {tokens} token{'s' * (tokens > 1)} an image: {signed(gain)} points over {control.arm}, "
                f"the best control of equal size; the goal of {100 * GOAL:.0f} is {verdict}."
            )
    return lines
