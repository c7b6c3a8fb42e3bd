"""Pictures: each is drawn, transparent, and well-formed as SVG."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure

from emma_adapter.analysis import (
    Asked,
    AttentionMass,
    Comparison,
    Diagnosis,
    InformationGain,
    MaskStatistics,
    MutualInformation,
    PairDistances,
    Probe,
    TokenMap,
    WeightShares,
    plots,
)

VALUES = np.linspace(0.2, 2.0, 12, dtype=np.float32).reshape(3, 4)
MAP = TokenMap(VALUES, VALUES, VALUES, VALUES, "image", 0, 0, 0, (0, 0, 1, 1))
PICTURE = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
INFORMATION = MutualInformation(0.5, 0.1, 0.4, -0.1, 0.05, 0, 0.05, False, "ksg", 100, (2, 2), (0.9, 0.9))
PROBE = Probe(0.8, 0.04, 0.5, 0.5, 0.6, 0.05, 100, 2, np.ones(100, bool))


def drawn() -> dict[str, Figure]:
    tiles = [replace(MAP, box=box) for box in ((0, 0, 1, 1), (0, 0, 0.5, 0.5))]
    mass = AttentionMass(np.full(3, 1 / 3), np.full((2, 3), 1 / 3), np.full(3, 1 / 3), 1.0, 4)
    mask = MaskStatistics(np.ones(4), np.zeros(4), 0.1, 0.2, np.linspace(0, 2, 41), np.full(40, 1 / 40), 4)
    more = replace(INFORMATION, nats=1.0, saturated=True)
    return {
        "map": plots.plot_map(MAP, PICTURE, "gain"),
        "bare map": plots.plot_map(MAP, field="relative", limits=(0, 3)),
        "tiles": plots.plot_map(tiles, PICTURE),
        "comparison": plots.plot_comparison(Comparison(MAP, MAP, VALUES), PICTURE, names=("a <b> & c", "d")),
        "weights": plots.plot_weight_shares(WeightShares(np.ones(3), np.zeros((3, 5)), np.ones(3), np.zeros(5))),
        "attention": plots.plot_attention_mass(mass, words=["is", "there", "?"]),
        "mask": plots.plot_mask(mask),
        "information": plots.plot_information(
            InformationGain(INFORMATION, more, 0.5, (0.1, 0.9), 2.0, (1.2, math.inf))
        ),
        "pairs": plots.plot_pairs(PairDistances(np.array([0.1, 0.2]), np.array([0.3, 0.2]))),
        "diagnosis": plots.plot_diagnosis(
            Diagnosis((Asked("left", PROBE, replace(PROBE, accuracy=0.5), 0.3, 0.05, "can help"),), PROBE)
        ),
    }


FIGURES = drawn()


@pytest.mark.parametrize("name", FIGURES)
def test_an_svg_for_a_page(name):
    text = plots.svg(FIGURES[name])
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg")
    assert "viewBox" in root.attrib and "width" not in root.attrib and "height" not in root.attrib
    assert "100%" in root.attrib["style"]
    # The page's background shows through, and no line is black or white.
    assert 'id="patch_1"' not in text or "fill: #ffffff" not in text.split('id="patch_1"')[1].split("</g>")[0]
    assert "stroke: #000000" not in text


def test_colours_are_those_of_the_values():
    """By eye: top left is the lowest, bottom right the highest, and 1 is white in a map of gains."""
    [image] = FIGURES["bare map"].axes[0].images
    np.testing.assert_array_equal(image.get_array(), VALUES)
    assert image.get_clim() == (0, 3)
    gains = FIGURES["map"].axes[0].images[-1]
    low, high = gains.get_clim()
    assert low * high == pytest.approx(1) and high >= VALUES.max() and low <= VALUES.min()
    np.testing.assert_allclose(gains.cmap(gains.norm(1.0))[:3], 0.97, atol=0.03)


def test_bars_are_the_numbers():
    bars = [bar.get_height() for bar in FIGURES["information"].axes[0].patches]
    assert bars == [0.5, 1.0]
    assert [bar.get_height() for bar in FIGURES["diagnosis"].axes[0].patches] == [80, 50]
    assert [text.get_text() for text in FIGURES["attention"].axes[0].get_xticklabels()] == ["is", "there", "?"]


def test_an_axis_may_be_given():
    figure = Figure()
    ax = figure.add_subplot()
    assert plots.plot_mask(MaskStatistics(*[np.ones(1)] * 2, 0, 0, np.linspace(0, 2, 41), np.ones(40), 1), ax) is figure
    assert ax.get_xlabel()


def test_nothing_but_the_pictures_needs_matplotlib():
    code = """
import sys
import emma_adapter.analysis
print(sorted({"matplotlib", "sklearn"} & set(sys.modules)))
import emma_adapter.analysis.plots
print("matplotlib" in sys.modules, "matplotlib.pyplot" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "True", "False"]
