"""What a soak does: calls of many threads to one model, and what is done to models of one thread's own."""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoProcessor, LlavaProcessor

from emma_adapter import (
    EmmaAdapter,
    EmmaConfig,
    EmmaError,
    InstructionError,
    RoutingError,
    get_adapter,
    load_adapter,
    patch_model,
    unpatch_model,
)

from ..digits_vqa import arms
from ..digits_vqa.pooled_llava import PooledLlava
from ..digits_vqa.scenes import IMAGE_SIZE
from ..digits_vqa.vlm import BASE_DIR, TEXT_TOWER_DIR, WORDS

#: Small, so that it is full within seconds.
CACHE_SIZE = 16
_IGNORE = -100
_WORDS = [word for word in WORDS if word.isalpha()]
Inputs = dict[str, Any]


class Served:
    """A model that answers many threads at once, and that nobody changes."""

    def __init__(self) -> None:
        self.processor: LlavaProcessor = AutoProcessor.from_pretrained(BASE_DIR)
        self.model = arms.load_base().eval().requires_grad_(False)
        probes = [self.inputs(random.Random(seed), instruction=f"{_WORDS[seed]} digit ?") for seed in range(3)]
        self.probes = dict(enumerate(probes))
        self._expected = {f"original, {number}": self._answer(probe) for number, probe in self.probes.items()}
        config = EmmaConfig(fusion="attention", instruction_encoder=str(TEXT_TOWER_DIR), cache_size=CACHE_SIZE)
        self.adapter = patch_model(self.model, config, processor=self.processor)
        train_randomly(self.adapter)
        self._expected |= {f"adapter, {number}": self._answer(probe) for number, probe in self.probes.items()}
        for number in self.probes:
            if torch.equal(self._expected[f"original, {number}"], self._expected[f"adapter, {number}"]):
                raise RuntimeError("the adapter changes nothing, so that a soak would tell nothing")

    def drifted(self) -> list[str]:
        """The probes whose answers are no longer those of the beginning, bit for bit: the original model's where the
        adapter is disabled."""
        found = {f"adapter, {number}": self._answer(probe) for number, probe in self.probes.items()}
        with self.adapter.disable_adapter():
            found |= {f"original, {number}": self._answer(probe) for number, probe in self.probes.items()}
        return [name for name, answer in found.items() if not torch.equal(answer, self._expected[name])]

    def _answer(self, inputs: Inputs) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.model(**inputs).logits
        return logits

    def inputs(self, dice: random.Random, *, instruction: str | None = None, answered: bool = False) -> Inputs:
        """A batch of one to four rows with up to three images each, and at least one in all.

        Args:
            dice: for everything.
            instruction: of all rows; default: a new one for each.
            answered: with answers, and labels for them.
        """
        images = [dice.randint(0, 3) for _ in range(dice.randint(1, 4))]
        images[0] = max(images[0], 1)
        texts = []
        for number in images:
            said = instruction or " ".join(dice.choices(_WORDS, k=8))
            content: Any = [{"type": "image"}] * number + [{"type": "text", "text": said}]
            talk = [{"role": "user", "content": content}]
            texts.append(self.processor.apply_chat_template(talk, add_generation_prompt=True))
        if answered:
            texts = [f"{text} yes {self.processor.tokenizer.eos_token}" for text in texts]
        pixels = np.random.default_rng(dice.getrandbits(32))
        pictures = list(pixels.integers(0, 256, (sum(images), IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8))
        batch = dict(self.processor(text=texts, images=pictures, padding=True, return_tensors="pt"))
        if answered:
            batch["labels"] = torch.full_like(batch["input_ids"], _IGNORE)
            # Padded on the left: the answer is the end of the row.
            batch["labels"][:, -2:] = batch["input_ids"][:, -2:]
        return batch


def train_randomly(adapter: EmmaAdapter) -> None:
    """Give an adapter weights that do something."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


# ---------------------------------------------------------------------------------------- calls of many threads


def forward(served: Served, dice: random.Random) -> None:
    with torch.no_grad():
        served.model(**served.inputs(dice))


def forward_with_graph(served: Served, dice: random.Random) -> None:
    """As of somebody who forgot ``no_grad``."""
    inputs = served.inputs(dice)
    inputs["pixel_values"].requires_grad_()
    loss = served.model(**inputs).logits.square().mean()
    if dice.random() < 0.5:
        loss.backward()


def explicit(served: Served, dice: random.Random) -> None:
    inputs = served.inputs(dice)
    rows = len(inputs["input_ids"])
    with torch.no_grad():
        served.model(**inputs, instruction=[" ".join(dice.choices(_WORDS, k=6)) for _ in range(rows)])


def block(served: Served, dice: random.Random) -> None:
    with torch.no_grad(), served.adapter.instruction(" ".join(dice.choices(_WORDS, k=6))):
        served.model(**served.inputs(dice))
        served.model.get_image_features(pixel_values=served.inputs(dice)["pixel_values"])


def generate(served: Served, dice: random.Random) -> None:
    served.model.generate(**served.inputs(dice), max_new_tokens=3, do_sample=False)


def beams(served: Served, dice: random.Random) -> None:
    served.model.generate(**served.inputs(dice), max_new_tokens=2, num_beams=2, do_sample=False)


def disabled(served: Served, dice: random.Random) -> None:
    with torch.no_grad(), served.adapter.disable_adapter():
        served.model(**served.inputs(dice))


def too_many_instructions(served: Served, dice: random.Random) -> None:
    inputs = served.inputs(dice)
    expect(InstructionError, lambda: served.model(**inputs, instruction=["how many"] * (len(inputs["input_ids"]) + 1)))


def image_without_placeholder(served: Served, dice: random.Random) -> None:
    inputs = served.inputs(dice)
    inputs["pixel_values"] = torch.cat([inputs["pixel_values"]] * 2)
    expect((RoutingError, ValueError), lambda: served.model(**inputs))


def wrong_width(served: Served, dice: random.Random) -> None:
    inputs = served.inputs(dice)
    inputs["pixel_values"] = inputs["pixel_values"][:, :2]
    expect((RuntimeError, ValueError), lambda: served.model.generate(**inputs, max_new_tokens=2))


def features_without_instruction(served: Served, dice: random.Random) -> None:
    pixels = served.inputs(dice)["pixel_values"]
    expect(InstructionError, lambda: served.model.get_image_features(pixel_values=pixels))


Operation = Callable[[Served, random.Random], None]
CALLS: list[Operation] = [
    *[forward] * 6,
    *[generate] * 2,
    beams,
    explicit,
    block,
    disabled,
    forward_with_graph,
    too_many_instructions,
    image_without_placeholder,
    wrong_width,
    features_without_instruction,
]


def expect(error: type[Exception] | tuple[type[Exception], ...], call: Callable[[], object]) -> None:
    """Raises:
    AssertionError: if the call doesn't raise such an error.
    """
    try:
        call()
    except error:
        return
    raise AssertionError("a call with bad inputs went through")


# ---------------------------------------------------------------------------------------- models of one thread's own


class Workshop:
    """Models that one thread changes all the time, while others call the served one."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.plain: PooledLlava = arms.load_base().eval()
        self.trained: PooledLlava = arms.load_base()
        config = EmmaConfig(fusion="modulation", instruction_encoder=str(TEXT_TOWER_DIR), cache_size=CACHE_SIZE)
        self.adapter = patch_model(self.trained, config, processor=served.processor).train_only(projector=True)
        self.trained.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(self.adapter.parameter_groups(1e-4))
        self.trained.eval()
        probe = served.probes[0]
        self.plain_answer = self.answer(self.plain, probe)

    @staticmethod
    def answer(model: PooledLlava, inputs: Inputs) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(**inputs).logits
        return logits

    def train(self, dice: random.Random) -> None:
        """A step, and now and then one that is given up after its forward."""
        self.trained.train()
        loss = self.trained(**self.served.inputs(dice, answered=True)).loss
        if dice.random() < 0.8:
            loss.backward()
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.trained.eval()

    def name(self, dice: random.Random) -> None:
        """Another adapter comes, answers and goes."""
        inputs = self.served.inputs(dice)
        before = self.answer(self.trained, inputs)
        self.adapter.add_adapter("other", EmmaConfig(fusion="attention")).set_adapter("other")
        self.answer(self.trained, inputs)
        self.adapter.set_adapter("default").delete_adapter("other")
        same(self.answer(self.trained, inputs), before)

    def patch(self, dice: random.Random) -> None:
        config = EmmaConfig(fusion=dice.choice(["attention", "linear", "modulation"]))
        train_randomly(patch_model(self.plain, config, processor=self.served.processor))
        self.answer(self.plain, self.served.inputs(dice))
        unpatch_model(self.plain)
        same(self.answer(self.plain, self.served.probes[0]), self.plain_answer)

    def save(self, dice: random.Random) -> None:
        inputs = self.served.inputs(dice)
        with tempfile.TemporaryDirectory() as folder:
            self.adapter.save_pretrained(folder)
            load_adapter(self.plain, folder, processor=self.served.processor)
            same(self.answer(self.plain, inputs), self.answer(self.trained, inputs))
            unpatch_model(self.plain)
            (Path(folder) / "adapter_model.safetensors").write_bytes(b"damaged")
            expect(EmmaError, lambda: load_adapter(self.plain, folder))
        same(self.answer(self.plain, self.served.probes[0]), self.plain_answer)

    def copy(self, dice: random.Random) -> None:
        inputs = self.served.inputs(dice)
        twin = copy.deepcopy(self.trained)
        same(self.answer(twin, inputs), self.answer(self.trained, inputs))
        train_randomly(get_adapter(twin))

    def work(self, dice: random.Random) -> None:
        task = dice.choice([self.train, self.train, self.train, self.name, self.patch, self.save, self.copy])
        task(dice)


def same(one: Tensor, other: Tensor) -> None:
    """Raises:
    AssertionError: if one bit differs.
    """
    if not torch.equal(one, other):
        raise AssertionError("an answer that was to be the same as another one differs from it")
