"""All tables of a study, and what they say, in Markdown."""

from __future__ import annotations

from . import recipes
from .plan import BASES, RATES, SEEDS
from .results import ArmResult, Results
from .summary import (
    arms_table,
    ceilings_table,
    goals,
    parts_table,
    plain,
    poolings_table,
    practice_table,
    roles_table,
    signed,
    tokens,
    types_table,
)


def sections(fusion: str) -> dict[str, list[str]]:
    """All arms, in the order of table and figure."""
    by_llm = recipes.llm_embeddings(fusion)
    adapters = [*recipes.FUSIONS, recipes.TWO_STEPS, recipes.with_roles(fusion), by_llm, recipes.with_roles(by_llm)]
    adapters += [recipes.behind_projector(fusion), recipes.MODA]
    return {
        "controls": [recipes.BASE, *recipes.controls(fusion)],
        "adapter only": [*adapters, recipes.random_tower(fusion)],
        "projector + adapter": [recipes.with_projector(other) for other in recipes.FUSIONS],
        "adapter + LoRA": [recipes.joint(fusion, multiple) for multiple in recipes.MULTIPLES],
        "parts of linear": list(recipes.LINEAR_PARTS),
        "attention, one thing changed": list(recipes.ATTENTION_CHANGES),
    }


def practice_markdown(results: Results) -> str:
    """Of the study of what practice does."""
    ceiling = "the ceiling is what the base models with all 16 tokens answer, in brackets the share of the way there"
    by_type = {
        f"By type of question, {tokens(pooling)}, means in %; {ceiling}:": ceilings_table(results, pooling)
        for pooling in results.poolings
    }
    parts = {
        "": practice_table(results),
        "Goals:": "\n".join(goals(results)),
        "One token an image:": arms_table(results),
        **by_type,
        "What the instruction should hold:": roles_table(results),
    }
    return _page(results, parts)


def parts_markdown(results: Results) -> str:
    """Of the study of the fusions' parts."""
    parts = {
        "": arms_table(results),
        "By type of question, means in %:": types_table(results),
        "Parts:": parts_table(results),
        "Less compression, means in %:": poolings_table(results),
    }
    return _page(results, parts)


def _page(results: Results, parts: dict[str, str]) -> str:
    """Those parts that say something, and all arms."""
    parts |= {"Gains:": "\n".join(_conclusions(results)), "All arms:": _all_arms(results)}
    found = [text for title, part in parts.items() if part for text in (title, part) if text]
    return "\n\n".join([*found, _notes(results)]) + "\n"


def _all_arms(results: Results) -> str:
    lines = [
        "| arm | parameters | CPU s a run | rate | mean, % | pairs, both right, % | gain over the best control | "
        "by base checkpoint |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for pooling in results.poolings:
        lines.append(f"| *{tokens(pooling)}* |" + " |" * 7)
        for arms in sections(results.fusion).values():
            lines += [_row(results, arm) for arm in results.found(arms, pooling)]
    return "\n".join(lines)


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
        f"the arm, or than A = {recipes.ADAPTER_SIZE:,}. Rates were chosen on the validation split, from the same "
        f"{len(RATES)} for every arm; *: the lowest or highest of them."
    )


def _conclusions(results: Results) -> list[str]:
    lines = []
    fusion = results.get(results.fusion)
    if fusion is not None:
        others = results.found((recipes.random_tower(results.fusion), recipes.llm_embeddings(results.fusion)))
        for other in (*results.controls(fusion), *others):
            lines.append(f"- `{fusion.arm}` over {other.arm}: {signed(results.gain(fusion, other))} points.")
    not_gained: list[str] = []
    for arm in results.arms.values():
        control = results.best_control(arm)
        if control is not None and results.gain(arm, control).low <= 0:
            not_gained.append(f"{arm.arm} ({tokens(arm.pooling)})")
    lines.append(
        f"- No gain over the best control that the interval tells from zero: {'; '.join(not_gained) or 'none'}."
    )
    return lines
