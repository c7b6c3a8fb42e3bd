"""Adapter folders that were damaged, or made up, in every way that somebody might: seeded, one folder a seed.

A mutation changes the bytes of a file, the JSON of a header or a config, or what an adapter says of itself in both
files alike, which passes every check that compares the two.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FORMAT = "emma_adapter"

#: safetensors' name of a dtype -> PyTorch's, and bytes.
DTYPES = {
    "F64": ("torch.float64", 8),
    "F32": ("torch.float32", 4),
    "F16": ("torch.float16", 2),
    "BF16": ("torch.bfloat16", 2),
    "I64": ("torch.int64", 8),
    "I32": ("torch.int32", 4),
    "I16": ("torch.int16", 2),
    "I8": ("torch.int8", 1),
    "U8": ("torch.uint8", 1),
    "BOOL": ("torch.bool", 1),
    "C64": ("torch.complex64", 8),
    "F8_E4M3": ("torch.float8_e4m3fn", 1),
    "F8_E5M2": ("torch.float8_e5m2", 1),
    "F8_E8M0": ("torch.float8_e8m0fnu", 1),
    "F4": ("torch.float4_e2m1fn_x2", 1),
    "U64": ("torch.uint64", 8),
}
ODD_DTYPES = [*DTYPES, "F128", "f32", "FLOAT", "", "F32\0", "É", "x" * 5_000, None, 3, ["F32"], {"F32": 1}]


class Raw(str):
    """JSON text that is written as it is."""


class Pairs(list):
    """An object as a list of pairs, of which keys may be the same."""


def to_json(value: Any) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(key)}:{to_json(item)}" for key, item in value) + "}"
    if isinstance(value, dict):
        return to_json(Pairs(value.items()))
    if isinstance(value, list):
        return "[" + ",".join(map(to_json, value)) + "]"
    return json.dumps(value)


def nested(depth: int, of: str = "[]") -> Raw:
    if of == "[]":
        return Raw("[" * depth + "]" * depth)
    return Raw('{"a":' * depth + "1" + "}" * depth)


NUMBERS: list[Any] = [
    *(0, 1, 2, 3, 4, 7, 8, 16, 32, 64, 127, 255, 65_536, -1, -(2**31), 2**31 - 1, 2**31, 2**32, 2**53 + 1),
    *(2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 0.0, 1.0, 4.0, 1.5, -1.5),
    *map(Raw, ["-0", "-0.0", "1e400", "-1e400", "1e-400", "NaN", "Infinity", "-Infinity", "9" * 4_000, "9" * 4_400]),
]
TEXTS: list[Any] = [
    *("", " ", "llm", "x", "emma_adapter", "attention", "linear", "modulation", "custom:a.b", "custom:", "last_turn"),
    *("all_turns", "auto", "eager", "triton", "llava", "../..", "/", "/etc/passwd", "/dev/zero", "~", ".", "a/b/c"),
    *("open_clip:", "open_clip:ViT-B-32:/dev/zero", "open_clip:local-dir:/etc", "open_clip:../..:x"),
    *("C:\\x", "\\\\h\\s", "nobody/nothing", "\0", "a\0b", "\x1b[31m", "\r\n", "\u202e", "é" * 300, "x" * 20_000),
    *map(Raw, ['"\\ud800"', '"\\udfff\\ud800"', '"\\u0000"']),
]
ANYTHING: list[Any] = [
    *(None, True, False, [], {}, [[]], [1], {"a": None}, [1, 2], [2, 2], [2.0, 2], {"": ""}),
    *(nested(20), nested(79), nested(82), nested(400), nested(950), nested(3_000), nested(90, "{}"), nested(900, "{}")),
    *(Pairs([("a", 1), ("a", 2)]), list(range(300))),
]


def anything(dice: random.Random) -> Any:
    return copy.deepcopy(dice.choice(dice.choice([NUMBERS, TEXTS, ANYTHING])))


@dataclass
class Folder:
    """An adapter folder in the making."""

    description: dict[str, Any]
    #: name -> (dtype, shape, bytes)
    tensors: dict[str, tuple[str, list[int], bytes]]
    #: What the config file says instead of the description that the tensor file has in its metadata.
    written: Any = None
    metadata: Any = None
    header: Any = None
    #: Files that replace those which are made of the above.
    files: dict[str, bytes] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Folder:
        content = (folder / WEIGHTS).read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + length])
        data = content[8 + length :]
        description = json.loads(header.pop("__metadata__")[FORMAT])
        tensors = {
            name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
            for name, entry in header.items()
        }
        return cls(description, tensors)

    def sign(self) -> None:
        """Give the description the checksum of the tensors."""
        found = hashlib.sha256()
        for name in sorted(self.tensors):
            dtype, shape, data = self.tensors[name]
            found.update(f"{name} {DTYPES.get(dtype, (dtype,))[0]} {shape};".encode() + data)
        self.description["sha256"] = found.hexdigest()

    def make_header(self) -> dict[str, Any]:
        header, end = {}, 0
        for name, (dtype, shape, data) in self.tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
            end += len(data)
        good = {"format": "pt", FORMAT: to_json(self.description)}
        return {"__metadata__": good if self.metadata is None else self.metadata, **header}

    def content(self) -> dict[str, bytes]:
        header = to_json(self.make_header() if self.header is None else self.header).encode("utf-8", "surrogatepass")
        data = b"".join(data for _, _, data in self.tensors.values())
        config = to_json(self.description if self.written is None else self.written).encode()
        return {CONFIG: config, WEIGHTS: struct.pack("<Q", len(header)) + header + data, **self.files}


Mutation = Callable[[Folder, random.Random], None]
MUTATIONS: list[Mutation] = []


def mutation(change: Mutation) -> Mutation:
    MUTATIONS.append(change)
    return change


# ---------------------------------------------------------------------------------------------- bytes


def _damaged(content: bytes, dice: random.Random) -> bytes:
    kind, changed = dice.randrange(8), bytearray(content)
    at = dice.choice([dice.randrange(len(content)), min(len(content) - 1, dice.randrange(2_000)), dice.randrange(8)])
    if kind == 0:
        return content[:at]
    if kind == 1:
        for _ in range(dice.randint(1, 8)):
            changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    elif kind == 2:
        changed[at:at] = dice.randbytes(dice.choice([1, 2, 8, 500]))
    elif kind == 3:
        del changed[at : at + dice.choice([1, 2, 8, 500])]
    elif kind == 4:
        changed += dice.choice([b"\0", b"\0" * 8, b"}", b" ", dice.randbytes(100), content])
    elif kind == 5:
        changed[at : at + 8] = dice.choice([b"\0" * 8, b"\xff" * 8, dice.randbytes(8)])
    elif kind == 6:
        other = dice.randrange(len(content))
        changed[at : at + 16] = content[other : other + 16]
    else:
        return dice.choice([b"", b"\0", b"{}", b"[]", b"null", dice.randbytes(200), content[::-1], content * 2])
    return bytes(changed)


@mutation
def damaged_weights(folder: Folder, dice: random.Random) -> None:
    folder.files[WEIGHTS] = _damaged(folder.content()[WEIGHTS], dice)


@mutation
def flipped_header(folder: Folder, dice: random.Random) -> None:
    content = bytearray(folder.content()[WEIGHTS])
    length = struct.unpack("<Q", content[:8])[0]
    for _ in range(dice.randint(1, 3)):
        content[8 + dice.randrange(length)] = dice.choice(b'0123456789[]{}",:-eEF32BU\\ \0\xff')
    folder.files[WEIGHTS] = bytes(content)


@mutation
def header_length(folder: Folder, dice: random.Random) -> None:
    content = folder.content()[WEIGHTS]
    length = struct.unpack("<Q", content[:8])[0]
    lie = dice.choice(
        [0, 1, 2, length - 1, length + 1, length - 8, len(content), len(content) - 8, 10**8, 2**32, 2**63, 2**64 - 1]
    )
    folder.files[WEIGHTS] = struct.pack("<Q", lie) + content[8:]


@mutation
def damaged_config(folder: Folder, dice: random.Random) -> None:
    folder.files[CONFIG] = _damaged(folder.content()[CONFIG], dice)


@mutation
def encoded_config(folder: Folder, dice: random.Random) -> None:
    text = folder.content()[CONFIG].decode()
    coding = dice.choice(["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-7", "cp037", "utf-8"])
    folder.files[CONFIG] = text.encode(coding) + dice.choice([b"", b"\0", b"\n", b"\xff", b" " * 2_000, b" {}"])


# ---------------------------------------------------------------------------------------------- headers


@mutation
def tensor_entry(folder: Folder, dice: random.Random) -> None:
    """A field of a tensor's entry in the header."""
    folder.header = header = folder.make_header()
    entry = header[dice.choice(list(folder.tensors))]
    kind = dice.randrange(5)
    if kind == 0:
        entry["dtype"] = dice.choice(ODD_DTYPES)
    elif kind == 1:
        shape = entry["shape"]
        shape[dice.randrange(len(shape))] = dice.choice(NUMBERS)
    elif kind == 2:
        entry["shape"] = dice.choice([[], [0], [1] * 70, [2**32, 2**32], [0, 2**63 - 1], [2**62] * 3, anything(dice)])
    elif kind == 3:
        offsets = entry["data_offsets"]
        offsets[dice.randrange(2)] = dice.choice([*NUMBERS, offsets[0] + 4, offsets[1] - 4, offsets[1] + 4])
    else:
        change = dice.choice(["drop", "add", "swap", "any"])
        if change == "drop":
            del entry[dice.choice(list(entry))]
        elif change == "add":
            entry[dice.choice(["extra", "dtype ", "strides", ""])] = anything(dice)
        elif change == "swap":
            entry["data_offsets"] = header[dice.choice(list(folder.tensors))]["data_offsets"]
        else:
            entry[dice.choice(list(entry))] = anything(dice)


