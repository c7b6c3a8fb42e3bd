"""Coverage-guided fuzzing of what reads an adapter's files, for as long as you like::

    python tests/fuzz/coverage_guided.py config -max_total_time=600
    python tests/fuzz/coverage_guided.py header -max_total_time=600

Everything behind the target's name goes to libFuzzer. It ends with 0 unless a target raised.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["emma_adapter"]):
    from emma_adapter import CheckpointError, ConfigError, EmmaConfig
    from emma_adapter.checkpoints import reading
    from emma_adapter.checkpoints.format import WEIGHTS_NAME

sys.path.insert(0, str(Path(__file__).parents[2]))

SEED_CONFIGS = (
    EmmaConfig(),
    EmmaConfig.paper("some/tower", rank=4),
    EmmaConfig(fusion="modulation", visual_grid=(2, 3), fusion_options={"a": [1, 2.5, {"b": None}]}),
)


def read_config(data: bytes) -> None:
    """A config, or a ConfigError; and a config is the same after another round."""
    try:
        config = EmmaConfig.from_json(data)
    except ConfigError:
        return
    assert EmmaConfig.from_json(config.to_json()) == config


class Header:
    """Reads a folder whose tensor file is fuzzed: as a whole, or its header with the right length before it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / WEIGHTS_NAME
        content = self.path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        self.header, self.values = content[8 : 8 + length], content[8 + length :]
        self.seeds = (b"\0" + content, b"\1" + self.header)

    def __call__(self, data: bytes) -> None:
        content = data[1:]
        if data[:1] == b"\1":
            content = len(content).to_bytes(8, "little") + content + self.values
        self.path.write_bytes(content)
        try:
            saved = reading.read(self.folder)
        except CheckpointError:
            return
        assert all(not tensor.is_meta for tensor in saved.alignment.values())


def main() -> None:
    target, *options = sys.argv[1:]
    with tempfile.TemporaryDirectory() as name:
        corpus = Path(name) / "corpus"
        corpus.mkdir()
        read, seeds = read_config, [config.to_json().encode() for config in SEED_CONFIGS]
        if target == "header":
            from emma_adapter import patch_model
            from tests.support import tiny

            folder = Path(name) / "adapter"
            patch_model(tiny.llava(), EmmaConfig(inner_dim=4, num_heads=1)).save_pretrained(folder)
            read = Header(folder)
            seeds = list(read.seeds)
        for number, seed in enumerate(seeds):
            (corpus / str(number)).write_bytes(seed)
        atheris.Setup([sys.argv[0], str(corpus), *options], read)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
