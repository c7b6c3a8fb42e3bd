"""One model that lives through patching, training, copying and other tools, and what it must answer all the while.

The oracle is a twin that is never patched: whatever other tools do to the model is done to the twin as well.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from emma_adapter import (
    CheckpointError,
    EmmaAdapter,
    EmmaAlignment,
    EmmaConfig,
    PatchError,
    get_adapter,
    load_adapter,
    patch_model,
    unpatch_model,
)
from emma_adapter.modules.method_guard import MethodGuard
from emma_adapter.patching.own_projector import OwnProjector
from tests.support.zoo import ZOO, Row

WIDTH = 12
LORA = "default"


class Letters(nn.Module):
    """An instruction encoder of a user's own: a fixed vector for each letter."""

    instruction_dim = WIDTH
    max_instruction_tokens = 20

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(256, WIDTH, generator=torch.Generator().manual_seed(1)))

    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        rows = [self.table[[ord(c) % 256 for c in f"{text:.20}"] or [0]] for text in texts]
        masks = [torch.ones(len(row), dtype=torch.long) for row in rows]
        return (
            nn.utils.rnn.pad_sequence(rows, batch_first=True),
            nn.utils.rnn.pad_sequence(masks, batch_first=True),
        )


@dataclass(frozen=True)
class Kind:
    """A model family as the life of a model needs it."""

    name: str
    fusions: tuple[str, ...]
    rows: tuple[Row, ...]
    deepstack: bool = False
    #: Parts of the projector that a LoRA can sit on, and the projector.
    projector_layers: tuple[str, ...] = ("linear_1", "linear_2")
    projector: str = "multi_modal_projector"

    def model(self, seed: int) -> Any:
        return ZOO[self.name].model(seed)

    def lora(self, target: str) -> LoraConfig:
        targets: dict[str, Any] = {
            "language model": {"target_modules": ["q_proj"]},
            "projector": {"target_modules": ["q_proj", *self.projector_layers]},
            "a copy of the projector": {"target_modules": ["q_proj"], "modules_to_save": [self.projector]},
        }
        return LoraConfig(r=2, init_lora_weights=False, **targets[target])


KINDS = {
    "llava": Kind(
        "llava",
        ("attention", "linear", "modulation"),
        (Row(images=((28, 28),)), Row(("how many dogs are there?",), images=((28, 28), (40, 28)), seed=1)),
    ),
    "qwen3_vl": Kind(
        "qwen3_vl",
        ("attention", "modulation"),
        (Row(images=((56, 56),)), Row(("how many dogs are there?",), images=((56, 84), (28, 56)), seed=1)),
        deepstack=True,
        projector_layers=("linear_fc1", "linear_fc2"),
        projector="merger",
    ),
}
TARGETS = ("language model", "projector", "a copy of the projector")
DTYPES = {"half": torch.float16, "bfloat16": torch.bfloat16, "float": torch.float32, "double": torch.float64}


@cache
def batch_of(kind: Kind) -> dict[str, Tensor]:
    return ZOO[kind.name].batch(kind.rows)


@cache
def processor_of(kind: Kind) -> Any:
    return ZOO[kind.name].processor()


@cache
def weights_of(kind: Kind, seed: int) -> dict[str, Tensor]:
    return kind.model(seed).state_dict()


@dataclass
class Learned:
    """What one adapter has learned."""

    config: EmmaConfig
    own_encoder: bool
    tensors: dict[str, Tensor]
    #: The projector that is trained with the adapter, if one is, by the names of the model's.
    projector: dict[str, Tensor] | None = None
    trainable: bool = True
    projector_trainable: bool = True

    def twin(self) -> Learned:
        projector = None if self.projector is None else _cloned(self.projector)
        return replace(self, tensors=_cloned(self.tensors), projector=projector)


def _cloned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in tensors.items()}


#: Modules of adapters.
_OURS = (EmmaAlignment, OwnProjector)


