"""A patched LLaVA on this device: identity, generation, training, CUDA graphs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import correctness
from .gpu_quarter_hour import Log
from .machine import tower_config

QUESTION = "how many dogs are there?"
_STEPS = 6


@dataclass(frozen=True)
class ModelSize:
    """What a config of the vision tower and one of the language model have that differs from the tests' tiny model."""

    name: str
    vision: dict[str, int]
    text: dict[str, int]


TINY = ModelSize("tiny", {}, {})
#: The vision tower of LLaVA-1.5, 576 tokens of width 1024, and two layers of its language model, 4096 wide.
REAL = ModelSize(
    "real size",
    {
        name: getattr(tower_config(), name)
        for name in (
            *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size"),
            *("patch_size", "projection_dim"),
        )
    },
    {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
    },
)
#: What a CPU can do of it.
REDUCED = ModelSize(
    "reduced",
    {**REAL.vision, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    | {"image_size": 56, "projection_dim": 32},
    {**REAL.text, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
    | {"head_dim": 32},
)


def check(log: Log, device: torch.device, *, dry: bool) -> bool:
    """True if all of it holds. ``dry``: small models, in float32, and no CUDA graph."""
    good = True
    for size in (TINY, REDUCED if dry else REAL):
        good &= _patched(log, size, device, torch.float32 if dry else torch.bfloat16)
    log(note="no CUDA graph of a prefill: the instruction is read from the prompt on the host")
    return good if dry else good & _in_cuda_graphs(log, device)


def _llava(size: ModelSize) -> tuple[Any, Any]:
    """The model with random weights and its processor."""
    from tests.support import tiny

    vision, processor = tiny.vision_config(), tiny.processor()
    vision.update(size.vision)
    text = tiny.llama_config(len(processor.tokenizer))
    text.update(size.text)
    pixels = {"height": vision.image_size, "width": vision.image_size}
    for name in ("size", "crop_size"):
        setattr(processor.image_processor, name, pixels)
    tokens = (vision.image_size // vision.patch_size) ** 2
    return tiny.llava(vision_config=vision, text_config=text, image_seq_length=tokens), processor


def _patched(log: Log, size: ModelSize, device: torch.device, dtype: torch.dtype) -> bool:
    from PIL import Image

    import emma_adapter

    with torch.device(device):
        model, processor = _llava(size)
    model = model.to(device, dtype)
    inputs = processor(
        text=f"USER: <image>\n{QUESTION} ASSISTANT:", images=Image.new("RGB", (336, 336), "red"), return_tensors="pt"
    ).to(device)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with torch.no_grad():
        before = model(**inputs).logits
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    config = emma_adapter.EmmaConfig(kernel="triton", instruction_encoder="llm")
    adapter = emma_adapter.patch_model(model, config, processor=processor)
    with torch.no_grad():
        same = torch.equal(model(**inputs).logits, before)
        same_ids = torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), ids)
    log(case=f"{size.name}: identity, bit for bit", ok=same and same_ids, logits=same, generated=same_ids)
    learns = _learns(log, size, model, adapter, inputs)
    with torch.no_grad():
        trained = model(**inputs, instruction=QUESTION).logits
    shows = bool((trained - before).abs().max() > 0)
    log(case=f"{size.name}: what was trained shows", ok=shows)
    decodes = _decodes_in_a_cuda_graph(log, size, model, inputs)
    emma_adapter.unpatch_model(model)
    with torch.no_grad():
        again = torch.equal(model(**inputs).logits, before)
    log(case=f"{size.name}: unpatched, bit for bit", ok=again)
    return same and same_ids and learns and shows and decodes and again


def _learns(log: Log, size: ModelSize, model: Any, adapter: Any, inputs: Any) -> bool:
    """Five steps by the kernels: finite gradients for all that trains, and a loss that falls."""
    adapter.train_only()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=5e-3)
    losses, without = [], set(trained)
    for step in range(6):
        loss = model(**inputs, labels=inputs["input_ids"], instruction=QUESTION).loss
        losses.append(loss.item())
        if step == 5:  # It only tells what the fifth step did.
            break
        loss.backward()
        # The first step moves the output alone: the others' gradients are zero until it has.
        without -= {name for name, p in trained.items() if p.grad is not None and bool(p.grad.any())}
        broken = [name for name, p in trained.items() if p.grad is not None and not bool(p.grad.isfinite().all())]
        if broken:
            log(case=f"{size.name}: five steps", ok=False, not_finite=broken, losses=losses)
            return False
        optimizer.step()
        optimizer.zero_grad()
    ran = sorted({use.runs for use in adapter.kernel_report()})
    good = losses[-1] < losses[0] and ran == ["triton"] and not without
    log(case=f"{size.name}: five steps", ok=good, losses=losses, ran=ran, without_gradient=sorted(without))
    return good


