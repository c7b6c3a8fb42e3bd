"""Run by ``torchrun``: transformers' Trainer."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from runs import shard_on_the_cpu, tell, train_with_trainer

FOLDER = Path(sys.argv[1])


def main():
    shard_on_the_cpu()
    engine, losses = train_with_trainer(FOLDER, batch_size=1, ddp_backend="gloo", **json.loads(sys.argv[2]))
    if os.environ["RANK"] == "0":
        tell(FOLDER, engine=engine, losses=losses)


if __name__ == "__main__":
    main()
