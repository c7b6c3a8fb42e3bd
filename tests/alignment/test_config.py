from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emma_adapter import ConfigError, EmmaConfig, EmmaError
from emma_adapter.alignment.config import InstructionPolicy
from tests.support.budget import budget

FIELDS = [f.name for f in dataclasses.fields(EmmaConfig)]
FUSIONS = ["attention", "linear", "modulation"]
NAN = float("nan")
POSITIVE = "an integer >= 1"
OPTIONAL_SIZES = ["visual_dim", "instruction_dim", "num_visual_tokens", "max_instruction_tokens", "rank"]
NOT_POSITIVE_INTS = [0, -1, True, False, 4.0, NAN, "4", [4], (4,), {}]

# (field, wrong value, what the message must say is allowed, the other fields)
WRONG: list[tuple[str, Any, str, dict[str, Any]]] = [
    *[
        ("fusion", value, "'attention', 'linear', 'moda', 'modulation'", {})
        for value in ("atention", "", None, 3, ["linear"], {})
    ],
    *[(name, value, POSITIVE, {}) for name in OPTIONAL_SIZES for value in NOT_POSITIVE_INTS],
    *[(name, value, POSITIVE, {}) for name in ("inner_dim", "num_heads") for value in [*NOT_POSITIVE_INTS, None]],
    ("inner_dim", 30, "a multiple of num_heads=4", {}),
    ("inner_dim", 2, "a multiple of num_heads=4", {}),
    *[("instruction_layer", value, "an integer", {}) for value in (True, None, -2.0, "-2", [])],
    *[("cache_size", value, "an integer >= 0", {}) for value in (-1, True, None, 1.0, "512")],
    *[("kernel", value, "'auto', 'eager', 'triton'", {}) for value in (None, "cuda", True, ["eager"])],
    *[("align_deepstack", value, "True or False", {}) for value in (None, 1, "yes")],
    *[
        ("visual_grid", value, "two integers (height, width) >= 1", {})
        for value in (4, "22", (), (4,), (1, 2, 2), (0, 4), (-2, -2), (2.0, 2), (True, 4), (None, 4), {2: 2}, {2, 3})
    ],
    ("visual_grid", (2, 3), "num_visual_tokens=7", {"num_visual_tokens": 7}),
    ("rank", 5, "at most num_visual_tokens=4", {"num_visual_tokens": 4}),
    ("rank", 5, "at most num_visual_tokens=4", {"visual_grid": (2, 2)}),
    *[("place", value, "'before_projector', 'after_projector'", {}) for value in ("after", "", None, 1, ["moda"])],
    *[
        ("instruction_policy", value, "'last_turn', 'shortest_turn', 'all_turns'", {})
        for value in ("first_turn", "", None, 0, ["last_turn"])
    ],
    *[("instruction_encoder", value, "non-empty string", {}) for value in ("", " \n", None, 3, ["llm"], b"llm")],
    *[("fusion_options", value, "a mapping from names", {}) for value in (None, [], "a", 3, {1: 2}, {None: 1})],
    *[
        ("fusion_options", {"deep": [{"x": value}]}, "without NaN and infinities", {})
        for value in (NAN, float("inf"), -float("inf"))
    ],
    *[("fusion_options", {"x": value}, "JSON values", {}) for value in (object, 1j, b"a", {1}, {1: 2}, [{None: 1}])],
]


@pytest.mark.parametrize(("name", "value", "allowed", "others"), WRONG)
def test_wrong_value_names_field_value_and_what_is_allowed(name, value, allowed, others):
    with pytest.raises(ConfigError) as caught:
        EmmaConfig(**others, **{name: value})
    message = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, EmmaError)
    assert f"EmmaConfig.{name}" in message
    assert repr(value) in message
    assert allowed in message


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_has_a_wrong_value_and_a_strategy(name):
    assert name in {row[0] for row in WRONG}
    assert name in VALID


@pytest.mark.parametrize("name", FIELDS)
def test_replace_validates_too(name):
    _, value, _, others = next(row for row in WRONG if row[0] == name)
    config = EmmaConfig(**others)
    with pytest.raises(ConfigError, match=f"EmmaConfig.{name}"):
        config.replace(**{name: value})


@pytest.mark.parametrize("grid", [[2], [0, 4], ["2", "2"]])
def test_wrong_grid_as_json_gives_it(grid):
    with pytest.raises(ConfigError, match=r"EmmaConfig.visual_grid must be None or two integers"):
        EmmaConfig.from_json(json.dumps({"visual_grid": grid}))


