"""Plots of what the other modules of this package return. Imports matplotlib.

Each function takes an ``ax``, or makes a figure of its own, and returns the figure. Backgrounds are transparent and
lines a medium grey, so that a plot can be read on light and on dark pages, at the width of a phone. ``svg`` turns a
figure into text for an HTML page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike, NDArray

from .attending import AttentionMass, MaskStatistics
from .diagnosis import Diagnosis
from .information import InformationGain
from .movement import Comparison, Field, TokenMap, on_image
from .pairs import PairDistances
from .weights import WeightShares

#: Contrast of at least 3 on white and on black (WCAG 2.1, 1.4.11).
GREY = "#808080"
_UNDER = "#7f7f7f"
BEFORE, AFTER = "#6b8fb3", "#d1762f"
_LABELS = {
    "norm": "|V' - V|",
    "relative": "|V' - V| / |V|",
    "cosine": "cosine of V and V'",
    "gain": "|V'| / |V|",
    "difference": "|V'₁ - V'₂| / |V|",
}


def plot_map(
    token_map: TokenMap | Sequence[TokenMap],
    picture: ArrayLike | None = None,
    field: Field = "relative",
    ax: Axes | None = None,
    *,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Plot a map's values as colours, over the picture if it is given.

    Args:
        token_map: one map; or those of all tiles of an image, which are painted where they lie in it.
        picture: ``[h, w, 3]`` or ``[h, w]``, as the vision encoder saw it.
        field: ``"norm"``, ``"relative"``, ``"cosine"`` or ``"gain"``, which is drawn around 1 on a logarithmic scale.
        ax: axes to draw in.
        limits: of the colours, to compare several maps; default: those of this map.
    """
    if isinstance(token_map, TokenMap):
        values = getattr(token_map, field)
    else:
        size = (256, 256) if picture is None else np.asarray(picture).shape[:2]
        values = on_image(token_map, size[0], size[1], field)
    return _heat(values, picture, _LABELS[field], ax, limits, around_one=field == "gain")


def plot_comparison(
    comparison: Comparison,
    picture: ArrayLike | None = None,
    field: Field = "relative",
    *,
    names: tuple[str, str] = ("first", "second"),
) -> Figure:
    """Plot the maps of two instructions in the same colours, and how far apart they move each token."""
    figure, axes = _figure(3)
    maps = [getattr(token_map, field) for token_map in (comparison.first, comparison.second)]
    limits = (float(min(map(np.nanmin, maps))), float(max(map(np.nanmax, maps))))
    for ax, values, name in zip(axes, maps, names, strict=False):
        _heat(values, picture, _LABELS[field], ax, limits, around_one=field == "gain")
        ax.set_title(name, color=GREY, fontsize=9, wrap=True)
    plot_difference(comparison, picture, axes[2])
    axes[2].set_title("apart", color=GREY, fontsize=9)
    return figure


def plot_difference(comparison: Comparison, picture: ArrayLike | None = None, ax: Axes | None = None) -> Figure:
    """Plot how far apart two instructions move each token."""
    return _heat(comparison.difference, picture, _LABELS["difference"], ax, None)


def plot_weight_shares(shares: WeightShares, ax: Axes | None = None) -> Figure:
    """Plot the mean share of each instruction position in the weights; the image's share is the title."""
    figure, ax = _prepared(ax)
    mean = shares.instruction.mean(0)
    ax.bar(np.arange(len(mean)), mean * 100, color=AFTER, width=0.9)
    ax.set_xlabel("instruction position")
    ax.set_ylabel("share of the weights, %")
    ax.set_title(f"image: {shares.image.mean():.1%}", color=GREY, fontsize=9)
    return figure


def plot_attention_mass(mass: AttentionMass, ax: Axes | None = None, words: Sequence[str] | None = None) -> Figure:
    """Plot attention by instruction position, beside what even attention would be.

    Args:
        mass: of a data set.
        ax: axes to draw in.
        words: labels of the positions, if all instructions have the same words.
    """
    figure, ax = _prepared(ax)
    places = np.arange(len(mass.positions))
    ax.bar(places, mass.positions * 100, color=AFTER, width=0.9, label="attention")
    ax.step(
        np.append(places, len(places)) - 0.5,
        np.append(mass.uniform, mass.uniform[-1:]) * 100,
        where="post",
        color=GREY,
        label="even",
    )
    if words is not None:
        ax.set_xticks(places[: len(words)], words, rotation=60, ha="right")
    ax.set_xlabel("instruction position")
    ax.set_ylabel("attention, %")
    _legend_above(ax)
    return figure


def plot_mask(statistics: MaskStatistics, ax: Axes | None = None) -> Figure:
    """Plot how often each factor of the mask occurs: below 1 suppresses, above 1 amplifies."""
    figure, ax = _prepared(ax)
    ax.stairs(statistics.histogram * 100, statistics.edges, fill=True, color=AFTER)
    ax.axvline(1, color=GREY, linewidth=1)
    ax.set_xlabel("factor of a channel")
    ax.set_ylabel("of all factors, %")
    return figure


