"""The benchmarks of the fusions: every variant computes the same, and what is measured is reported as it is."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.autograd import DeviceType

from benchmarks.kernels import attending, comparison, machine, plot, run, table
from benchmarks.kernels.authors import AuthorsAlignment
from benchmarks.kernels.comparison import Budget, Effort, compare
from benchmarks.kernels.measured import record_measured
from benchmarks.kernels.memory import count_kernels, saved_bytes
from benchmarks.kernels.operations import OPERATIONS, Operation, Variant
from benchmarks.kernels.records import Record, Results
from benchmarks.kernels.shapes import BATCHES, PHASES, SHAPES, Setting, Shape, applies, make_inputs
from benchmarks.kernels.timing import time_calls
from emma_adapter import EmmaAlignment, EmmaConfig
from emma_adapter.kernels.measured import measured_case

CPU = torch.device("cpu")
DENSE = Shape("tiny", 12, 32, instruction_tokens=20, instruction_dim=24)
# Two images of one size, in one row with others.
PACKED = Shape("tiny, packed", 22, 32, ((2, 3), (2, 2), (2, 3), (3, 2)), instruction_tokens=20, instruction_dim=24)
MACHINE = machine.Machine(
    "NVIDIA Test", "cuda", "2.15", "3.9", "13.0", "3.12", 1, "2030-01-02", "python -m benchmarks.kernels.run", 1e12
)
EFFORT = Effort(seconds=0.01, rounds=5)


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch):
    """torch.compile takes seconds; that it computes the same is not for these tests."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def setting(shape=DENSE, batch=3, **changes):
    return Setting(shape, 1 if shape.grids else batch, torch.float32, CPU, **changes)


def gradients(operation, variant):
    """By name in the library, whatever the formulation."""
    operation.step(variant, "forward+backward")()
    found = {name: parameter.grad for name, parameter in variant.module.named_parameters()}
    if isinstance(variant.module, AuthorsAlignment):
        infusion = found["infusion.weight"]
        found = {
            "fusion.instruction_projection.weight": found["projection.weight"],
            "fusion.instruction_projection.bias": found["projection.bias"],
            "fusion.image_weight": infusion[:, : len(infusion)],
            "fusion.text_weight": infusion[:, len(infusion) :],
            "fusion.bias": found["infusion.bias"],
        }
    found["visual"] = operation.inputs.visual.grad
    return {name: None if grad is None else grad.clone() for name, grad in found.items()}


def assert_same(operation, variant, expected):
    torch.testing.assert_close(variant.run(), expected.run(), rtol=1e-4, atol=1e-5)
    grads, expected_grads = gradients(operation, variant), gradients(operation, expected)
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        assert grad is not None
        assert grad.abs().max() > 1e-4, f"{name} has no gradient to compare"
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize(
    ("name", "shape", "variants"),
    [
        ("linear", DENSE, ["authors", "authors, as shipped", "eager", "compile"]),
        ("attention", DENSE, ["eager", "compile", "manual"]),
        ("modulation", DENSE, ["eager", "compile", "manual"]),
        ("attention", PACKED, ["eager", "compile"]),
        ("modulation", PACKED, ["eager", "compile"]),
    ],
)
def test_variants_compute_the_same_and_the_same_gradients(name, shape, variants):
    operation = OPERATIONS[name](setting(shape, train_vision=True))
    assert list(operation.variants) == variants
    baseline = operation.variants[operation.baseline]
    assert (baseline.run() - operation.inputs.visual).abs().max() > 0.01, "nothing is computed"
    for variant in list(operation.variants.values())[1:]:
        assert_same(operation, variant, baseline)


