"""Calls of one patched model that run at the same time, and calls that fail, keep to themselves."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import functools
import importlib
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emma_adapter import EmmaConfig, InstructionError, get_adapter, patch_model
from tests.support import tiny
from tests.support.budget import SEED, budget

THREADS = 16
CALLS_OF_A_THREAD = budget(8, 64)  # 1,024 together in the full tier
QUESTIONS = ["is there a cat?", "how many dogs are there?", "what colour is the left one?", "describe the image"]


def patched(config: EmmaConfig | None = None, **options: Any):
    model = tiny.llava()
    adapter = patch_model(model, config, processor=tiny.processor(), **options)
    tiny.train_randomly(adapter.alignment)
    return model, adapter


class Request:
    """One call as a server gets it: a way to ask, a batch and, maybe, an explicit instruction."""

    def __init__(self, number: int) -> None:
        draw = random.Random(number)
        rows = [
            [tiny.user(f"{draw.choice(QUESTIONS)} {draw.randrange(50)}", images=draw.choice([0, 1, 1, 2]))]
            for _ in range(draw.choice([1, 1, 2, 3]))
        ]
        self.inputs = tiny.chat_inputs(rows, first_picture=number)
        self.how = draw.choice(["forward", "forward", "generate", "disabled", "named", "explicit", "text", "fails"])
        self.told = torch.tensor([[draw.randrange(5, 300) for _ in range(3)]])
        self.text = f"{draw.choice(QUESTIONS)} {number}"

    def __call__(self, model: Any) -> Tensor | str:
        adapter = get_adapter(model)
        with torch.no_grad():
            if self.how == "generate":
                return model.generate(**self.inputs, max_new_tokens=3, do_sample=False)
            if self.how == "disabled":
                with adapter.disabled(), adapter.disabled():
                    return model(**self.inputs).logits
            if self.how == "named":
                with adapter.instruction(self.told):
                    return model(**self.inputs).logits
            if self.how == "explicit":
                told = self.told.expand(len(self.inputs["input_ids"]), -1)
                return model(**self.inputs, instruction=told).logits
            if self.how == "text":
                return model(**self.inputs, instruction=self.text).logits
            if self.how == "fails":
                try:
                    model(**self.inputs, instruction=self.told.expand(7, -1))
                except InstructionError as error:
                    return str(error)
            return model(**self.inputs).logits


def same(one: Tensor | str, other: Tensor | str) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one == other


@pytest.fixture(params=["the default", "linear with a text tower"])
def served(request, clip_folder):
    if request.param == "the default":
        return patched()[0]
    return patched(EmmaConfig(fusion="linear", instruction_encoder=str(clip_folder), cache_size=8))[0]


@pytest.mark.slow
def test_a_thousand_calls_of_sixteen_threads_are_the_sequential_ones(served):
    requests = [Request(number) for number in range(40)]
    expected = [request(served) for request in requests]
    start = threading.Barrier(THREADS)

    def work(thread: int) -> list[str]:
        draw = random.Random(SEED + thread)
        start.wait()
        wrong = []
        for _ in range(CALLS_OF_A_THREAD):
            number = draw.randrange(len(requests))
            if not same(requests[number](served), expected[number]):
                wrong.append(f"request {number} ({requests[number].how}) in thread {thread}")
        return wrong

    with ThreadPoolExecutor(THREADS) as pool:
        assert [wrong for of_thread in pool.map(work, range(THREADS)) for wrong in of_thread] == []
    info = get_adapter(served).cache_info()
    assert info.currsize <= info.maxsize


def test_training_in_threads_gives_the_sequential_gradients():
    """Each thread its own batch and instruction, forward and backward; the gradients of a weight add up."""

    def losses(model, number):
        inputs = tiny.token_inputs([1, 2], seed=number)
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, -1] = inputs["input_ids"][:, -1]
        told = torch.tensor([[31 + number], [41 + number]])
        loss = model(**inputs, labels=labels, instruction=told).loss
        return torch.autograd.grad(loss, list(get_adapter(model).parameters()))

    model = tiny.llava()
    tiny.train_randomly(patch_model(model).alignment)
    expected = [losses(model, number) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: losses(model, number % 4), range(32)))
    for number, gradients in enumerate(found):
        assert all(map(torch.equal, gradients, expected[number % 4]))


def test_disabled_in_one_thread_while_another_generates():
    model, adapter = patched()
    inputs = Request(0).inputs
    expected = model.generate(
        **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    inside, outside = threading.Event(), threading.Event()

    def disable() -> None:
        with adapter.disabled():
            inside.set()
            assert outside.wait(60)

    thread = threading.Thread(target=disable)
    thread.start()
    assert inside.wait(60)
    found = model.generate(
        **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    outside.set()
    thread.join()
    assert all(map(torch.equal, found.logits, expected.logits))


# ------------------------------------------------------------------------------------------------------ asyncio


def logits(model: Any, inputs: dict[str, Tensor], **more: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs, **more).logits


def test_tasks_of_one_event_loop_are_in_their_own_blocks():
    """They take turns in one thread, wherever one waits."""
    model, adapter = patched()
    inputs = Request(0).inputs
    tokens = torch.tensor([[31], [32], [33], [34]])
    expected = [logits(model, inputs, instruction=told.expand(len(inputs["input_ids"]), -1)) for told in tokens]
    with adapter.disabled():
        plain = logits(model, inputs)
    inferred = logits(model, inputs)

    async def ask(number: int) -> bool:
        for turn in range(6):
            if (number + turn) % 3 == 0:
                block, wanted = adapter.disabled(), plain
            else:
                told = (number + turn) % 4
                block, wanted = adapter.instruction(tokens[told][None]), expected[told]
            with block:
                await asyncio.sleep(0)
                if not torch.equal(logits(model, inputs), wanted):
                    return False
                await asyncio.sleep(0.001 * (number % 3))
                if not torch.equal(logits(model, inputs), wanted):
                    return False
            if not torch.equal(logits(model, inputs), inferred):
                return False
            await asyncio.sleep(0)
        return True

    async def serve() -> list[bool]:
        return await asyncio.gather(*(ask(number) for number in range(8)))

    assert all(asyncio.run(serve()))


def test_a_block_reaches_the_worker_thread_of_its_task():
    model, adapter = patched()
    inputs = Request(0).inputs
    with adapter.disabled():
        plain = logits(model, inputs)

    async def serve() -> tuple[Tensor, Tensor]:
        async def disabled() -> Tensor:
            with adapter.disabled():
                return await asyncio.to_thread(logits, model, inputs)

        one, other = await asyncio.gather(disabled(), asyncio.to_thread(logits, model, inputs))
        return one, other

    one, other = asyncio.run(serve())
    assert torch.equal(one, plain)
    assert torch.equal(other, logits(model, inputs))


def test_a_cancelled_task_leaves_no_block_behind():
    model, adapter = patched()
    inputs = Request(0).inputs
    expected = logits(model, inputs)

    async def serve() -> Tensor:
        async def wait() -> None:
            with adapter.disabled(), adapter.instruction(torch.tensor([[31]])):
                await asyncio.sleep(60)

        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return logits(model, inputs)

    assert torch.equal(asyncio.run(serve()), expected)


def test_a_block_ends_in_another_context_than_it_began_in():
    """As that of an asynchronous generator may."""
    model, adapter = patched()
    inputs = Request(0).inputs
    expected = logits(model, inputs)
    block = adapter.disabled()
    block.__enter__()
    contextvars.copy_context().run(block.__exit__, None, None, None)
    block = adapter.disabled()
    contextvars.copy_context().run(block.__enter__)
    block.__exit__(None, None, None)
    assert not torch.equal(logits(model, inputs), expected)
    assert torch.equal(contextvars.Context().run(logits, model, inputs), expected)


# ------------------------------------------------------------------------------------------- replicas, DataParallel


@pytest.fixture
def replicas_on_the_cpu(monkeypatch):
    """nn.parallel.replicate, which copies weights between GPUs, with a copy on the CPU for each replica."""

    def copies(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [[tensor.detach().clone() if detach else tensor.clone() for tensor in tensors] for _ in devices]

    # A module whose name the package gives to its function.
    data_parallel = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(data_parallel, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr(data_parallel, "_get_device_index", lambda device, optional: device)
    return lambda model, count: data_parallel.replicate(model, list(range(count)))


def run_replicas(replicas: list[Any], batches: list[dict[str, Tensor]]) -> list[Any]:
    """Each in a thread of its own, as nn.parallel.parallel_apply does."""
    grad = torch.is_grad_enabled()

    def work(replica: Any, inputs: dict[str, Tensor]) -> Any:
        with torch.set_grad_enabled(grad):
            return replica(**inputs)

    with ThreadPoolExecutor(len(replicas)) as pool:
        return list(pool.map(work, replicas, batches))


def test_replicas_run_on_their_own_weights(replicas_on_the_cpu):
    model, _ = patched()
    batches = [Request(number).inputs for number in range(3)]
    expected = [logits(model, inputs) for inputs in batches]
    with torch.no_grad():
        replicas = replicas_on_the_cpu(model, 3)
        # A replica that asked the model it was made of would see this.
        model.model.vision_tower.apply(spoil)
        model.model.multi_modal_projector.apply(spoil)
        found = run_replicas(replicas, batches)
    for output, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(output.logits, wanted, rtol=0, atol=0)


def spoil(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data.fill_(float("nan"))


@pytest.mark.parametrize("block", ["disabled", "instruction"])
def test_replicas_are_in_the_blocks_of_the_call_they_were_made_for(block, replicas_on_the_cpu):
    model, adapter = patched()
    batches = [tiny.token_inputs([1, 2], seed=seed) for seed in range(2)]
    with torch.no_grad(), adapter.disabled() if block == "disabled" else adapter.instruction(torch.tensor([[31, 7]])):
        expected = [logits(model, inputs) for inputs in batches]
        found = run_replicas(replicas_on_the_cpu(model, 2), batches)
    assert all(torch.equal(output.logits, wanted) for output, wanted in zip(found, expected, strict=True))
    assert not torch.equal(logits(model, batches[0]), expected[0])


def test_replicas_train_the_adapter_they_were_made_of(replicas_on_the_cpu):
    model, adapter = patched()
    adapter.train_only(projector=True)
    model.train()
    batches = [tiny.chat_inputs([[tiny.user(text), tiny.assistant("two")]], generate=False) for text in QUESTIONS[:2]]
    for inputs in batches:
        inputs["labels"] = torch.full_like(inputs["input_ids"], -100)
        inputs["labels"][:, -2:] = inputs["input_ids"][:, -2:]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(sum(model(**inputs).loss for inputs in batches), trained)
    outputs = run_replicas(replicas_on_the_cpu(model, 2), batches)
    found = torch.autograd.grad(sum(output.loss for output in outputs), trained)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad(), adapter.disabled():
        plain = [logits(model, inputs) for inputs in batches]
        outputs = run_replicas(replicas_on_the_cpu(model, 2), batches)
    assert all(torch.equal(output.logits, wanted) for output, wanted in zip(outputs, plain, strict=True))


def test_a_data_parallel_model_is_patched_at_the_model_inside():
    model = tiny.llava()
    adapter = patch_model(nn.DataParallel(model))
    assert adapter.model is model
    assert get_adapter(nn.DataParallel(model)).model is model


# ------------------------------------------------------------------------------------------------ calls that raise


@pytest.mark.parametrize(
    "where", ["model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head"]
)
@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("how", ["forward", "generate", "training", "block"])
def test_a_call_that_raises_half_way_leaves_nothing(how, kind, where):
    model, adapter = patched()
    inputs = tiny.chat_inputs([[tiny.user("is there a cat?")]])
    other = tiny.chat_inputs([[tiny.user("how many dogs are there?")]], first_picture=5)
    expected = logits(model, other)

    def fail(*args: Any) -> None:
        raise kind("out of luck")

    handle = model.get_submodule(where).register_forward_pre_hook(fail)
    model.train(how == "training")
    block = adapter.instruction("a red bird") if how == "block" else contextlib.nullcontext()
    call = functools.partial(model.generate, max_new_tokens=2) if how == "generate" else model
    more = {} if how == "block" else {"instruction": "a red bird"}
    with pytest.raises(kind), block:
        call(**inputs, **more)
    handle.remove()
    model.eval()
    with pytest.raises(InstructionError):
        model.get_image_features(pixel_values=other["pixel_values"])
    with torch.no_grad():
        assert torch.equal(model.lm_head(model.model(**other).last_hidden_state), expected)
    assert torch.equal(logits(model, other), expected)
    generated = model.generate(**other, max_new_tokens=2, do_sample=False)
    assert torch.equal(generated, model.generate(**other, max_new_tokens=2, do_sample=False))


def test_a_call_inside_of_generate_leaves_generate_alone():
    """As a logits processor makes one that compares with the original model."""
    model, adapter = patched()
    inputs, other = Request(0).inputs, Request(3).inputs

    class Compare:
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            with adapter.disabled():
                logits(model, other)
            logits(model, other, instruction="a red bird")
            logits(model, inputs)
            return scores

    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for more in ({}, {"use_cache": False}, {"num_beams": 2}):
        expected = model.generate(**inputs, **options, **more)
        found = model.generate(**inputs, **options, **more, logits_processor=[Compare()])
        assert all(map(torch.equal, found.logits, expected.logits))


# ------------------------------------------------------------------------------------------------------ tokenizers


def test_the_users_tokenizer_is_left_alone():
    """One thread tokenizes, as a server does, while another asks in words: a tokenizer holds the padding it was last
    asked for."""
    processor = tiny.processor()
    model = tiny.llava()
    patch_model(model, processor=processor)
    inputs = tiny.token_inputs([1])
    texts = ["is there a cat?", "how many dogs are there, and what colour is the left one?"] * 4
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            logits(model, inputs, instruction="what colour is the bird?")

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        try:
            for _ in range(budget(300, 1500)):
                ids = processor.tokenizer(texts, padding=True)["input_ids"]
                assert len({len(row) for row in ids}) == 1
        finally:
            stop.set()
        asking.result()
    words = copy.deepcopy(processor.tokenizer)
    assert words.padding_side == processor.tokenizer.padding_side


def test_patching_leaves_the_users_tokenizer_alone():
    """Another thread may be about to use the padding and truncation that it asked for."""
    processor = tiny.processor()
    processor.tokenizer(["is there", "how many dogs are there?"], padding=True, truncation=True, max_length=5)
    rust = processor.tokenizer.backend_tokenizer
    before = rust.padding, rust.truncation
    assert None not in before
    adapter = patch_model(tiny.llava(), EmmaConfig(), processor=processor)
    adapter.add("other", processor=processor)
    assert (rust.padding, rust.truncation) == before