def base_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(type(model), "get_base_model") else model


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the model without the adapters', by name."""
    base = base_of(model)
    ours = {id(p) for module in base.modules() if isinstance(module, _OURS) for p in module.parameters()}
    return {name: parameter for name, parameter in base.named_parameters() if id(parameter) not in ours}


def leftovers(model: nn.Module) -> list[str]:
    """What of this library is on a model: attributes, guards, hooks and modules."""
    found = []
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key.startswith("_emma") or isinstance(value, MethodGuard):
                found.append(f"{name}.{key}")
            elif key.endswith("_hooks") and isinstance(value, dict):
                hooks = [hook for hook in value.values() if getattr(hook, "__module__", "").startswith("emma_adapter")]
                found += [f"{name}: {hook.__name__}" for hook in hooks]
        if type(module).__module__.startswith("emma_adapter"):
            found.append(f"{name}: {type(module).__name__}")
    return found


def without_recording_hooks(model: nn.Module) -> None:
    """transformers puts local functions on a model at its first call, patched or not: with them it can't be pickled."""
    for module in model.modules():
        for key in [k for k, hook in module._forward_hooks.items() if "<locals>" in getattr(hook, "__qualname__", "")]:
            del module._forward_hooks[key]
        vars(module).pop("_output_capturing_hooks_installed", None)


