"""A patched LLaVA on this device: identity, generation, training, CUDA graphs."""

from __future__ import annotations

from typing import Any

import torch

from . import correctness
from .gpu_quarter_hour import Log
from .machine import tower_config

QUESTION = "how many dogs are there?"


def check(log: Log, device: torch.device, *, dry: bool) -> bool:
    """True if all of it holds. ``dry``: a tiny model, in float32."""
    good = True
    for name in ("tiny",) if dry else ("tiny", "real size"):
        good &= _patched(log, name, device, torch.float32 if dry else torch.bfloat16)
    return good if dry else good & _in_cuda_graphs(log, device)


def _llava(name: str) -> tuple[Any, Any]:
    """The model with random weights and its processor: tiny, or with the vision tower of LLaVA-1.5 (576 tokens of width
    1024) and two layers of a language model 4096 wide."""
    from tests.support import tiny

    if name == "tiny":
        return tiny.llava(), tiny.processor()
    text = tiny.llava().config.text_config
    text.update(
        {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 2,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "head_dim": 128,
        }
    )
    processor = tiny.processor()
    for size in ("size", "crop_size"):
        setattr(processor.image_processor, size, {"height": 336, "width": 336})
    return tiny.llava(vision_config=tower_config(), text_config=text), processor


def _patched(log: Log, name: str, device: torch.device, dtype: torch.dtype) -> bool:
    from PIL import Image

    import emma_adapter

    with torch.device(device):
        model, processor = _llava(name)
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
    log(case=f"{name}: identity, bit for bit", ok=same and same_ids, logits=same, generated=same_ids)
    adapter.train_only()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(5):
        loss = model(**inputs, labels=inputs["input_ids"], instruction=QUESTION).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    learns = all(loss == loss for loss in losses) and losses[-1] < losses[0]  # noqa: PLR0124 (NaN)
    ran = sorted({use.runs for use in adapter.kernel_report()})
    log(case=f"{name}: five steps", ok=learns and ran == ["triton"], losses=losses, ran=ran)
    with torch.no_grad():
        trained = model(**inputs, instruction=QUESTION).logits
    log(case=f"{name}: what was trained shows", ok=bool((trained - before).abs().max() > 0))
    emma_adapter.unpatch_model(model)
    with torch.no_grad():
        again = torch.equal(model(**inputs).logits, before)
    log(case=f"{name}: unpatched, bit for bit", ok=again)
    return same and same_ids and learns and ran == ["triton"] and again


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
def _same_in_a_graph(call: Any) -> bool:
    expected = call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    return torch.equal(captured, expected)
