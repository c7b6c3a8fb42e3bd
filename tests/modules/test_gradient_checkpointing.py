"""A part of the model that is computed again for backward does what it did in its call."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from emma_adapter import EmmaConfig, InstructionError, get_adapter, patch_model
from tests.support import tiny
from tests.support.budget import budget, some

MODES = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
INSTRUCTIONS = torch.tensor([[31, 41, 5], [32, 42, 6], [33, 43, 7]])


def trained(fusion: str = "attention", place: str = "before_projector", *, projector: bool = False):
    """A patched model in training, of which everything is trained."""
    model = tiny.llava()
    config = EmmaConfig(fusion=fusion, place=place, max_instruction_tokens=8 if fusion == "linear" else None)
    adapter = patch_model(model, config)
    tiny.train_randomly(adapter.alignment)
    if projector:
        adapter.train_only(projector=True)
        tiny.train_randomly(adapter.projector, scale=0.1, seed=1)
    model.requires_grad_(True)
    return model.train()


def checkpointed(call: Callable[..., Any], reentrant: bool) -> Callable[..., Any]:
    """``call``, computed again in backward, whatever it takes and returns."""

    def run(*args: Any, **kwargs: Any) -> Any:
        given, layout = tree_flatten((args, kwargs))
        where = [i for i, value in enumerate(given) if isinstance(value, Tensor)]
        made: list[Any] = []

        def region(*tensors: Tensor) -> tuple[Tensor, ...]:
            values = list(given)
            for i, tensor in zip(where, tensors, strict=True):
                values[i] = tensor
            args, kwargs = tree_unflatten(values, layout)
            made[:] = tree_flatten(call(*args, **kwargs))
            return tuple(value for value in made[0] if isinstance(value, Tensor))

        results = iter(checkpoint(region, *(given[i] for i in where), use_reentrant=reentrant))
        return tree_unflatten([next(results) if isinstance(v, Tensor) else v for v in made[0]], made[1])

    return run


def checkpoint_forward(find: Callable[[Any], Any]):
    def apply(model: Any, reentrant: bool) -> None:
        module = find(model)
        module.forward = checkpointed(module.forward, reentrant)

    return apply


def wrap(path: str):
    """By PyTorch's own wrapper module, which in reentrant mode needs a module that returns tensors."""

    def apply(model: Any, reentrant: bool) -> None:
        if reentrant and not path.endswith("projector"):
            pytest.skip("the module returns a ModelOutput")
        holder = model.get_submodule(path.rpartition(".")[0])
        mode = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
        name = path.rpartition(".")[2]
        setattr(holder, name, checkpoint_wrapper(getattr(holder, name), checkpoint_impl=mode))

    return apply


def checkpoint_features(model: Any, reentrant: bool) -> None:
    inner = model.model
    inner.get_image_features = checkpointed(inner.get_image_features, reentrant)


def checkpoint_layers(model: Any, reentrant: bool) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})


REGIONS: dict[str, Callable[[Any, bool], None]] = {
    "layers": checkpoint_layers,
    "vision tower": checkpoint_forward(lambda model: model.model.vision_tower),
    "wrapped vision tower": wrap("model.vision_tower"),
    "projector": checkpoint_forward(lambda model: model.model.multi_modal_projector),
    "wrapped projector": wrap("model.multi_modal_projector"),
    "vision tower and projector": checkpoint_features,
    "inner model": checkpoint_forward(lambda model: model.model),
    "wrapped inner model": wrap("model"),
    "outer model's forward": checkpoint_forward(lambda model: model),
    "language model": checkpoint_forward(lambda model: model.model.language_model),
}
ALL = pytest.mark.parametrize(
    ("region", "reentrant"), some(1, [*REGIONS, "whole call", "nothing"], [True, False]), ids=str
)
FILTERS = [
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]
pytestmark = FILTERS