def plot_information(gain: InformationGain, ax: Axes | None = None) -> Figure:
    """Plot mutual information with the responses before and after alignment, with 95 % intervals."""
    figure, ax = _prepared(ax)
    for place, (estimate, colour) in enumerate(((gain.before, BEFORE), (gain.after, AFTER))):
        low, high = estimate.interval
        nats = estimate.nats
        ax.bar(place, nats, color=colour, width=0.6)
        top = high if np.isfinite(high) else nats
        ax.errorbar(place, nats, [[max(nats - low, 0)], [max(top - nats, 0)]], color=GREY, capsize=4)
    ax.set_xticks([0, 1], ["before", "after"])
    ax.set_ylabel("mutual information, nats")
    return figure


def plot_pairs(distances: PairDistances, ax: Axes | None = None) -> Figure:
    """Plot each pair's distance after alignment over that before; pairs above the line were pulled apart."""
    figure, ax = _prepared(ax)
    top = float(max(distances.before.max(), distances.after.max(), 1e-6)) * 1.05
    ax.plot([0, top], [0, top], color=GREY, linewidth=1)
    ax.scatter(distances.before, distances.after, s=12, color=AFTER, alpha=0.7)
    ax.set_xlabel("distance before")
    ax.set_ylabel("distance after")
    return figure


def plot_diagnosis(diagnosis: Diagnosis, ax: Axes | None = None) -> Figure:
    """Plot the accuracy of the probes for each attribute, with 95 % intervals, and chance as a line."""
    figure, ax = _prepared(ax)
    for place, attribute in enumerate(diagnosis.attributes):
        for shift, probe, colour, name in (
            (-0.2, attribute.visual, BEFORE, "visual tokens"),
            (0.2, attribute.projected, AFTER, "behind the projector"),
        ):
            ax.bar(place + shift, probe.accuracy * 100, 0.38, color=colour, label="" if place else name)
            ax.errorbar(place + shift, probe.accuracy * 100, probe.margin * 100, color=GREY, capsize=3)
        ax.hlines(
            attribute.visual.chance * 100,
            place - 0.4,
            place + 0.4,
            color=GREY,
            linestyle="--",
            label="" if place else "chance",
        )
    names = [attribute.name for attribute in diagnosis.attributes]
    ax.set_xticks(range(len(names)), names)
    if max(map(len, names)) > 3:
        for label in ax.get_xticklabels():
            label.set(rotation=20, ha="right")
    ax.set_ylabel("read off linearly, %")
    _legend_above(ax)
    return figure


def svg(figure: Figure) -> str:
    """Return the figure as an ``<svg>`` element as wide as its container, without the XML header."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    _, tag, rest = text.getvalue().partition("<svg ")
    attributes, end, body = rest.partition(">")
    sized = re.sub(r'\b(width|height)="[^"]*"\s*', "", attributes)
    return f'{tag}style="width:100%;height:auto" {sized}{end}{body}'


def _heat(
    values: NDArray[np.float32],
    picture: ArrayLike | None,
    label: str,
    ax: Axes | None,
    limits: tuple[float, float] | None,
    *,
    around_one: bool = False,
) -> Figure:
    from matplotlib.colors import LogNorm

    figure, ax = _prepared(ax)
    values = values if values.ndim == 2 else values[None]
    image = None if picture is None else np.asarray(picture)
    height, width = values.shape if image is None else image.shape[:2]
    if image is not None:
        grey = image.mean(-1) if image.ndim == 3 else image
        ax.imshow(grey, cmap="gray", interpolation="nearest")
    finite = values[np.isfinite(values)]
    low, high = limits or ((float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0))
    scale: dict[str, Any] = {"cmap": "viridis", "vmin": low, "vmax": high}
    if around_one:
        top = max(high, 1 / max(low, 1e-2), 1.01)
        scale = {"cmap": "RdBu_r", "norm": LogNorm(1 / top, top)}
    heat_map = ax.imshow(
        values,
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        alpha=1.0 if image is None else 0.65,
        interpolation="nearest",
        **scale,
    )
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    bar = figure.colorbar(heat_map, ax=ax, shrink=0.8, label=label)
    bar.ax.tick_params(colors=GREY, labelsize=8)
    if image is not None:
        # The colours of a map are blended with its picture: blend the bar's with grey, whatever the page's background.
        bar.ax.add_patch(Rectangle((0, 0), 1, 1, transform=bar.ax.transAxes, color=_UNDER, zorder=0.5))
    bar.ax.yaxis.label.set_color(GREY)
    bar.outline.set_edgecolor(GREY)
    if around_one:
        ticks = [tick for tick in (0.1, 0.25, 0.5, 1, 2, 4, 10) if 1 / top <= tick <= top]
        bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        bar.minorticks_off()
    return figure


def _prepared(ax: Axes | None) -> tuple[Figure, Axes]:
    if ax is None:
        figure, [ax] = _figure(1)
    else:
        figure = ax.get_figure(root=True)  # type: ignore[assignment]
    ax.set_facecolor("none")
    ax.tick_params(colors=GREY, labelsize=8)
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set_color(GREY)
        label.set_fontsize(9)
    for name, spine in ax.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(GREY)
    return figure, ax


def _legend_above(ax: Axes) -> None:
    """Put the legend above: finding a place between the bars takes long."""
    ax.legend(
        frameon=False, labelcolor=GREY, fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, columnspacing=1
    )


def _figure(columns: int) -> tuple[Figure, list[Axes]]:
    """Make a figure, not through pyplot, which would keep it and choose a window system."""
    figure = Figure(figsize=(3.6 * columns, 2.9), layout="constrained")
    figure.patch.set_alpha(0)
    return figure, [figure.add_subplot(1, columns, number + 1) for number in range(columns)]