class Life:
    """A model, its twin, and what is known of both without asking the model."""

    def __init__(self, kind: Kind, seed: int = 0) -> None:
        self.kind = kind
        self.model, self.twin = kind.model(seed), kind.model(seed)
        self.adapters: dict[str, Learned] = {}
        self.active = "default"
        #: Whether ``train_only`` was called since the model was patched; the twin knows what was trainable before.
        self.narrowed = False
        self.trainable = {name: True for name, _ in self.twin.named_parameters()}
        #: Whether accelerate's hooks were ever on it: a bound method stays, with which it can't be pickled.
        self.hooked = False
        #: Whether ``generate`` is asked too, which takes longer than the rest.
        self.writes = True
        self._answers: dict[tuple[str, bool], tuple[Tensor, ...]] = {}

    # What the model is asked.

    @property
    def dtype(self) -> torch.dtype:
        return next(self.twin.parameters()).dtype

    @property
    def wrapped(self) -> bool:
        return base_of(self.twin) is not self.twin

    @property
    def projector_wrapped(self) -> bool:
        return any("base_layer" in name or "modules_to_save" in name for name in self.projector_names())

    @property
    def current(self) -> Learned:
        return self.adapters[self.active]

    @property
    def adapter(self) -> EmmaAdapter:
        return get_adapter(self.model)

    def projector_names(self, model: nn.Module | None = None) -> list[str]:
        """The names of the parameters that ``train_only(projector=True)`` trains."""
        config = self.current.config if self.adapters else EmmaConfig()
        parts = {self.kind.projector, *(["deepstack_merger_list"] if config.align_deepstack else [])}
        names = base_parameters(self.twin if model is None else model)
        return [name for name in names if parts & set(name.split("."))]

    def inputs(self) -> dict[str, Tensor]:
        made = dict(batch_of(self.kind))
        for name, value in made.items():
            made[name] = value.to(self.dtype) if value.is_floating_point() else value
        return made

    @torch.no_grad()
    def answer(self, model: Any) -> tuple[Tensor, ...]:
        inputs = self.inputs()
        made = (model(**inputs).logits,)
        return (*made, model.generate(**inputs, max_new_tokens=2, do_sample=False)) if self.writes else made

    def original(self) -> tuple[Tensor, ...]:
        def ask() -> tuple[Tensor, ...]:
            with same_gradients(self.model, self.twin):
                return self.answer(self.twin)

        return self._once("original", ask)

    def expected(self) -> tuple[Tensor, ...]:
        return self._once("expected", lambda: self.answer_of_another(copy.deepcopy(self.twin)))

    def _once(self, what: str, ask: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        if (what, self.writes) not in self._answers:
            self._answers[what, self.writes] = ask()
        return self._answers[what, self.writes]

    def answer_of_another(self, made: nn.Module) -> tuple[Tensor, ...]:
        """What a model of the same weights answers that is patched for the first time and given the same tensors."""
        learned = self.current
        parameters = base_parameters(made)
        for name, value in (learned.projector or {}).items():
            parameters[name].data.copy_(value)
        adapter = self.patch_with(made, learned.config, learned.own_encoder)
        for name, parameter in adapter.named_parameters():
            parameter.data = learned.tensors[name].clone()
        with same_gradients(self.model, made):
            return self.answer(made)

    def patch_with(self, model: nn.Module, config: EmmaConfig, own_encoder: bool) -> EmmaAdapter:
        encoder = Letters() if own_encoder else None
        return patch_model(model, config, processor=processor_of(self.kind), instruction_encoder=encoder)

    def changed(self) -> None:
        """What was computed is no longer what is expected: also if only gradients are needed elsewhere, because PyTorch
        may round a product otherwise where no gradient is needed."""
        self._answers.clear()

    def learned(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.adapter.named_parameters()}

    # What is checked after every step.

    def check(self) -> None:
        (self._check_patched if self.adapters else self._check_unpatched)()
        for module in self.model.modules():
            assert module.training == self.twin.training, type(module)
        names = list(base_parameters(self.model))
        assert names == list(base_parameters(self.twin))
        assert {n: p.requires_grad for n, p in base_parameters(self.model).items()} == self.trainable

    def _check_unpatched(self) -> None:
        assert leftovers(self.model) == []
        with pytest.raises(PatchError, match="not patched"):
            get_adapter(self.model)
        with pytest.raises(PatchError, match="not patched"):
            unpatch_model(self.model)
        assert_same_answer(self.answer(self.model), self.original())
        assert_same_state(self.model.state_dict(), self.twin.state_dict())
        assert self.trainable == {n: p.requires_grad for n, p in base_parameters(self.twin).items()}

    def _check_patched(self) -> None:
        adapter = self.adapter
        assert (set(adapter.names), adapter.active) == (set(self.adapters), self.active)
        with pytest.raises(PatchError, match="already patched"):
            patch_model(self.model)
        with adapter.disabled():
            assert_same_answer(self.answer(self.model), self.original())
        assert_same_answer(self.answer(self.model), self.expected())
        assert_same_state(self.learned(), self.current.tensors)
        assert {p.requires_grad for p in adapter.parameters()} == {self.current.trainable}
        own = [p for module in self.model.modules() if isinstance(module, EmmaAlignment) for p in module.parameters()]
        active = set(map(id, adapter.parameters()))
        others = [learned.trainable for name, learned in self.adapters.items() if name != self.active]
        assert {p.requires_grad for p in own if id(p) not in active} <= set(others)
        projector = self.own_projector()
        assert_same_state({name: value.detach() for name, value in projector.items()}, self.current.projector or {})
        assert {p.requires_grad for p in projector.values()} <= {self.current.projector_trainable}
        state = self.model.state_dict()
        base = dict(self.twin.state_dict())
        assert_same_state({name: value for name, value in state.items() if name in base}, base)
        assert all("emma" in name for name in set(state) - set(base))

    # What happens to the model. Each returns nothing, and leaves the expectations up to date.

    def patch(self, fusion: str, own_encoder: bool, deepstack: bool) -> None:
        config = self.config(fusion, deepstack)
        self.patch_with(self.model, config, own_encoder)
        assert_same_answer(self.answer(self.model), self.original())
        self.active = "default"
        self.adapters = {"default": Learned(config, own_encoder, self.learned())}
        self.changed()

    def config(self, fusion: str, deepstack: bool) -> EmmaConfig:
        return EmmaConfig(fusion=fusion, inner_dim=16, align_deepstack=deepstack and self.kind.deepstack)

    def unpatch(self) -> None:
        unpatch_model(self.model)
        self.changed()
        self.adapters, self.narrowed = {}, False
        self.trainable = {name: p.requires_grad for name, p in base_parameters(self.twin).items()}

    def learn(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.adapter.parameters():
            parameter.data += (0.3 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
        self.current.tensors = self.learned()
        self.changed()

    def train_only(self, projector: bool) -> None:
        if projector and self.projector_wrapped:
            with pytest.raises(PatchError, match="wrapped by PEFT"):
                self.adapter.train_only(projector=True)
            return
        self.adapter.train_only(projector=projector)
        self.narrowed = True
        self.trainable = dict.fromkeys(self.trainable, False)
        for name, learned in self.adapters.items():
            learned.trainable = name == self.active
            learned.projector_trainable = projector and name == self.active
        if projector and self.current.projector is None:
            self.current.projector = _cloned(self.own_projector())
        self.changed()

    def own_projector(self) -> dict[str, nn.Parameter]:
        """Of the active adapter, by the names of the model's."""
        attached = self.adapter._state.current
        names = {id(module): name for name, module in base_of(self.model).named_modules()}
        return {
            f"{names[id(site)]}.{name}": parameter
            for place, site in attached.sites().items()
            if place in attached.own_projectors()
            for name, parameter in attached.own_projectors()[place].projector.named_parameters()
        }

    def step(self) -> None:
        """One step of an optimizer."""
        adapter = self.adapter
        inputs = self.inputs()
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, -2:] = inputs["input_ids"][:, -2:]
        with torch.enable_grad():
            self.model(**inputs, labels=labels).loss.backward()
        groups = [group for group in adapter.parameter_groups(lr=0.05, projector_lr=0.02) if group["params"]]
        torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        torch.optim.SGD(groups).step()
        self.model.zero_grad(set_to_none=True)
        self.current.tensors = self.learned()
        if self.current.projector is not None:
            self.current.projector = _cloned(self.own_projector())
        self.changed()

    def add(self, name: str, fusion: str, own_encoder: bool, deepstack: bool) -> None:
        encoder = Letters() if own_encoder else None
        config = self.config(fusion, deepstack)
        if name in self.adapters:
            with pytest.raises(PatchError, match="choose another name"):
                self.adapter.add(name, config, instruction_encoder=encoder)
            return
        self.adapter.add(name, config, instruction_encoder=encoder)
        self.adapters[name] = Learned(config, own_encoder, {}, trainable=False, projector_trainable=False)

    def set_active(self, name: str) -> None:
        if name not in self.adapters:
            with pytest.raises(PatchError, match="no adapter"):
                self.adapter.set_active(name)
            return
        outgoing, incoming = self.current, self.adapters[name]
        self.adapter.set_active(name)
        if incoming is outgoing:
            return
        trains = outgoing.trainable
        self.active = name
        outgoing.trainable, incoming.trainable = False, trains
        outgoing.projector_trainable, incoming.projector_trainable = False, trains
        incoming.tensors = incoming.tensors or self.learned()
        self.changed()

    def remove(self, name: str) -> None:
        if name not in self.adapters or name == self.active:
            with pytest.raises(PatchError):
                self.adapter.remove(name)
            return
        self.adapter.remove(name)
        del self.adapters[name]

    def cast(self, how: str) -> None:
        for model in (self.model, self.twin):
            getattr(model, how)() if how in ("half", "bfloat16", "float", "double") else model.to("cpu")
        dtype = DTYPES.get(how)
        for learned in self.adapters.values():
            learned.tensors = {key: value.to(dtype) for key, value in learned.tensors.items()}
            if learned.projector is not None:
                learned.projector = {key: value.to(dtype) for key, value in learned.projector.items()}
        self.changed()

    def train(self, mode: bool) -> None:
        self.model.train(mode)
        self.twin.train(mode)

    def requires_grad(self, value: bool) -> None:
        """By the user, for the whole model; what ``train_only`` remembers is from before it."""
        self.model.requires_grad_(value)
        if not self.narrowed:
            self.twin.requires_grad_(value)
        self.trainable = dict.fromkeys(self.trainable, value)
        for learned in self.adapters.values():
            learned.trainable = learned.projector_trainable = value
        self.changed()

    def load_base(self, seed: int) -> None:
        """A checkpoint of the base model."""
        weights = weights_of(self.kind, seed)
        if self.adapters:
            with pytest.raises(RuntimeError, match="Missing key"):
                self.model.load_state_dict(weights)
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        assert not unexpected
        assert set(missing) == set(self.model.state_dict()) - set(self.twin.state_dict())
        self.twin.load_state_dict(weights)
        self.changed()

    def state_dict_elsewhere(self) -> None:
        """The model's state dict in an original model, and in another patched model."""
        state = self.model.state_dict()
        if self.wrapped:
            return
        base = copy.deepcopy(self.twin)
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.zero_()
        missing, unexpected = base.load_state_dict(state, strict=not self.adapters)
        assert not missing
        assert set(unexpected) == set(state) - set(self.twin.state_dict())
        assert_same_state(base.state_dict(), {name: state[name] for name in base.state_dict()})
        if len(self.adapters) == 1:
            elsewhere = self.patch_with(base, self.current.config, self.current.own_encoder)
            if self.current.projector is not None:
                elsewhere.train_only(projector=True)
            for name, parameter in get_adapter(base).named_parameters():
                parameter.data = parameter.data.to(self.current.tensors[name].dtype)
            base.load_state_dict(state)
            with same_gradients(self.model, base):
                assert_same_answer(self.answer(base), self.expected())

    def reload(self, folder: Path) -> None:
        """``model.save_pretrained``, and the model and the adapter read again."""
        if self.wrapped:
            return
        self.model.save_pretrained(folder)
        self.twin.save_pretrained(folder / "twin")
        # Read again, a model of half precision is not bit for bit the one that was cast: its buffers were not rounded.
        twin, made = (type(self.twin).from_pretrained(path, dtype=self.dtype) for path in (folder / "twin", folder))
        assert_same_state(made.state_dict(), self.twin.state_dict())
        if not self.adapters:
            assert not (folder / "emma_adapter").exists()
            return
        encoder = Letters() if self.current.own_encoder else None
        load_adapter(made, folder, processor=processor_of(self.kind), instruction_encoder=encoder)
        with same_gradients(self.model, made):
            assert_same_answer(self.answer(made), self.answer_of_another(twin))

    def load_from(self, other: Life, folder: Path) -> None:
        """The other's active adapter."""
        other.adapter.save_pretrained(folder)
        given = other.current
        encoder = Letters() if given.own_encoder else None
        kind = {"processor": processor_of(self.kind), "instruction_encoder": encoder}
        error = None
        if given.projector is not None and self.projector_wrapped:
            error = CheckpointError
        elif self.adapters and (given.config, given.own_encoder) != (self.current.config, self.current.own_encoder):
            error = PatchError
        if error is not None:
            with pytest.raises(error):
                load_adapter(self.model, folder, **kind)
            return
        had, owned = bool(self.adapters), bool(self.adapters) and self.current.projector is not None
        load_adapter(self.model, folder, **kind)
        new = given.twin()
        new.trainable = self.current.trainable if had else True
        if not had:
            self.active = "default"
        elif new.projector is None and owned:
            originals = base_parameters(self.twin)
            new.projector = _cloned({name: originals[name] for name in self.projector_names()})
        new.projector_trainable = self.current.projector_trainable if owned else True
        self.adapters[self.active] = new
        if new.projector is not None:
            new.projector = {name: value.to(self.dtype) for name, value in new.projector.items()}
            if not owned:
                new.projector_trainable = all(self.trainable[name] for name in new.projector)
        self.changed()

    def copied(self, how: Callable[[Any], Any]) -> Life:
        """A life of its own for a copy of the model; the twin is copied plainly."""
        made = copy.copy(self)
        made.twin = copy.deepcopy(self.twin)
        made.model = how(self.model)
        made.adapters = {name: learned.twin() for name, learned in self.adapters.items()}
        made.trainable, made._answers = dict(self.trainable), {}
        return made

    # Other tools.

    def hook(self, on: bool) -> None:
        """accelerate's hooks, as it puts them on every module of a model that it dispatches."""
        remove_hook_from_submodules(self.model)
        if on:
            self.hooked = True
            for module in self.model.modules():
                add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))

    def wrap(self, target: str) -> None:
        """LoRA by PEFT, around the model and around its twin."""
        if self.wrapped:
            return
        torch.manual_seed(1)
        if target != "language model" and any(learned.projector for learned in self.adapters.values()):
            with pytest.raises(PatchError, match="PEFT would wrap the projector"):
                get_peft_model(self.model, self.kind.lora(target))
            return
        self.model = get_peft_model(self.model, self.kind.lora(target))
        self.twin = get_peft_model(self.twin, self.kind.lora(target))
        loras = {name: value for name, value in self.model.state_dict().items() if "lora_" in name}
        assert loras
        self.twin.load_state_dict(loras, strict=False)
        self.train(self.twin.training)
        # What train_only has frozen stays so; the rest is as PEFT has it.
        now = {name: parameter.requires_grad for name, parameter in base_parameters(self.twin).items()}
        self.trainable = {name: self.trainable.get(name, True) and value for name, value in now.items()}
        self.changed()

    def _trainable_by_identity(self) -> dict[int, bool]:
        return {id(p): self.trainable[name] for name, p in base_parameters(self.model).items()}

    def unwrap(self, merge: bool) -> None:
        if not self.wrapped:
            return
        before = self._trainable_by_identity()
        if merge:
            self.model, self.twin = self.model.merge_and_unload(), self.twin.merge_and_unload()
        else:
            self.model, self.twin = self.model.unload(), self.twin.unload()
        self.trainable = {name: before[id(p)] for name, p in base_parameters(self.model).items()}
        self.changed()

    def without_lora(self) -> None:
        """``disable_adapter()`` of PEFT, for the time of one call. Its end makes the LoRA trainable."""
        with self.twin.disable_adapter(), self.model.disable_adapter():
            self.changed()
            if not self.adapters:
                assert_same_answer(self.answer(self.model), self.original())
            else:
                with self.adapter.disabled():
                    assert_same_answer(self.answer(self.model), self.original())
                assert_same_answer(self.answer(self.model), self.expected())
        now = {name: parameter.requires_grad for name, parameter in base_parameters(self.twin).items()}
        self.trainable |= {name: value for name, value in now.items() if "lora_" in name or "modules_to_save" in name}
        self.changed()


@contextmanager
def same_gradients(model: nn.Module, other: nn.Module) -> Iterator[None]:
    """Have the other's parameters need a gradient where the model's do."""
    wanted = base_parameters(model)
    before = {name: parameter.requires_grad for name, parameter in base_parameters(other).items()}
    for name, parameter in base_parameters(other).items():
        parameter.requires_grad_(wanted[name].requires_grad)
    yield
    for name, parameter in base_parameters(other).items():
        parameter.requires_grad_(before[name])


def assert_same_answer(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert torch.isfinite(expected[0]).all()
    assert len(found) == len(expected)
    assert [torch.equal(one, other) for one, other in zip(found, expected, strict=True)] == [True] * len(expected)


def assert_same_state(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []
    assert [name for name, value in expected.items() if found[name].dtype != value.dtype] == []


def by_pickle(model: Any) -> Any:
    without_recording_hooks(model)
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: Any) -> Any:
    without_recording_hooks(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": by_pickle,
    "torch.save": by_torch_save,
}