@mutation
def header_entries(folder: Folder, dice: random.Random) -> None:
    """Which entries a header has."""
    header = folder.make_header()
    name = dice.choice(list(folder.tensors))
    other = dice.choice([*TEXTS, f"{name} ", f"alignment.{name}", name.upper(), "alignment.", "projector.", name])
    kind = dice.randrange(6)
    pairs = Pairs(header.items())
    if kind == 0:
        pairs.append((name, dice.choice([header[name], header["__metadata__"], anything(dice)])))
    elif kind == 1:
        pairs = Pairs((str(other) if key == name else key, value) for key, value in pairs)
    elif kind == 2:
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        pairs += [(f"alignment.{number}", empty) for number in range(dice.choice([1, 2_000]))]
    elif kind == 3:
        pairs.append(("__metadata__", dice.choice([{}, {FORMAT: "{}"}, anything(dice)])))
    elif kind == 4:
        dice.shuffle(pairs)
    else:
        folder.header = dice.choice([anything(dice), {}, [], header["__metadata__"]])
        return
    folder.header = pairs


@mutation
def metadata(folder: Folder, dice: random.Random) -> None:
    good = to_json(folder.description)
    folder.metadata = dice.choice(
        [
            anything(dice),
            {},
            {"format": "pt"},
            {FORMAT: anything(dice)},
            {FORMAT: json.dumps(good)},
            {FORMAT: good[: dice.randrange(len(good))]},
            {FORMAT: _damaged(good.encode(), dice).decode("latin-1")},
            {FORMAT: good, "more": anything(dice)},
            Pairs([(FORMAT, "{}"), (FORMAT, good)]),
            Pairs([(FORMAT, good), (FORMAT, "{}")]),
            {FORMAT: str(nested(dice.choice([60, 90, 900, 5_000])))},
        ]
    )