@pytest.mark.parametrize("name", ["attention", "modulation"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_computes_the_same(name):
    operation = OPERATIONS[name](setting())
    eager = operation.variants["eager"]
    with torch.no_grad():
        flex = attending.dense(eager.module.fusion, operation.inputs, attending.flex)
        torch.testing.assert_close(flex, eager.run(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["attention", "modulation"])
def test_varlen_attention_computes_the_same(name, monkeypatch):
    """Around ``varlen_attn``, which runs on GPUs alone: here by its definition."""

    def varlen_attn(query, key, value, query_starts, key_starts, longest_query, longest_key):
        assert query_starts.dtype == key_starts.dtype == torch.int32
        assert longest_query == query_starts.diff().max()
        assert longest_key == key_starts.diff().max()
        pieces = []
        for i in range(len(query_starts) - 1):
            q = query[query_starts[i] : query_starts[i + 1]].transpose(0, 1)
            k, v = (x[key_starts[i] : key_starts[i + 1]].transpose(0, 1) for x in (key, value))
            pieces.append(((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(0, 1))
        return torch.cat(pieces)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    operation = OPERATIONS[name](setting(PACKED, train_vision=True))
    eager = operation.variants["eager"]
    varlen = Variant(attending.packed_varlen(eager.module.fusion, operation.inputs), eager.module)
    assert_same(operation, varlen, eager)


def test_instructions_differ_in_length_and_images_in_instruction():
    lengths = make_inputs(setting()).mask.sum(dim=1)
    assert len(set(lengths.tolist())) == 3
    packing = make_inputs(setting(PACKED)).packing
    assert packing.rows.tolist() == [0, 0, 1, 1]


def test_the_authors_code_as_shipped_compares_and_copies():
    alignment = EmmaAlignment(
        EmmaConfig(fusion="linear", visual_dim=32, instruction_dim=24, num_visual_tokens=12, max_instruction_tokens=20)
    )
    visual, instruction = torch.randn(2, 12, 32), torch.randn(2, 20, 24)
    with pytest.warns(UserWarning, match="changes nothing"):
        assert AuthorsAlignment(alignment.fusion, as_shipped=True)(visual, instruction).is_contiguous()
    assert not AuthorsAlignment(alignment.fusion)(visual, instruction).is_contiguous()


@pytest.mark.parametrize(("train_vision", "backward_passes"), [(False, 2), (True, 3)])
def test_least_bytes(train_vision, backward_passes):
    inputs = make_inputs(setting(train_vision=train_vision))
    visual, instruction, weights = 3 * 12 * 32 * 4, 3 * 20 * 24 * 4, 100 * 4
    forward = 2 * visual + instruction + weights
    assert inputs.least_bytes("forward", 100) == forward
    backward = backward_passes * visual + instruction + 2 * weights
    assert inputs.least_bytes("forward+backward", 100) == forward + backward


def test_saved_bytes_are_those_of_activations():
    inputs = make_inputs(setting())
    module = nn.Linear(32, 32)
    # The input of the product is given; exp keeps its result.
    operation = Operation(inputs, {"it": Variant(lambda: module(inputs.visual).exp(), module)})
    assert saved_bytes(operation, operation.variants["it"], "forward+backward") == 3 * 12 * 32 * 4
    assert saved_bytes(operation, operation.variants["it"], "forward") is None


@pytest.fixture
def clock(monkeypatch):
    """A processor whose time passes when it is told to."""
    now = [0.0]
    monkeypatch.setattr(time, "process_time", lambda: now[0])

    def takes(*seconds):
        remaining = iter(seconds)

        def call():
            now[0] += next(remaining)

        return call

    return takes


def test_times_are_medians_after_a_warm_up_and_ratios_are_within_rounds(clock):
    calls = {"slow then fast": clock(9, 4, 4, 1, 1, 1), "half of it": clock(1, 2, 2, 0.5, 0.5, 0.5)}
    errors = {}
    timings = time_calls(calls, "slow then fast", CPU, errors, seconds=60, rounds=5)
    assert not errors
    first, second = timings.values()
    assert (first.median, first.percentile_20, first.percentile_80) == pytest.approx((1e6, 1e6, 4e6))
    assert first.ratio == 1
    assert second.median == pytest.approx(5e5)
    assert second.ratio == pytest.approx(0.5)


def test_a_call_that_fails_midway_is_reported_and_the_others_are_timed(clock):
    errors = {}
    calls = {"works": clock(*[1] * 6), "stops": clock(1, 1)}
    timings = time_calls(calls, "stops", CPU, errors, seconds=60, rounds=5)
    assert list(timings) == ["works"]
    assert timings["works"].ratio is None
    assert list(errors) == ["stops"]


def test_on_a_gpu_events_time_each_call_after_its_flush(monkeypatch):
    """The order of what a GPU is told, and that what fails there is reported."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.place = len(log)
            log.append("event")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            assert log[self.place + 1 : end.place] in (["first"], ["second"])
            return 0.25 if log[self.place + 1] == "first" else 0.5

    def fails():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    flush = SimpleNamespace(zero_=lambda: log.append("flush"))
    monkeypatch.setattr("benchmarks.kernels.timing._flush_buffer", lambda device: flush)
    calls = {"first": lambda: log.append("first"), "fails": fails, "second": lambda: log.append("second")}
    errors = {}
    timings = time_calls(calls, "first", torch.device("cuda"), errors, seconds=60, rounds=5)
    a_call = ["flush", "event", "call", "event"]
    assert ["call" if entry in calls else entry for entry in log[:12]] == [
        *a_call,
        "flush",
        "event",
        *a_call,
        *["wait"] * 2,
    ]
    assert (timings["first"].median, timings["second"].median) == (250, 500)
    assert timings["second"].ratio == 2
    assert errors == {"fails": "RuntimeError: an illegal memory access was encountered"}


def test_kernels_are_counted_without_copies_and_annotations():
    host = [SimpleNamespace(name=name, device_type=DeviceType.CPU) for name in ("aten::mm", "CompiledFunction")]
    names = ("gemm", "gemm", "triton_poi", "Memcpy DtoD", "Memset (Device)", "CompiledFunction")
    gpu = [SimpleNamespace(name=name, device_type=DeviceType.CUDA) for name in names]
    assert count_kernels([*host, *gpu]) == 3


def spoiled(operation):
    """The operation with variants that fail in ways of their own."""

    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate too much")

    module = operation.variants["eager"].module
    wrong = Variant(lambda: operation.variants["eager"].run() + 1, module)
    no_number = Variant(lambda: operation.variants["eager"].run() * math.nan, module)
    return replace(
        operation,
        variants=operation.variants
        | {"fails": Variant(out_of_memory, module), "is wrong": wrong, "is no number": no_number},
    )


@pytest.mark.parametrize("phase", PHASES)
def test_what_fails_has_a_record_that_says_so(phase):
    operation = spoiled(OPERATIONS["attention"](setting()))
    records = {
        record.variant: record
        for record in compare("attention", operation, setting(), phase, MACHINE, Budget(0, 1), EFFORT)
    }
    assert list(records) == list(operation.variants)
    assert records["fails"].error == "OutOfMemoryError: CUDA out of memory."
    assert "differs" in records["is wrong"].error
    assert "differs" in records["is no number"].error
    assert records["compile"].error == "not compiled: out of time"
    assert all(records[name].median_us is None for name in ("fails", "is wrong", "is no number", "compile"))
    for name in ("eager", "manual"):
        assert records[name].error is None
        assert records[name].median_us > 0
        assert (records[name].saved_bytes is None) == (phase == "forward")
    assert records["eager"].ratio == 1


def test_compiling_ends_before_time_does():
    assert Budget(seconds=120, groups_left=10).may_compile()
    assert not Budget(seconds=40, groups_left=10).may_compile()
    budget = Budget(seconds=120, groups_left=10)
    budget.compiled(90)
    assert not budget.may_compile()


@pytest.fixture
def _tiny_machine(monkeypatch):
    monkeypatch.setattr(run, "LLAVA", DENSE)
    monkeypatch.setattr(comparison, "LLAVA", DENSE)
    monkeypatch.setattr(run, "tower_microseconds", lambda batch, dtype, device: 1e6)
    monkeypatch.setitem(machine._COPY_BYTES, "cpu", 1 << 16)


@pytest.mark.usefixtures("_tiny_machine")
def test_one_command_writes_results_pictures_and_a_table(tmp_path, monkeypatch):
    monkeypatch.setitem(run.OPERATIONS, "attention", lambda setting: spoiled(OPERATIONS["modulation"](setting)))

    def no_memory(setting):
        raise MemoryError("none left")

    monkeypatch.setitem(run.OPERATIONS, "linear", no_memory)
    found = CliRunner().invoke(
        run.main, ["--tower", "--seconds", "0.01", "--rounds", "5", "--minutes", "60", "--output", str(tmp_path)]
    )
    assert found.exit_code == 0, found.output
    [file] = tmp_path.glob("*.json")
    results = Results.load(file)
    groups = {(record.operation, record.batch, record.phase) for record in results.records}
    assert groups == {(name, batch, phase) for name in OPERATIONS for batch in (1, 4) for phase in PHASES}
    for record in results.records:
        if record.operation == "linear":
            assert record.error == "MemoryError: none left"
        elif record.variant in ("eager", "compile", "manual"):
            assert record.tower_percent == pytest.approx(record.median_us / 1e4)
            assert record.bandwidth_percent > 0
        else:
            assert record.error
    assert {path.stem.rsplit("-")[-1] for path in tmp_path.glob("*.png")} == {"attention", "modulation"}
    assert "failed: OutOfMemoryError: CUDA out of memory." in found.output
    assert "linear, forward, tiny, 1, all: MemoryError: none left" in found.output
    assert f"{sum(record.error is not None for record in results.records)} of {len(results.records)}" in found.output
    again = CliRunner().invoke(table.main, [str(file)])
    assert again.output in found.output
    assert again.output.count("| modulation | forward |") == 3


def gpu_records(changes=None):
    """As of a whole run: Triton takes 50 µs, eager 100, manual 80, and what is compiled 20. ``changes`` are
    microseconds by (shape, batch, variant); None is a failure, "left out" no record."""
    changes = changes or {}
    records = []
    for shape in SHAPES:
        for batch in BATCHES:
            for variant, usual in {"eager": 100, "manual": 80, "compile": 20, "triton": 50}.items():
                time = changes.get((shape.name, batch, variant), usual)
                if time == "left out" or not applies("attention", shape, batch):
                    continue
                numbers = {"error": "out of memory"} if time is None else timing(time)
                place = (shape.name, shape.num_tokens, shape.dim, batch, "bfloat16", False)
                compiled = variant == "compile"
                records.append(Record("attention", "forward", *place, variant, "eager", compiled, **numbers))
    return records


def timing(microseconds):
    return {
        "median_us": float(microseconds),
        "percentile_20_us": microseconds - 1.0,
        "percentile_80_us": microseconds + 1.0,
        "ratio": microseconds / 100,
        "bandwidth_percent": 50.0,
        "tower_percent": 0.25,
        "peak_bytes": 2_000_000,
        "saved_bytes": 1_000_000,
        "launches": 7,
    }


CASE = measured_case("attention", torch.bfloat16, backward=False)
OTHER = measured_case("linear", torch.bfloat16, backward=True)
SMALLEST, SECOND = {"min_tokens": 256}, {"min_tokens": 2304}
NAMES = [shape.name for shape in SHAPES if not shape.grids]


@pytest.mark.parametrize(
    ("changes", "after"),
    [
        ({}, SMALLEST),
        # A call with one image is slow, all others are not.
        ({(name, 1, "triton"): 200 for name in NAMES}, SECOND),
        ({("LLaVA-1.5", 64, "triton"): 84}, SMALLEST),
        ({("LLaVA-1.5", 64, "triton"): 84.1}, {"min_tokens": 46_656}),
        ({("LLaVA-1.5", 64, "compile"): 1}, SMALLEST),
        ({("InternVL, before pixel shuffle", 64, "triton"): 84.1}, None),
        # Two shapes have 1,024 tokens in a call.
        ({("InternVL, after pixel shuffle", 4, "triton"): 84.1}, SECOND),
        ({("InternVL, before pixel shuffle", 1, "triton"): 84.1}, SECOND),
        # A kernel that failed is not fast; of what was not run beside PyTorch, nothing is known.
        ({("InternVL, after pixel shuffle", 4, "triton"): None}, SECOND),
        ({("InternVL, after pixel shuffle", 4, "triton"): "left out"}, SMALLEST),
        ({("InternVL, after pixel shuffle", 4, "eager"): None}, SMALLEST),
        ({("InternVL, after pixel shuffle", 4, name): None for name in ("eager", "manual", "triton")}, SMALLEST),
        (
            {(name, 1, variant): "left out" for name in NAMES for variant in ("eager", "manual", "triton")},
            {"min_tokens": 1024},
        ),
    ],
)
def test_auto_goes_by_the_size_from_which_triton_was_nowhere_slower(tmp_path, changes, after):
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({"Another": {CASE: SECOND}, "NVIDIA Test": {CASE: {"min_tokens": 7}, OTHER: SECOND}}))
    assert record_measured(Results(MACHINE, gpu_records(changes)), file) == {CASE: after}
    assert json.loads(file.read_text()) == {"Another": {CASE: SECOND}, "NVIDIA Test": {CASE: after, OTHER: SECOND}}


def test_other_runs_change_nothing_that_auto_goes_by(tmp_path):
    file = tmp_path / "measured.json"
    file.write_text("{}")
    assert record_measured(Results(replace(MACHINE, kind="cpu"), gpu_records()), file) == {}
    assert file.read_text() == "{}"
    record_measured(Results(MACHINE, [replace(record, train_vision=True) for record in gpu_records()]), file)
    assert file.read_text() == "{}"


def test_the_table_shows_one_shape_and_names_device_versions_and_command():
    results = Results(MACHINE, gpu_records({("LLaVA-1.5", 64, "manual"): None}))
    lines = table.readme_table(results).splitlines()
    for text in ("NVIDIA Test", "torch 2.15", "Triton 3.9", "2030-01-02", "`python -m benchmarks.kernels.run`"):
        assert text in lines[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert rows[0] == list(table.HEADINGS)
    assert rows[2] == ["attention", "forward", "eager", "100", "99-101", "1.00", "50", "2.0", "1.0", "7", "0.2"]
    assert rows[3][2:4] == ["manual", "failed: out of memory"]
    assert [row[2] for row in rows[2:]] == ["eager", "manual", "compile", "triton"]
    everything = table.readme_table(results, everything=True)
    assert everything.count("| triton |") == sum(
        applies("attention", shape, batch) for shape in SHAPES for batch in BATCHES
    )


def test_results_survive_being_written(tmp_path):
    results = Results(MACHINE, gpu_records({("LLaVA-1.5", 1, "manual"): None}))
    results.save(tmp_path / "x.json")
    assert Results.load(tmp_path / "x.json") == results


def test_a_picture_has_a_bar_for_each_measurement(tmp_path, monkeypatch):
    monkeypatch.setattr(plt, "close", lambda figure: None)
    records = gpu_records({("LLaVA-1.5", 1, "manual"): None})
    [path] = plot.draw(Results(MACHINE, records), tmp_path, "x")
    assert path.read_bytes()[:4] == b"\x89PNG"
    axes = plt.gcf().axes
    monkeypatch.undo()
    plt.close("all")
    bars = [bar.get_width() for axis in axes for bar in axis.patches]
    assert sorted(bars) == sorted(record.ratio for record in records if record.ratio is not None)
    texts = [text.get_text() for axis in axes for text in axis.texts]
    assert texts.count("manual: not measured") == 1
    assert {axis.get_title() for axis in axes} >= {"forward, B=1", "forward, B=64"}


def test_every_variant_has_a_colour():
    names = {name for operation in OPERATIONS.values() for name in operation(setting()).variants}
    assert names | {"flex", "varlen", "triton"} == set(plot._COLOURS)


def test_a_gpu_compares_the_kernels_too(monkeypatch):
    """Which variants there are on a GPU; nothing is run there."""
    monkeypatch.setattr("benchmarks.kernels.operations.make_inputs", lambda wanted: make_inputs(setting(wanted.shape)))
    monkeypatch.setattr(nn.Module, "to", lambda module, *args, **kwargs: module)
    gpu = torch.device("cuda")
    found = {
        (name, shape.name): OPERATIONS[name](replace(setting(shape), device=gpu)).variants
        for name in OPERATIONS
        for shape in (DENSE, PACKED)
        if applies(name, shape, 1)
    }
    assert list(found["linear", DENSE.name]) == ["authors", "authors, as shipped", "eager", "compile", "triton"]
    assert set(found["attention", DENSE.name]) == {"eager", "compile", "manual", "flex", "triton"}
    assert set(found["modulation", PACKED.name]) == {"eager", "compile", "varlen", "triton"}
    for variants in found.values():
        eager, triton = variants["eager"].module, variants["triton"].module
        assert (eager.config.kernel, triton.config.kernel) == ("eager", "triton")
        for name, parameter in eager.named_parameters():
            assert torch.equal(triton.get_parameter(name), parameter)
