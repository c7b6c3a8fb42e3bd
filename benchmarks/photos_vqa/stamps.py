"""Photographs of things, cut out, from Debian's package of Tux Paint stamps (GPL-2). None of it is shipped."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from PIL import Image

PACKAGE = "tuxpaint-stamps-default"
_INSIDE = Path("usr/share/tuxpaint/stamps")

#: What there is, and the folders its photographs are in. Folders named "cartoon" and "toys" aren't among them.
KINDS: Mapping[str, tuple[str, ...]] = {
    "bird": ("animals/birds",),
    "mammal": (
        "animals/mammals",
        *(
            f"animals/mammals/{group}"
            for group in ("apes", "aquatic", "bears", "bovines", "camel", "cats", "deer", "dogs", "equines", "rodents")
        ),
        "animals/marsupials",
    ),
    "critter": (
        "animals/amphibians",
        "animals/fish",
        "animals/insects",
        "animals/lizards",
        "animals/shellfish",
    ),
    "flower": ("plants/flowers",),
    "food": ("food/fruit", "food/nuts", "food/spices", "food/vegetables", "plants/mushrooms"),
    "vehicle": (
        "military/vehicles",
        "vehicles",
        "vehicles/auto",
        "vehicles/construction",
        "vehicles/cycle",
        "vehicles/emergency",
        "vehicles/flight",
        "vehicles/flight/planes",
        "vehicles/masstransit",
        "vehicles/race",
        "vehicles/ship",
    ),
    "tool": ("household/arttools", "household/dishes/utensils", "household/tools", "medical"),
    "coin": (
        "symbols/money/canadian/coins",
        "symbols/money/euro/coins",
        "symbols/money/japanese",
        "symbols/money/us/coins",
    ),
}

#: In those folders, what was drawn, or shows a part of a thing.
_NO_PHOTOGRAPHS = {
    "animals/insects/bee",
    "animals/mammals/echidna",
    "animals/mammals/hedgehog",
    "medical/tooth",
    "vehicles/7spoke256",
    "vehicles/emergency/sedan_police",
    "vehicles/wheel_tractor",
}

#: Shares of the photographs of each kind.
SPLITS = {"train": 0.6, "validation": 0.15, "test": 0.25}
_SPLIT_SEED = 17

#: Below this, nothing of a thing would be seen.
_LEAST_ALPHA = 16


class StampsError(click.ClickException):
    """The photographs can't be had, or aren't those that were expected."""


@dataclass(frozen=True)
class Stamp:
    """A photograph of a thing without its surroundings."""

    #: Folder and name inside the package, without suffix.
    name: str
    caption: str
    kind: int
    split: str
    #: ``[H, W, 4]`` uint8, cropped to what isn't transparent.
    pixels: np.ndarray


def download(work: Path) -> Path:
    """Download and unpack the package with Debian's own tools, once, and return the folder with its stamps.

    Raises:
        StampsError: if there is no ``apt-get`` or ``dpkg-deb``, or if they fail.
    """
    unpacked = work / PACKAGE
    if not unpacked.exists():
        for tool in ("apt-get", "dpkg-deb"):
            if shutil.which(tool) is None:
                raise StampsError(
                    f"there is no {tool} here, which downloads the photographs on Debian, Ubuntu and in their "
                    f"containers. Elsewhere unpack Debian's package {PACKAGE} so that {unpacked / _INSIDE} is there"
                )
        work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=work) as name:
            scratch = Path(name)
            _run("apt-get", "download", PACKAGE, folder=scratch)
            [archive] = scratch.glob("*.deb")
            _run("dpkg-deb", "-x", archive.name, PACKAGE, folder=scratch)
            (scratch / PACKAGE).rename(unpacked)
    return unpacked / _INSIDE


def _run(*command: str, folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StampsError(
            f"{' '.join(command)} failed: {done.stderr.strip()}. If the package isn't known, run apt-get update first"
        )


def read(folder: Path) -> list[Stamp]:
    """All photographs of ``KINDS``, split by photograph; the same ones on every machine.

    Raises:
        StampsError: if a kind has too few for three splits.
    """
    stamps = []
    for kind, (name, folders) in enumerate(KINDS.items()):
        found = [path for place in folders for path in sorted((folder / place).glob("*.png")) if _is_photograph(path)]
        if len(found) < 2 * len(SPLITS):
            raise StampsError(
                f"there are {len(found)} photographs of the kind {name!r} in {folder}, too few to hold some out: "
                "remove what was unpacked there, and start again"
            )
        order = np.random.default_rng((_SPLIT_SEED, kind)).permutation(len(found))
        for number, split in zip(order, _splits(len(found)), strict=True):
            path = found[number]
            inside = path.relative_to(folder).with_suffix("").as_posix()
            stamps.append(Stamp(inside, _caption(path), kind, split, _pixels(path)))
    return stamps


def _is_photograph(path: Path) -> bool:
    drawn = any(path.with_suffix("").as_posix().endswith(f"/{name}") for name in _NO_PHOTOGRAPHS)
    # Mirror images of others have no caption.
    return not drawn and path.with_suffix(".txt").exists()


def _caption(path: Path) -> str:
    return path.with_suffix(".txt").read_text(encoding="utf-8").partition("\n")[0].strip()


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as file:
        if not file.has_transparency_data:
            raise StampsError(f"{path} has no transparency: it is no cut-out")
        pixels = np.asarray(file.convert("RGBA"))
    visible = pixels[..., 3] >= _LEAST_ALPHA
    rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _splits(number: int) -> list[str]:
    """As many names as there are photographs of a kind, each split's at least once."""
    held_out = {split: max(1, round(share * number)) for split, share in SPLITS.items() if split != "train"}
    names = [split for split, count in held_out.items() for _ in range(count)]
    return ["train"] * (number - len(names)) + names