# ---------------------------------------------------------------------------------------------- descriptions

OUTER = ["format", "format_version", "library_version", "sha256", "base_model_name_or_path", "model_type"]
OUTER += ["reads_turns", "projector_trained", "config"]


def _changed(description: dict[str, Any], dice: random.Random) -> dict[str, Any]:
    changed = copy.deepcopy(description)
    for _ in range(dice.choice([1, 1, 1, 2, 4])):
        inner = changed.get("config")
        if not isinstance(inner, dict) or dice.random() < 0.3:
            holder, names = changed, [*OUTER, "peft_type", "unknown"]
        else:
            holder, names = inner, [*inner, "unknown"]
        name = dice.choice(names)
        if dice.random() < 0.1:
            holder.pop(name, None)
        else:
            holder[name] = anything(dice)
    return changed


@mutation
def edited_config(folder: Folder, dice: random.Random) -> None:
    """The config file alone; the metadata of the tensor file contradicts it, or is the newer one."""
    folder.written = _changed(folder.description, dice)
    if dice.random() < 0.3:
        folder.written["sha256"] = "another"


@mutation
def consistent_config(folder: Folder, dice: random.Random) -> None:
    """Both files alike."""
    folder.description = _changed(folder.description, dice)
    if dice.random() < 0.2:
        folder.written = {**folder.description, "sha256": "another"}