def test_zero_heads_are_named_before_they_divide():
    with pytest.raises(ConfigError, match=r"EmmaConfig.num_heads .*got 0"):
        EmmaConfig(inner_dim=4, num_heads=0)


@pytest.mark.parametrize(
    "text", ['{"visual_dim": NaN}', '{"fusion_options": {"x": [NaN]}}', '{"fusion_options": {"x": 1e999}}']
)
def test_nan_and_infinity_in_json_are_refused(text):
    with pytest.raises(ConfigError, match=r"EmmaConfig\.(visual_dim|fusion_options)"):
        EmmaConfig.from_json(text)


@pytest.mark.parametrize("text", ["", "{", "not json", '{"fusion": }', b"\xff\xfe\xff"])
def test_text_that_is_not_json(text):
    with pytest.raises(ConfigError, match="must be JSON"):
        EmmaConfig.from_json(text)


@pytest.mark.parametrize("text", ["[]", "null", '"attention"', "3", '[["fusion", "linear"]]'])
def test_json_that_is_not_an_object(text):
    with pytest.raises(ConfigError, match="must be a JSON object"):
        EmmaConfig.from_json(text)


def test_unknown_keys_are_named_with_the_known_ones():
    with pytest.raises(ConfigError) as caught:
        EmmaConfig.from_dict({"fusion": "linear", "vision_dim": 4, "gate": True})
    message = str(caught.value)
    assert "'gate', 'vision_dim'" in message
    assert "unknown" in message
    assert all(repr(name) in message for name in FIELDS)


@pytest.mark.parametrize("values", [{1: 2}, {1: 2, "gate": 3}, {None: 2, "gate": 3}])
def test_unknown_keys_of_any_type(values):
    with pytest.raises(ConfigError, match="unknown config field"):
        EmmaConfig.from_dict(values)


def json_values() -> st.SearchStrategy[Any]:
    leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8
    )


SIZES = st.none() | st.integers(1, 5000)
VALID: dict[str, st.SearchStrategy[Any]] = {
    "fusion": st.sampled_from(FUSIONS),
    "place": st.sampled_from(["before_projector", "after_projector"]),
    "visual_dim": SIZES,
    "instruction_dim": SIZES,
    "num_visual_tokens": SIZES,
    "visual_grid": st.none() | st.tuples(st.integers(1, 40), st.integers(1, 40)),
    "max_instruction_tokens": SIZES,
    "inner_dim": st.integers(1, 64),
    "num_heads": st.integers(1, 16),
    "rank": SIZES,
    "instruction_encoder": st.text(min_size=1).filter(str.strip),
    "instruction_layer": st.integers(-(2**31) + 1, 2**31 - 1),
    "instruction_policy": st.sampled_from(get_args(InstructionPolicy)),
    "cache_size": st.integers(0, 2**63 - 1),
    "align_deepstack": st.booleans(),
    "kernel": st.sampled_from(["auto", "eager", "triton"]),
    "fusion_options": st.dictionaries(st.text(), json_values(), max_size=4),
}


@st.composite
def valid_values(draw) -> dict[str, Any]:
    values = {name: draw(strategy) for name, strategy in VALID.items()}
    values["inner_dim"] *= values["num_heads"]
    if (grid := values["visual_grid"]) is not None:
        values["num_visual_tokens"] = grid[0] * grid[1]
    if values["rank"] is not None and values["num_visual_tokens"] is not None:
        values["rank"] = min(values["rank"], values["num_visual_tokens"])
    # Whatever may be left out is left out at times.
    optional = sorted(set(values) - {"inner_dim", "num_heads", "num_visual_tokens"})
    for name in draw(st.sets(st.sampled_from(optional))):
        del values[name]
    return values


