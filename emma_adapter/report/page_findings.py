"""The page's sections that read all questions: a sentence, a figure, and how to read it for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..analysis import Diagnosis, InformationGain, MutualInformation, PairDistances
from ..analysis.probes import Z
from .contents import Absent, Information, Reading, Report

#: Takes a function that makes a figure, and an alternative text; returns the figure as a part of the page.
Draw = Callable[[Callable[[], Any], str], str]
#: Differences below this share of a number are rounding.
_ROUNDING = 1e-4
#: So that the figure can be read on a phone.
_MAX_BARS = 12


@dataclass(frozen=True)
class Part:
    """A figure and its texts."""

    svg: str
    caption: str
    title: str = ""
    says: str = ""
    read: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row is its head."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


def in_short(report: Report) -> list[str]:
    """Return the findings as lines of a summary."""
    lines = []
    if isinstance(report.information, Information):
        lines.append(_conclusion(report.information.gain))
    if isinstance(report.diagnosis, Diagnosis):
        lines.append(f"{_verdicts(report.diagnosis)} {report.diagnosis.meaning}.")
    return lines


def reading(section: Reading | Absent, draw: Draw) -> dict[str, Any]:
    """Return the section about weights, attention and mask, as far as the fusion has them."""
    if isinstance(section, Absent):
        return {"absent": section.reason, "parts": []}
    parts = [_weights(section, draw), _attention(section, draw), _mask(section, draw)]
    return {"absent": None, "parts": [part for part in parts if part is not None]}


def _weights(section: Reading, draw: Draw) -> Part | None:
    from ..analysis.plots import plot_weight_shares

    shares = section.weights
    if shares is None:
        return None
    mean = shares.instruction.mean(0)
    return Part(
        svg=draw(lambda: plot_weight_shares(shares), f"Bars by instruction position; the highest: {_highest(mean)}"),
        caption=f"Share of each instruction position in the weights. The highest: {_highest(mean)}.",
        title="Weights",
        says=f"Of the weights of an output token, {shares.image.mean():.1%} are of the image's tokens and "
        f"{1 - shares.image.mean():.1%} of the instruction's.",
        read="A bar is how much of the weights belongs to a position of the instruction, 0 being its first token. "
        "The paper's adapters weigh early positions the most. How much a position contributes also depends on how "
        "large its input is, which weights don't show; positions behind the end of an instruction hold padding.",
    )


def _attention(section: Reading, draw: Draw) -> Part | None:
    from ..analysis.plots import plot_attention_mass

    mass = section.attention
    if mass is None:
        return None
    spread = "" if math.isnan(mass.entropy) else f" It is spread {mass.entropy:.0%} as evenly as it could be."
    return Part(
        svg=draw(
            lambda: plot_attention_mass(mass), f"Bars by instruction position; the highest: {_highest(mass.positions)}"
        ),
        caption=f"Attention of the visual tokens, mean over {mass.entries:,} images. The highest: "
        f"{_highest(mass.positions)}.",
        title="Attention",
        says=f"{_most_attended(mass.positions)}{spread}",
        read="A bar is how much of the visual tokens' attention goes to a token of the instruction; the line is what "
        "it would be if all attended to all tokens evenly. Long bars above the line are what the adapter reads. "
        "Instructions have different lengths, so that late positions are rarer. Attention to a word doesn't prove that "
        "it is used.",
    )


def _mask(section: Reading, draw: Draw) -> Part | None:
    from ..analysis.plots import plot_mask

    mask = section.mask
    if mask is None:
        return None
    between = 1 - mask.suppressed - mask.amplified
    return Part(
        svg=draw(
            lambda: plot_mask(mask),
            f"Histogram of factors from 0 to 2: {mask.suppressed:.0%} below 0.5, {mask.amplified:.0%} above 1.5",
        ),
        caption=f"The factors that channels are multiplied with, over {mask.entries:,} images.",
        title="Mask",
        says=f"Of all factors, {mask.suppressed:.0%} are below 0.5, which suppresses a channel of a token, "
        f"{mask.amplified:.0%} above 1.5, which amplifies it, and {between:.0%} between.",
        read="Each channel of each visual token is multiplied with a factor between 0 and 2; at the line, 1, it stays "
        "as it is. An untrained adapter has all its factors there. Factors at both ends mean that the adapter selects.",
    )


def information(section: Information | Absent, draw: Draw) -> dict[str, Any]:
    """Return the section about mutual information before and after alignment."""
    if isinstance(section, Absent):
        return {"absent": section.reason}
    from ..analysis.plots import plot_information

    gain = section.gain
    kind = (
        f"The {section.labels} different answers were taken as labels."
        if section.labels is not None
        else "Of each answer the mean embedding of its tokens was taken, and one question of each image."
    )
    caption = (
        f"Mutual information of visual tokens and answers, with 95 % intervals: {gain.before.nats:.2f} nats before, "
        f"{gain.after.nats:.2f} after."
    )
    saturated = gain.before.saturated or gain.after.saturated
    return {
        "absent": None,
        "says": f"{_conclusion(gain)} {kind}",
        "svg": draw(lambda: plot_information(gain), caption),
        "caption": caption,
        "table": Table(
            f"Estimates in nats, from {gain.before.samples:,} questions",
            ("visual tokens", "estimate", "95 % interval", "uncorrected", "correction", "answers shuffled"),
            [_estimate("before", gain.before), _estimate("after", gain.after)],
        ),
        "read": "The higher, the more of the answer could be read off the mean visual token of an image; 0 is nothing. "
        "Before, the visual tokens don't know the question. The estimator is far too low with few samples: it is "
        "corrected by what it gives on samples of as many dimensions whose information is known. With shuffled answers "
        "there is nothing to find, and the estimate shows the noise. Only ratios of one page compare; that the tokens "
        "tell more doesn't mean that the language model listens."
        + (
            " An interval without an upper end: the estimate is as high as it can get with so few questions, and there "
            "may be more."
            if saturated
            else ""
        ),
    }


def _conclusion(gain: InformationGain) -> str:
    low, high = gain.difference_interval
    if low > 0:
        upper = "any number of" if math.isinf(gain.ratio_interval[1]) else f"{gain.ratio_interval[1]:.1f}"
        times = (
            ""
            if math.isinf(gain.ratio)
            else f", {gain.ratio:.1f} times as much (95 %: {gain.ratio_interval[0]:.1f} to {upper})"
        )
        return f"After alignment the visual tokens tell more of the answer{times}."
    if high < 0:
        return "After alignment the visual tokens tell less of the answer."
    return (
        f"Whether the visual tokens tell more of the answer after alignment can't be told from {gain.before.samples:,} "
        "questions."
    )


def _estimate(name: str, estimate: MutualInformation) -> tuple[str, ...]:
    low, high = estimate.interval
    upper = "no upper end" if math.isinf(high) else f"{high:.2f}"
    return (
        name,
        f"{estimate.nats:.2f}",
        f"{low:.2f} to {upper}",
        f"{estimate.raw:.2f}",
        f"{-estimate.bias:+.2f}",
        # + 0.0 makes 0.00 of -0.00.
        f"{round(estimate.shuffled, 2) + 0.0:.2f} ± {estimate.shuffled_spread:.2f}",
    )


def pairs(section: PairDistances | Absent | None, draw: Draw) -> dict[str, Any] | None:
    """Return the section about distances between the images of each pair; None if the data name no pairs."""
    if section is None:
        return None
    if isinstance(section, Absent):
        return {"absent": section.reason}
    from ..analysis.plots import plot_pairs

    ratio = section.ratio
    apart = int((section.after > section.before * (1 + _ROUNDING)).sum())
    median = float(np.nanmedian(ratio)) if np.isfinite(ratio).any() else math.nan
    middle = "" if math.isnan(median) else f" The median distance afterwards is {median:.2f} times that before."
    caption = f"Each dot is a pair; {apart} of {len(ratio)} lie above the line."
    return {
        "absent": None,
        "says": f"The adapter pulls {apart} of {len(ratio)} pairs apart.{middle}"
        if (abs(section.after - section.before) > _ROUNDING * section.before).any()
        else f"The adapter leaves the distances of all {len(ratio)} pairs as they are.",
        "svg": draw(lambda: plot_pairs(section), caption),
        "caption": caption,
        "read": "Images that differ in what is asked should become more different once the question is known. 0 are "
        "equal representations, 2 are opposite ones.",
    }


def diagnosis(section: Diagnosis | Absent, draw: Draw) -> dict[str, Any]:
    """Return the section about what linear probes read off the model without the adapter."""
    if isinstance(section, Absent):
        return {"absent": section.reason}
    from ..analysis.plots import plot_diagnosis

    attributes = section.attributes
    most_asked = sorted(range(len(attributes)), key=lambda place: -attributes[place].visual.samples)
    drawn = sorted(most_asked[:_MAX_BARS])
    # The figure's font doesn't have every script that names may be in.
    numbered = replace(section, attributes=tuple(replace(attributes[place], name=str(place + 1)) for place in drawn))
    rows: list[tuple[str, ...]] = [
        (
            f"{number}. {attribute.name}",
            f"{attribute.visual.samples:,}",
            f"{attribute.visual.chance:.0%}",
            f"{attribute.visual.shuffled:.0%}",
            attribute.visual.told(),
            attribute.projected.told(),
            attribute.verdict,
        )
        for number, attribute in enumerate(attributes, 1)
    ]
    if (probe := section.instruction) is not None:
        controls = f"{probe.samples:,}", f"{probe.chance:.0%}", f"{probe.shuffled:.0%}"
        rows.append(("What is asked, from the instruction", *controls, probe.told(), "", ""))
    caption = f"Accuracy of a linear probe for each thing that is asked, numbered as in the table. {_losses(section)}"
    if len(drawn) < len(attributes):
        caption += f" Drawn are the {len(drawn)} that are asked most."
    return {
        "absent": None,
        "says": f"{_verdicts(section)} “{section.verdict}”, that is, {section.meaning}. (The adapter is switched off "
        "for this.)",
        "svg": draw(lambda: plot_diagnosis(numbered), caption),
        "caption": caption,
        "table": Table(
            "How often a linear probe reads the answer, with 95 % intervals",
            ("asked", "questions", "chance", "shuffled", "visual tokens", "behind the projector", "verdict"),
            rows,
        ),
        "read": "An adapter can help where the answer can be read off the visual tokens, and less well behind the "
        "projector: it decides what passes. Where most of it is read behind the projector too, training the language "
        "model may do as well. Where little is read on both sides, nothing can be told: the column “attribute” may "
        "name several questions at once, and the visual tokens don't know which is asked. Chance is the most frequent "
        "answer; shuffled is the same probe on shuffled answers. Probes are linear: what they don't read may still be "
        "there.",
    }


def _verdicts(section: Diagnosis) -> str:
    """Say how many of the things that are asked have each verdict."""
    verdicts = [attribute.verdict for attribute in section.attributes]
    if len(verdicts) == 1:
        return "Before any training:"
    counts = ", ".join(f"“{verdict}” of {verdicts.count(verdict)}" for verdict in dict.fromkeys(verdicts))
    most = "Of most rows" if section.verdict == "can't be told" else "Of most rows of which something can be told"
    return f"Of {len(verdicts)} things that are asked, the model's own representations say {counts}. {most}:"


def _losses(section: Diagnosis) -> str:
    """Say which things the projector loses beyond the error bars, and which one the most."""
    losing = [attribute for attribute in section.attributes if attribute.loses]
    losing.sort(key=lambda attribute: -attribute.lost)
    if not losing:
        return "Of none is less read behind the projector than before it, beyond the error."
    numbers = [str(section.attributes.index(attribute) + 1) for attribute in losing]
    if len(losing) == 1:
        return f"The projector loses something of number {numbers[0]}."
    first, second = losing[:2]
    clear = first.lost - second.lost > Z * math.hypot(first.lost_error, second.lost_error)
    most = f", the most of number {numbers[0]}" if clear else ""
    ascending = sorted(numbers, key=int)
    return f"The projector loses something of the numbers {', '.join(ascending[:-1])} and {ascending[-1]}{most}."


def _most_attended(positions: NDArray[np.float64]) -> str:
    if _alike(positions):
        return "Visual tokens attend to all positions of the instruction alike."
    return f"Visual tokens attend the most to position {int(positions.argmax())} of the instruction, counted from 0."


def _highest(values: NDArray[np.float64]) -> str:
    if _alike(values):
        return f"none, all have {values[0]:.1%}"
    order = np.argsort(-values, kind="stable")[:3]
    return ", ".join(f"{values[place]:.1%} at {place}" for place in order.tolist())


def _alike(values: NDArray[np.float64]) -> bool:
    """Return whether values differ by rounding at most; a single value does not differ."""
    return bool(np.ptp(values) <= _ROUNDING * abs(values).max())
