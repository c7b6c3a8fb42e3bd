"""Models of the zoo with trained experts, and stock models that compute what an expert should."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from emma_adapter import EmmaVisionExperts, add_vision_expert
from emma_adapter.models.registry import find_family
from tests.support import tiny
from tests.support.zoo import ZOO, Row

#: Families whose vision tower can't have experts, and what the error says.
REFUSED = {"gemma3n": "0 stacks of blocks with an MLP"}
WITH_EXPERTS = tuple(name for name in ZOO if name not in REFUSED)
#: One picture in a row each, of sizes that make different numbers of tiles where there are tiles.
ROWS = tuple(
    Row(("what is left?",), images=(size,), seed=number)
    for number, size in enumerate([(56, 56), (28, 84), (112, 56), (60, 90)])
)


def with_expert(
    name: str = "llava", expert: str = "stem", *, model: Any = None, trained: bool = True, **settings: Any
) -> EmmaVisionExperts:
    """A model of the zoo with an expert; with ``trained``, one that differs from the original."""
    experts = add_vision_expert(ZOO[name].model() if model is None else model, expert, **settings)
    if trained:
        change(experts, expert)
    return experts


def change(experts: EmmaVisionExperts, expert: str = "stem", seed: int = 0) -> None:
    """Give an expert other values than the original's."""
    tiny.train_randomly(nn.ParameterList(experts.model.emma_experts.of(expert)), 0.2, seed)


def pixels_of(batch: dict[str, Any]) -> dict[str, Any]:
    """What of a batch is about pictures and videos."""
    texts = ("input_ids", "attention_mask", "labels", "token_type_ids", "mm_token_type_ids")
    return {name: value for name, value in batch.items() if name not in texts}


def learn_router(experts: EmmaVisionExperts, labels: list[str], inputs: dict[str, Any]) -> None:
    """Train the router until it sends every image where it should go."""
    experts.train_only(router=True)
    parameters = [p for p in experts.parameters() if p.requires_grad]
    optimizer = torch.optim.LBFGS(parameters, max_iter=200, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = experts.router_loss(labels=labels, **inputs)
        loss.backward()
        return loss

    optimizer.step(step)
    experts.unfreeze()


def used_mlps(model: Any, layers: int) -> list[nn.Module]:
    """The MLPs of the last blocks of a vision tower whose outputs the projector gets, by the names they have."""
    stack = next(
        module
        for module in find_family(model).inner(model).modules()
        # Qwen3-Omni's projectors have a list of layers of that name, and come first.
        if isinstance(module, nn.ModuleList)
        and (name := name_of_mlp(module[0]))
        and not isinstance(getattr(module[0], name), nn.ModuleList)
    )
    config = model.config
    # transformers < 5.18 says vision_feature_layers for VipLLaVA.
    layer = getattr(config, "vision_feature_layer", getattr(config, "vision_feature_layers", None))
    states = range(len(stack) + 1)
    used = max(states[one] for one in ([layer] if isinstance(layer, int) else layer or [-1]))
    return [getattr(block, name_of_mlp(block)) for block in stack[used - layers : used]]


def name_of_mlp(block: nn.Module) -> str | None:
    return next((name for name in ("mlp", "feed_forward", "ffn") if hasattr(block, name)), None)


def stock_with(experts: EmmaVisionExperts, expert: str = "stem") -> Any:
    """A stock model in whose vision tower the expert's weights stand in the place of the original's."""
    stock = copy.deepcopy(experts.model)
    EmmaVisionExperts(stock).remove()
    mlps = used_mlps(stock, experts.layers)
    with torch.no_grad():
        for key, value in experts.model.emma_experts.experts.items():
            name, number, path = key.split("/", 2)
            if name == expert:
                mlps[int(number)].get_parameter(path.replace("/", ".")).copy_(value)
    return stock


@torch.no_grad()
def features(model: Any, batch: dict[str, Any]) -> list[Tensor]:
    """What the vision side makes of each image and video of a batch, as the language model gets it."""
    family = find_family(model)
    inner = family.inner(model)
    found: list[Tensor] = []
    for modality in family.modalities:
        pixels = family.pixel_arguments[modality]
        if batch.get(pixels) is not None:
            method = getattr(inner, family.feature_methods[modality])
            others = {*inspect.signature(method).parameters, "image_sizes"} & set(batch) - {"pixel_values", pixels}
            found += list(method(batch[pixels], **{name: batch[name] for name in others}).pooler_output)
    return found


def same(one: list[Tensor], other: list[Tensor]) -> list[bool]:
    """For each image, whether all bits are the same."""
    return [torch.equal(a, b) for a, b in zip(one, other, strict=True)]
