"""The results in short tables: whether it helps, at what, and beside what."""

from __future__ import annotations

from collections.abc import Sequence

from ..questions import QUESTION_TYPES
from . import recipes
from .results import ArmResult, Results
from .statistics import Estimate

#: What the adapter and LoRA together shall gain over LoRA of the same total size, by pooling.
GOALS = {"1": 0.12, "4": 0.02, "16": 0.02}
#: The pooling at which nothing is lost: what its base model answers is the ceiling of the others.
UNPOOLED = "16"
#: Below such a distance to the ceiling, a share of it says nothing.
_LEAST_TO_GAIN = 0.02


def plain(estimate: Estimate) -> str:
    # Spaces that no narrow column breaks.
    return f"{100 * estimate.value:.1f}\u00a0±\u00a0{100 * estimate.half_width:.1f}"


def signed(estimate: Estimate) -> str:
    return f"{100 * estimate.value:+.1f} ({100 * estimate.low:+.1f} to {100 * estimate.high:+.1f})"


def tokens(pooling: str) -> str:
    number, _, how = pooling.partition(", ")
    return f"{number} token{'s' * (number != '1')} an image" + (f", {how}" if how else "")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, or nothing where there are no rows."""
    if not rows:
        return ""
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(header) - 1), *lines[1:]])


def practice_table(results: Results) -> str:
    """The adapter and LoRA, alone and together, beside LoRA of the same total size."""
    fusion, rows = results.fusion, []
    loras = [recipes.lora(multiple) for multiple in recipes.MULTIPLES]
    alone = [recipes.BASE, *loras, fusion]
    for pooling in results.poolings:
        cells = [_mean(results, results.get(name, pooling)) for name in alone]
        for multiple in (1, 2):
            both = results.get(recipes.joint(fusion, multiple), pooling)
            cells += [_mean(results, both), _gain(results, both, results.get(recipes.lora(multiple + 1), pooling))]
        if any(cells):
            rows.append([pooling, *cells])
    header = ["tokens an image", recipes.BASE, "LoRA, A", "LoRA, 2A", "LoRA, 3A", f"{fusion}, A"]
    header += [f"{fusion}, A, + LoRA, A", "over LoRA, 2A", f"{fusion}, A, + LoRA, 2A", "over LoRA, 3A"]
    return table(header, rows)


def goals(results: Results) -> list[str]:
    """Which of the goals are reached, by lines."""
    lines = []
    for pooling, goal in GOALS.items():
        for multiple in (1, 2):
            both = results.get(recipes.joint(results.fusion, multiple), pooling)
            control = results.get(recipes.lora(multiple + 1), pooling)
            if both is None or control is None:
                continue
            gain = results.gain(both, control)
            verdict = "reached" if gain.value >= goal else "missed"
            lines.append(
                f"- {both.arm}, {tokens(pooling)}: {signed(gain)} points over {control.arm}, which is as large; the "
                f"goal of {100 * goal:.0f} is {verdict}."
            )
    return lines


def arms_table(results: Results) -> str:
    """The arms at one token an image but for the parts of a fusion."""
    fusion = results.fusion
    names = [recipes.BASE, *recipes.controls(fusion), recipes.random_tower(fusion), recipes.llm_embeddings(fusion)]
    names += [other for other in recipes.FUSIONS if other != fusion] + [fusion, recipes.TWO_STEPS]
    names += [recipes.behind_projector(fusion), recipes.MODA]
    names += [recipes.with_projector(other) for other in recipes.FUSIONS if other != fusion]
    names += [recipes.with_projector(fusion), *(recipes.joint(fusion, multiple) for multiple in recipes.MULTIPLES)]
    rows = []
    for arm in results.found(names):
        control = results.best_control(arm)
        gain = "" if control is None else signed(results.gain(arm, control))
        name = {recipes.BASE: "nothing", fusion: f"**{fusion}**"}.get(arm.arm, arm.arm)
        rows.append([name, f"{arm.parameters:,}", plain(results.mean(arm)), plain(results.pair_accuracy(arm)), gain])
    header = ["what is trained", "parameters", "mean, %", "pairs, both right, %", "over the best control of its size"]
    return table(header, rows)


def types_table(results: Results) -> str:
    """Which questions gain, at one token an image."""
    fusion = results.fusion
    names = [recipes.BASE, recipes.lora(), recipes.shuffled(fusion), *recipes.FUSIONS, recipes.with_projector(fusion)]
    arms = results.found(names)
    rows = [[type, *(f"{100 * results.mean_of_type(arm, type):.1f}" for arm in arms)] for type in QUESTION_TYPES]
    return table(["", *(arm.arm for arm in arms)], rows)


def ceilings_table(results: Results, pooling: str) -> str:
    """Which questions gain, and in brackets which share of what there is to gain: from the base model to the one that
    loses nothing."""
    base, ceiling = results.get(recipes.BASE, pooling), results.get(recipes.BASE, UNPOOLED)
    if base is None or ceiling is None or base is ceiling:
        return ""
    fusion = results.fusion
    names = [recipes.lora(3), fusion, recipes.TWO_STEPS, recipes.joint(fusion), recipes.joint(fusion, 2)]
    arms = results.found(names, pooling)
    rows = []
    for type in (*QUESTION_TYPES, None):
        start, end = results.mean_of_type(base, type), results.mean_of_type(ceiling, type)
        cells = ["**mean**" if type is None else type, f"{100 * start:.1f}", f"{100 * end:.1f}"]
        for arm in arms:
            reached = results.mean_of_type(arm, type)
            share = f" ({100 * (reached - start) / (end - start):.0f} %)" if end - start > _LEAST_TO_GAIN else ""
            cells.append(f"{100 * reached:.1f}{share}")
        rows.append(cells)
    return table(["", recipes.BASE, "ceiling", *(arm.arm for arm in arms)], rows)


def roles_table(results: Results) -> str:
    """What the adapter loses if the words for the roles are in its instruction."""
    rows = []
    encoders = {"text tower": results.fusion, "`llm`": recipes.llm_embeddings(results.fusion)}
    for pooling in results.poolings:
        for encoder, name in encoders.items():
            alone, with_roles = results.get(name, pooling), results.get(recipes.with_roles(name), pooling)
            if alone is not None and with_roles is not None:
                means = [plain(results.mean(alone)), plain(results.mean(with_roles))]
                rows.append([f"{encoder}, {tokens(pooling)}", *means, signed(results.gain(with_roles, alone))])
    return table(["instruction encoder", "question alone, %", "with role words, %", "difference"], rows)


def parts_table(results: Results) -> str:
    """Fusions with one thing changed, over the fusion as it is."""
    rows = []
    for fusion, names in (("linear", recipes.LINEAR_PARTS), ("attention", recipes.ATTENTION_CHANGES)):
        whole = results.get(fusion)
        if whole is not None:
            found = results.found(names)
            rows += [[arm.arm, plain(results.mean(arm)), signed(results.gain(arm, whole))] for arm in found]
    return table(["one thing changed", "mean, %", "over the fusion as it is"], rows)


def poolings_table(results: Results) -> str:
    """The adapter and LoRA with less and less compression."""
    fusion, rows = results.fusion, []
    names = [recipes.BASE, recipes.lora(), recipes.PROJECTOR_LORA, fusion, recipes.with_projector(fusion)]
    for pooling in results.poolings:
        arm = results.get(fusion, pooling)
        gain = _gain(results, arm, None if arm is None else results.best_control(arm))
        rows.append([pooling, *(_mean(results, results.get(name, pooling)) for name in names), gain])
    return table(["tokens an image", *names, f"{fusion} over the best control of its size"], rows)


def _mean(results: Results, arm: ArmResult | None) -> str:
    return "" if arm is None else plain(results.mean(arm))


def _gain(results: Results, arm: ArmResult | None, over: ArmResult | None) -> str:
    return "" if arm is None or over is None else signed(results.gain(arm, over))
