"""What each arm trains, by the name it has in records, table and figure."""

from __future__ import annotations

from pathlib import Path

from transformers import LlavaProcessor

from emma_adapter import EmmaConfig

from .. import arms
from ..arms import Arm, Builder
from ..pooled_llava import PooledLlava
from . import pooled_family, variants

FUSIONS = ("linear", "attention", "modulation")
LINEAR_PARTS = ("linear, instruction projection only", "linear, alignment only")
ATTENTION_CHANGES = (
    "attention, usual q/k initialisation",
    "attention, no query term per position",
    "attention, output not zero-initialised",
    "attention, scalar zero gate",
)
BASE, PROJECTOR = "base", "projector only"
LORA_QV, PROJECTOR_LORA = "LoRA on q, v", "projector + LoRA on all linears"
TWO_STEPS = variants.TWO_STEPS
#: MoDA's decoder has 2A parameters with one layer; with two, as its authors have it, more than any control here.
MODA = "MoDA, one layer"

#: A: parameters of ``attention`` and ``modulation`` on this base model; LoRA gets the rank that comes nearest to a
#: multiple of it.
ADAPTER_SIZE = 43_680
#: Of LoRA alone.
MULTIPLES = (1, 2, 3)

CONSTANT_INSTRUCTION = "what is there ?"
#: What an adapter is told if the turns of a prompt can't be told apart.
WITH_ROLES = "USER: {question} ASSISTANT:"


def lora(multiple: int = 1) -> str:
    """LoRA of a multiple of the adapter's size."""
    return "LoRA on all linears" + (f", {multiple}A" if multiple > 1 else "")


def joint(fusion: str, multiple: int = 1) -> str:
    """The adapter and LoRA of a multiple of its size, trained together."""
    return f"{fusion} + {lora(multiple)}"


def practice(fusion: str) -> list[str]:
    """What is compared at every pooling, beside the base model."""
    return [*(lora(multiple) for multiple in MULTIPLES), fusion, joint(fusion), joint(fusion, 2)]


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


def behind_projector(fusion: str) -> str:
    return f"{fusion}, behind the projector"


def with_roles(arm: str) -> str:
    return f"{arm}, with role words"


def controls(fusion: str) -> tuple[str, ...]:
    """Arms that are trained like the adapter and don't know the question before the language model."""
    loras = [lora(multiple) for multiple in MULTIPLES]
    return (PROJECTOR, LORA_QV, *loras, PROJECTOR_LORA, shuffled(fusion), constant(fusion))


def builders(text_tower: Path, untrained_tower: Path) -> dict[str, Builder]:
    """All arms there are. Registers the variants of the fusions, and what is special about the base model."""
    variants.register()
    pooled_family.register()
    tower = str(text_tower)
    found: dict[str, Builder] = {
        BASE: arms.base,
        PROJECTOR: arms.projector_only,
        LORA_QV: _lora(layers=arms.QUERIES_AND_VALUES),
        PROJECTOR_LORA: _lora(projector=True),
        TWO_STEPS: arms.instructed(arms.emma(TWO_STEPS, tower, inner_dim=variants.TWO_STEPS_WIDTH)),
    }
    moda = EmmaConfig.moda(inner_dim=64, num_heads=8, fusion_options={"num_layers": 1})
    found[MODA] = arms.instructed(arms.adapter(moda))
    for multiple in MULTIPLES:
        found[lora(multiple)] = _lora(multiple)
    for fusion in (*FUSIONS, *LINEAR_PARTS, *ATTENTION_CHANGES):
        found[fusion] = arms.instructed(arms.emma(fusion, tower))
    for fusion in FUSIONS:
        adapter, by_llm = arms.emma(fusion, tower), arms.emma(fusion, "llm")
        for multiple in MULTIPLES:
            found[joint(fusion, multiple)] = arms.instructed(arms.together(adapter, _lora(multiple)))
        found[with_projector(fusion)] = arms.instructed(arms.emma(fusion, tower, projector=True))
        found[behind_projector(fusion)] = arms.instructed(arms.emma(fusion, tower, place="after_projector"))
        found[shuffled(fusion)] = arms.shuffled(adapter)
        found[constant(fusion)] = arms.instructed(adapter, CONSTANT_INSTRUCTION)
        found[random_tower(fusion)] = arms.instructed(arms.emma(fusion, str(untrained_tower)))
        found[llm_embeddings(fusion)] = arms.instructed(by_llm)
        found[with_roles(fusion)] = arms.instructed(adapter, WITH_ROLES)
        found[with_roles(llm_embeddings(fusion))] = arms.instructed(by_llm, WITH_ROLES)
    return found


def _lora(multiple: int = 1, *, layers: str = arms.ALL_LINEAR_LAYERS, projector: bool = False) -> Builder:
    def build(model: PooledLlava, processor: LlavaProcessor) -> Arm:
        rank = arms.lora_of_size(model, multiple * ADAPTER_SIZE, layers)
        return arms.lora(rank, layers, projector=projector)(model, processor)

    return build
