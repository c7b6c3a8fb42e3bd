"""What each arm trains, by the name it has in records, table and figure."""

from __future__ import annotations

from pathlib import Path

from transformers import LlavaProcessor

from .. import arms
from ..arms import Arm, Builder
from ..pooled_llava import PooledLlava
from . import variants

FUSIONS = ("linear", "attention", "modulation")
LINEAR_PARTS = ("linear, instruction projection only", "linear, alignment only")
ATTENTION_CHANGES = (
    "attention, usual q/k initialisation",
    "attention, no query term per position",
    "attention, output not zero-initialised",
    "attention, scalar zero gate",
)
BASE, PROJECTOR = "base", "projector only"
LORA_QV, LORA_ALL, PROJECTOR_LORA = "LoRA on q, v", "LoRA on all linears", "projector + LoRA on all linears"

#: Parameters of ``attention`` and ``modulation`` on this base model; LoRA gets the rank that comes nearest.
ADAPTER_SIZE = 43_680

CONSTANT_INSTRUCTION = "what is there ?"


def with_projector(fusion: str) -> str:
    return f"projector + {fusion}"


def shuffled(fusion: str) -> str:
    return f"{fusion}, shuffled instructions"


def constant(fusion: str) -> str:
    return f"{fusion}, constant instruction"


def random_tower(fusion: str) -> str:
    return f"{fusion}, random text tower"


def llm_embeddings(fusion: str) -> str:
    return f"{fusion}, instructions by the LLM's embeddings"


def controls(fusion: str) -> tuple[str, ...]:
    """Arms that are trained like the adapter and don't know the question before the language model."""
    return (PROJECTOR, LORA_QV, LORA_ALL, PROJECTOR_LORA, shuffled(fusion), constant(fusion))


def builders(text_tower: Path, untrained_tower: Path) -> dict[str, Builder]:
    """All arms there are. Registers the variants of the fusions."""
    variants.register()
    tower = str(text_tower)
    found: dict[str, Builder] = {
        BASE: arms.base,
        PROJECTOR: arms.projector_only,
        LORA_QV: _lora(arms.QUERIES_AND_VALUES),
        LORA_ALL: _lora(arms.ALL_LINEAR_LAYERS),
        PROJECTOR_LORA: _lora(arms.ALL_LINEAR_LAYERS, projector=True),
    }
    for fusion in (*FUSIONS, *LINEAR_PARTS, *ATTENTION_CHANGES):
        found[fusion] = _naming(arms.emma(fusion, tower))
    for fusion in FUSIONS:
        found[with_projector(fusion)] = _naming(arms.emma(fusion, tower, projector=True))
        found[shuffled(fusion)] = arms.shuffled(arms.emma(fusion, tower))
        found[constant(fusion)] = arms.constant(arms.emma(fusion, tower), CONSTANT_INSTRUCTION)
        found[random_tower(fusion)] = _naming(arms.emma(fusion, str(untrained_tower)))
        found[llm_embeddings(fusion)] = _naming(arms.emma(fusion, "llm"))
    return found


def _lora(layers: str, *, projector: bool = False) -> Builder:
    def build(model: PooledLlava, processor: LlavaProcessor) -> Arm:
        rank = arms.lora_of_size(model, ADAPTER_SIZE, layers)
        return arms.lora(rank, layers, projector=projector)(model, processor)

    return build


def _naming(builder: Builder) -> Builder:
    def build(model: PooledLlava, processor: LlavaProcessor) -> Arm:
        arm = builder(model, processor)
        arm.names_instruction = True
        return arm

    return build