class Calls:
    """Calls of a model whose losses are added up, and the gradients of all of it after one backward."""

    def __init__(self, model: Any, region: str, reentrant: bool) -> None:
        self.model, self.call = model, model
        if region in REGIONS:
            REGIONS[region](model, reentrant)
        elif region == "whole call":
            self.call = checkpointed(model, reentrant)
        self.losses: list[Tensor] = []

    def __call__(self, inputs: dict[str, Tensor], **more: Any) -> None:
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, -1] = inputs["input_ids"][:, -1]
        self.losses.append(self.call(**inputs, labels=labels, use_cache=False, **more).loss)

    def gradients(self, *, other_thread: bool = False) -> list[Tensor | None]:
        total = torch.stack(self.losses).sum()
        if other_thread:
            failed = []

            def work() -> None:
                try:
                    total.backward()
                except InstructionError as error:
                    failed.append(error)

            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            if failed:
                raise failed[0]
        else:
            total.backward()
        return [parameter.grad for parameter in self.model.parameters()]


def batches() -> list[dict[str, Tensor]]:
    made = [tiny.token_inputs([1, 2], seed=1), tiny.token_inputs([2, 1], seed=2)]
    for inputs in made:
        # What reentrant checkpointing asks for: something in the input that wants a gradient.
        inputs["pixel_values"].requires_grad_(True)
    return made


def assert_same(plain: list[Tensor | None], recomputed: list[Tensor | None]) -> None:
    assert sum(map(_any, plain)) > len(plain) // 2
    for one, other in zip(plain, recomputed, strict=True):
        # Reentrant checkpointing gives zeros where an output goes unused.
        assert torch.equal(one, other) if one is not None and other is not None else not _any(one) and not _any(other)


def _any(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())


def both(scenario: Callable[[Calls], None], region: str, reentrant: bool, **options: Any) -> None:
    """That the gradients of a scenario are those of the plain run."""
    gradients = []
    for where in ("nothing", region):
        calls = Calls(trained(**options), where, reentrant)
        scenario(calls)
        gradients.append(calls.gradients(other_thread=where == region))
    assert_same(*gradients)


@ALL
@pytest.mark.parametrize("fusion", budget(["attention"], ["attention", "linear"]))
def test_two_forwards_before_one_backward_in_another_thread(fusion, region, reentrant):
    def scenario(calls):
        for inputs in batches():
            calls(inputs)

    both(scenario, region, reentrant, fusion=fusion)


@ALL
@pytest.mark.parametrize("place", ["before_projector", "after_projector"])
def test_one_batch_with_two_instructions(place, region, reentrant):
    def scenario(calls):
        inputs = batches()[0]
        for told in (INSTRUCTIONS[:2], INSTRUCTIONS[1:]):
            calls(inputs, instruction=told)

    both(scenario, region, reentrant, place=place)


@ALL
def test_backward_outside_of_the_blocks_that_the_calls_were_in(region, reentrant):
    def scenario(calls):
        adapter = get_adapter(calls.model)
        first, second = batches()
        with adapter.instruction(INSTRUCTIONS[:2]):
            calls(first)
        with adapter.disabled():
            calls(second)

    both(scenario, region, reentrant)


@ALL
def test_backward_inside_of_a_block_that_the_call_was_not_in(region, reentrant):
    gradients = []
    for where in ("nothing", region):
        model = trained()
        calls = Calls(model, where, reentrant)
        adapter = get_adapter(model)
        with adapter.instruction(INSTRUCTIONS[:2]):
            calls(batches()[0])
        calls(batches()[1])
        with adapter.disabled() if where == region else contextlib.nullcontext():
            gradients.append(calls.gradients())
    assert_same(*gradients)


@MODES
@pytest.mark.parametrize("region", [region for region in REGIONS if region != "projector"])
def test_one_batch_with_the_adapter_on_and_off(region, reentrant):
    """Beside a projector that was trained with the adapter, and gives way while it is disabled."""

    def scenario(calls):
        inputs = batches()[0]
        with get_adapter(calls.model).disabled():
            calls(inputs)
        calls(inputs)

    both(scenario, region, reentrant, projector=True)