SIZES = ["visual_dim", "instruction_dim", "num_visual_tokens", "max_instruction_tokens"]
SIZES += ["inner_dim", "num_heads", "rank"]


@mutation
def consistent_sizes(folder: Folder, dice: random.Random) -> None:
    """Sizes that are possible on their own, in both files."""
    config = folder.description["config"]
    for name in dice.sample(SIZES, dice.randint(1, 3)):
        config[name] = dice.choice([1, 2, 4, 8, 16, 32, 1_000, 2**20, 2**31 - 2, 2**31 - 1, 2**31, None])
    config["visual_grid"] = dice.choice([config["visual_grid"], None, [2, 2], [1, 4], [2**15, 2**15], [2**31 - 1] * 2])
    if dice.random() < 0.3:
        config["fusion"] = dice.choice(["attention", "linear", "modulation"])
    if dice.random() < 0.3:
        config["align_deepstack"] = True


# ---------------------------------------------------------------------------------------------- tensors


def _values(dtype: str, number: int, dice: random.Random) -> bytes:
    """Bytes of finite values, or of any."""
    size = DTYPES[dtype][1]
    if dice.random() < 0.5:
        return bytes(number * size)
    return dice.randbytes(number * size)


@mutation
def consistent_dtypes(folder: Folder, dice: random.Random) -> None:
    for name in dice.choice([list(folder.tensors), [dice.choice(list(folder.tensors))]]):
        _, shape, _ = folder.tensors[name]
        dtype = dice.choice(list(DTYPES))
        folder.tensors[name] = (dtype, shape, _values(dtype, math.prod(shape), dice))
    folder.sign()


@mutation
def consistent_values(folder: Folder, dice: random.Random) -> None:
    """Other weights, signed: the checksum is right, also where they aren't finite."""
    name = dice.choice(list(folder.tensors))
    dtype, shape, data = folder.tensors[name]
    if dtype != "F32":
        data = dice.randbytes(len(data))
    else:
        value = dice.choice([float("nan"), float("inf"), float("-inf"), 1e-45, 3e38, 0.5, -0.0])
        at = 4 * dice.randrange(len(data) // 4)
        data = data[:at] + struct.pack("<f", value) + data[at + 4 :]
    folder.tensors[name] = (dtype, shape, data)
    if dice.random() < 0.8:
        folder.sign()


@mutation
def consistent_tensors(folder: Folder, dice: random.Random) -> None:
    """Tensors too many, too few, misshapen or in another order, signed."""
    names = list(folder.tensors)
    name, kind = dice.choice(names), dice.randrange(6)
    dtype, shape, data = folder.tensors[name]
    if kind == 0:
        del folder.tensors[name]
    elif kind == 1:
        more = dice.choice(
            ["alignment.more", "projector.linear_1.weight", "alignment.deepstack.9999.x", "deepstack", ""]
        )
        folder.tensors[more] = (dtype, shape, data)
        folder.description["projector_trained"] = dice.choice([True, False])
    elif kind == 2:
        folder.tensors[name] = (dtype, [*shape, 1], data)
    elif kind == 3:
        folder.tensors[name] = (dtype, shape[::-1], data)
    elif kind == 4:
        dice.shuffle(names)
        folder.tensors = {name: folder.tensors[name] for name in names}
    else:
        folder.tensors[name] = (dtype, [0, *shape[1:]], b"")
    folder.sign()


@mutation
def other_number_of_visual_tokens(folder: Folder, dice: random.Random) -> None:
    """Another number in both files, and the tensors that belong to it."""
    config = folder.description["config"]
    number = dice.choice([None, None, 1, 3, 9])
    config.update(num_visual_tokens=number, visual_grid=None)
    for name, (dtype, shape, _) in list(folder.tensors.items()):
        if name.endswith("position") and number is None:
            del folder.tensors[name]
        elif 4 in shape:
            other = [number or 4 if side == 4 else side for side in shape]
            folder.tensors[name] = (dtype, other, bytes(math.prod(other) * DTYPES[dtype][1]))
    folder.sign()


def mutated(folder: Folder, seed: object) -> tuple[str, dict[str, bytes]]:
    """What was done to a copy of ``folder``, and the files of it."""
    dice = random.Random(str(seed))
    change = dice.choice(MUTATIONS)
    made = copy.deepcopy(folder)
    change(made, dice)
    return change.__name__, made.content()