def same_types(left: Any, right: Any) -> bool:
    """``1 == 1.0 == True`` to Python, but not to whoever reads the option."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same_types(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same_types, left, right))
    return True


@settings(max_examples=budget(33, 100))
@given(valid_values())
def test_round_trips_are_exact(values):
    config = EmmaConfig(**values)
    for name, value in values.items():
        assert getattr(config, name) == value
    for again in (
        EmmaConfig.from_json(config.to_json()),
        EmmaConfig.from_dict(config.to_dict()),
        config.replace(),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
    ):
        assert again == config
        for name in FIELDS:
            assert same_types(getattr(again, name), getattr(config, name)), name
        assert again.to_json() == config.to_json()


@settings(max_examples=budget(16, 50))
@given(valid_values())
def test_dict_holds_every_field_in_json_types(values):
    config = EmmaConfig(**values)
    stored = config.to_dict()
    assert set(stored) == set(FIELDS)
    assert same_types(json.loads(json.dumps(stored, allow_nan=False)), stored)
    assert json.loads(config.to_json()) == stored


@given(st.integers(1, 50), st.integers(1, 50))
@settings(max_examples=budget(8, 25))
def test_grid_may_be_a_list_and_gives_the_number_of_tokens(height, width):
    from_list = EmmaConfig(visual_grid=[height, width])
    assert from_list == EmmaConfig(visual_grid=(height, width))
    assert from_list.visual_grid == (height, width)
    assert type(from_list.visual_grid) is tuple
    assert from_list.num_visual_tokens == height * width
    assert from_list.to_dict()["visual_grid"] == [height, width]


def test_tuples_in_options_become_lists():
    config = EmmaConfig(fusion_options={"sizes": (1, (2, 3)), "nested": {"pair": (4,)}})
    assert config.fusion_options == {"sizes": [1, [2, 3]], "nested": {"pair": [4]}}
    assert EmmaConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("name", FIELDS)
def test_frozen(name):
    config = EmmaConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, getattr(config, name))


def test_options_are_a_private_copy():
    options = {"list": [1, {"a": 2}], "dict": {"b": [3]}}
    config = EmmaConfig(fusion_options=options)
    expected = copy.deepcopy(options)
    options["list"].append(4)
    options["list"][1]["a"] = 5
    options["dict"]["b"].clear()
    options["new"] = 6
    assert config.fusion_options == expected
    handed_out = config.to_dict()["fusion_options"]
    handed_out["list"].append(4)
    handed_out["new"] = 6
    assert config.fusion_options == expected
    copied = config.replace(fusion="modulation")
    assert copied.fusion_options["list"] is not config.fusion_options["list"]


def test_default_options_are_not_shared():
    assert EmmaConfig().fusion_options is not EmmaConfig().fusion_options
    assert EmmaConfig().fusion_options == {}


def test_fields_are_keyword_only():
    with pytest.raises(TypeError):
        EmmaConfig("linear")


def test_json_is_stable_whatever_the_order():
    forward = EmmaConfig(fusion="linear", rank=2, fusion_options={"a": 1, "b": 2})
    backward = EmmaConfig(fusion_options={"b": 2, "a": 1}, rank=2, fusion="linear")
    assert forward.to_json() == backward.to_json()


def test_replace_leaves_the_rest_and_the_original():
    config = EmmaConfig(visual_dim=8, visual_grid=(2, 3))
    changed = config.replace(visual_dim=16)
    assert (changed.visual_dim, changed.visual_grid, config.visual_dim) == (16, (2, 3), 8)


def test_paper():
    config = EmmaConfig.paper()
    assert config.fusion == "linear"
    assert config.instruction_encoder == "openai/clip-vit-large-patch14-336"
    assert config.instruction_layer == -2
    assert config.instruction_policy == "shortest_turn"
    assert config.rank is None
    assert EmmaConfig.from_json(config.to_json()) == config


def test_moda_is_behind_the_projector():
    config = EmmaConfig.moda(visual_dim=64, instruction_dim=64)
    assert (config.fusion, config.place, config.instruction_encoder) == ("moda", "after_projector", "llm")
    # Heads divide the channels of the tokens, not the width of the feed-forward layers.
    assert EmmaConfig.moda(num_heads=3, inner_dim=8).num_heads == 3


def test_paper_with_changes():
    config = EmmaConfig.paper("some/tower", instruction_policy="last_turn", rank=4, visual_dim=8)
    assert config == EmmaConfig(fusion="linear", instruction_encoder="some/tower", rank=4, visual_dim=8)
    with pytest.raises(ConfigError, match=r"EmmaConfig.rank .*got 0"):
        EmmaConfig.paper(rank=0)


def test_options_nested_without_end_are_refused():
    endless: dict[str, Any] = {}
    endless["again"] = endless
    with pytest.raises(ConfigError, match="fusion_options"):
        EmmaConfig(fusion_options=endless)


def test_equal_configs_hash_alike():
    assert hash(EmmaConfig(rank=2, fusion_options={"a": [1]})) == hash(EmmaConfig(rank=2, fusion_options={"a": [1]}))