@MODES
def test_whole_calls_that_cannot_be_told_apart_are_an_error(reentrant):
    model = trained()
    calls = Calls(model, "whole call", reentrant)
    inputs = batches()[0]
    with get_adapter(model).disabled():
        calls(inputs)
    calls(inputs)
    with pytest.raises(InstructionError, match=r"input_ids\.clone\(\)"):
        calls.gradients()


@MODES
def test_whole_calls_one_after_the_other_may_share_their_input(reentrant):
    gradients = []
    for region in ("nothing", "whole call"):
        model = trained()
        inputs = batches()[0]
        for told in INSTRUCTIONS[:, None]:
            calls = Calls(model, region, reentrant)
            with get_adapter(model).instruction(told):
                calls(inputs)
            found = calls.gradients()
        gradients.append(found)
    assert_same(*gradients)


@MODES
def test_features_alone_are_recomputed_for_the_instruction_of_their_block(reentrant):
    gradients = []
    for region in ("nothing", "vision tower and projector"):
        model = trained()
        if region != "nothing":
            REGIONS[region](model, reentrant)
        adapter = get_adapter(model)
        total = torch.zeros(())
        for told, inputs in zip(INSTRUCTIONS[:, None], batches(), strict=False):
            with adapter.instruction(told):
                features = model.model.get_image_features(inputs["pixel_values"]).pooler_output
            total = total + sum(image.square().sum() for image in features)
        total.backward()
        gradients.append([parameter.grad for parameter in model.model.multi_modal_projector.parameters()])
    assert_same(*gradients)


@MODES
def test_a_projector_in_evaluation_mode_is_recomputed_for_the_instruction_of_its_block(reentrant):
    """Reentrant checkpointing records no gradients there: that some are wanted shows in the visual tokens alone."""
    gradients = []
    for checkpoints in (False, True):
        model = trained().eval()
        projector = model.model.multi_modal_projector
        visual_tokens = torch.randn(1, 4, tiny.vision_config().hidden_size, generator=torch.Generator().manual_seed(0))
        visual_tokens.requires_grad_(True)
        with get_adapter(model).instruction(INSTRUCTIONS[:1]):
            call = checkpointed(projector, reentrant) if checkpoints else projector
            total = call(visual_tokens).square().sum()
        total.backward()
        gradients.append([visual_tokens.grad, *(parameter.grad for parameter in projector.parameters())])
    assert_same(*gradients)


@MODES
def test_features_that_were_checkpointed_before_patching_are_an_error(reentrant):
    model = tiny.llava()
    checkpoint_features(model, reentrant)
    patch_model(model)
    calls = Calls(model.train(), "nothing", reentrant)
    calls(batches()[0])
    with pytest.raises(InstructionError, match="patch_model first; then checkpoint"):
        calls.gradients()


def test_projector_of_another_adapter_in_backward():
    """Recomputed for the adapter that was disabled, not for the one that is active since."""
    gradients = []
    for region in ("nothing", "wrapped projector"):
        model = trained(projector=True)
        adapter = get_adapter(model).add("other", EmmaConfig())
        calls = Calls(model, region, False)
        with adapter.disabled():
            calls(batches()[0])
        if region != "nothing":
            adapter.set_active("other")
            model.requires_grad_(True)
        gradients.append(calls.gradients())
        vision = len(list(model.model.vision_tower.parameters()))
        gradients[-1] = gradients[-1][:vision]
    assert_same(*gradients)


def test_nothing_is_remembered_longer_than_its_tensors():
    model = trained()
    inputs = batches()[0]
    calls = Calls(model, "nothing", False)
    for _ in range(300):
        with get_adapter(model).instruction(INSTRUCTIONS[:1]):
            calls(inputs | {"input_ids": inputs["input_ids"].clone()})
        calls.losses.clear()
    memories = vars(model._emma.memories)
    assert len(memories) == 4
    assert {name: len(memory) for name, memory in memories.items() if len(memory) > 2} == {}