@torch.no_grad()
def _decodes_in_a_cuda_graph(log: Log, size: ModelSize, model: Any, inputs: Any) -> bool:
    """A step of decoding of the patched model, with a static cache: the same tokens from a graph as without. On a CPU
    the same steps without a graph."""
    from transformers import StaticCache

    given = {name: value for name, value in inputs.items() if name != "attention_mask"}
    taken = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    length = inputs["input_ids"].shape[1] + _STEPS + 4
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length)
    token = torch.zeros(1, 1, dtype=torch.long, device=inputs["input_ids"].device)
    logits = torch.zeros(1, model.config.get_text_config().vocab_size, device=token.device)

    def step() -> None:
        found = model(input_ids=token, use_cache=True, **{taken: cache}).logits[:, -1].float()
        logits.copy_(found)
        token.copy_(found.argmax(-1, keepdim=True))

    def decode(advance: Callable[[], None]) -> tuple[list[int], Tensor]:
        cache.reset()
        first = model(**given, instruction=QUESTION, use_cache=True, **{taken: cache}).logits[:, -1]
        token.copy_(first.argmax(-1, keepdim=True))
        tokens = []
        for _ in range(_STEPS):
            advance()
            tokens.append(int(token))
        return tokens, logits.clone()

    name = f"{size.name}: decoding in a CUDA graph"
    try:
        expected, last = decode(step)
        graphed = record_graph(step, warm_up=2)[0] if token.is_cuda else step
        found, again = decode(graphed)
    except RuntimeError as error:
        log(case=name, ok=False, error=str(error)[:300])
        return False
    same = found == expected and torch.equal(again, last)
    log(case=name, ok=same, tokens=found, expected=expected, graph=token.is_cuda)
    return same


def _in_cuda_graphs(log: Log, device: torch.device) -> bool:
    """The adapter in a CUDA graph, of images of one size and of packed ones: the same bits as without."""
    good = True
    for operation in ("modulation", "linear"):
        for size in correctness.REAL:
            if size.name not in ("LLaVA-1.5", "packed") or (size.grids and operation == "linear"):
                continue
            alignment = correctness.make(operation, size, device)
            given = correctness.inputs(size, torch.bfloat16, device)

            def call(alignment: Any = alignment, given: correctness.Inputs = given) -> torch.Tensor:
                output: torch.Tensor = alignment(given.visual, given.instruction, given.mask, packing=given.packing)
                return output

            try:
                same = _same_in_a_graph(call)
                log(case=f"{operation}, {size.name}: CUDA graph", ok=same)
            except RuntimeError as error:
                same = False
                log(case=f"{operation}, {size.name}: CUDA graph", ok=False, error=str(error)[:300])
            good &= same
    return good


@torch.no_grad()
def _same_in_a_graph(call: Callable[[], Tensor]) -> bool:
    expected = call()
    replay, captured = record_graph(call, warm_up=3)
    for _ in range(3):
        replay()
    torch.cuda.synchronize()
    return torch.equal(captured, expected)


def record_graph(call: Callable[[], Any], *, warm_up: int) -> tuple[Callable[[], None], Any]:
    """How to replay it, and what it returned when it was captured: the graph writes there."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    return graph.replay, captured
