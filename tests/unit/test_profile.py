"""The schema: what is valid, and that each mistake is told in one line with field, value and remedy."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit_builders import make_profile, profile_data, reducer

from eos_vllm.core.errors import BudgetError, EosError, ProfileError
from eos_vllm.core.operator import OperatorParams
from eos_vllm.core.profile import MAX_BYTES, parse_profile, read_profile


def refusal(data: Any, source: str = "theta.json") -> str:
    """The one line that a bad profile is refused with."""
    with pytest.raises(ProfileError) as caught:
        parse_profile(data, source)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert all(text.partition(part)[1] for part in ("=", ": ", "; "))
    return text


# Change, then what the message must name: field, value, remedy.
BAD = {
    "unknown field": ({"colour": "red"}, ("profile.colour", "'red'", "correct it in theta.json")),
    "unknown field inside": ({"reducers": [reducer(1, kappa=2)]}, ("profile.reducers.0.kappa", "2", "correct it")),
    "missing field": ({"budget": {"measure": "final"}}, ("profile.budget", "either tokens or share", "correct it")),
    "gate above 1": (
        {"reducers": [reducer(1, gate=1.5)]},
        ("profile.reducers.0.gate", "1.5", "less than or equal to 1"),
    ),
    "discard below 0": ({"reducers": [reducer(1, -0.1)]}, ("profile.reducers.0.discard", "-0.1", "correct it")),
    "gamma above 1": ({"reducers": [reducer(1, gamma=2.0)]}, ("profile.reducers.0.gamma", "2.0", "correct it")),
    "rho below 0": ({"reducers": [reducer(1, rho=-1)]}, ("profile.reducers.0.rho", "-1", "correct it")),
    "nu above 1": ({"reducers": [reducer(1, nu=1.01)]}, ("profile.reducers.0.nu", "1.01", "correct it")),
    "tau of 0": ({"reducers": [reducer(1, tau=0)]}, ("profile.reducers.0.tau", "0", "greater than 0")),
    "theta above 1": ({"reducers": [reducer(1, theta=1.1)]}, ("profile.reducers.0.theta", "1.1", "correct it")),
    "theta below -1": (
        {"reducers": [reducer(1, theta=-1e9)]},
        ("profile.reducers.0.theta", "-1000000000.0", "correct"),
    ),
    "no number": ({"reducers": [reducer(1, gamma=float("nan"))]}, ("profile.reducers.0.gamma", "nan", "finite")),
    "text for a number": (
        {"reducers": [{**reducer(1), "tau": "1"}]},
        ("profile.reducers.0.tau", "'1'", "valid number"),
    ),
    "fraction of a layer": ({"reducers": [reducer(1.5)]}, ("profile.reducers.0.layer", "1.5", "valid integer")),  # type: ignore
    "truth value for a layer": ({"reducers": [reducer(True)]}, ("profile.reducers.0.layer", "True", "valid integer")),
    "no reducers": ({"reducers": []}, ("profile.reducers", "at least 1", "correct it")),
    "layers fall": (
        {"reducers": [reducer(3), reducer(1)]},
        ("reducers: layers [3, 1]", "strictly increase", "correct"),
    ),
    "layer twice": (
        {"reducers": [reducer(3), reducer(3)]},
        ("reducers: layers [3, 3]", "strictly increase", "correct"),
    ),
    "layer too deep": ({"reducers": [reducer(7)]}, ("reducers[0].layer=7", "too deep", "6 is the last")),
    "layer -1": ({"reducers": [reducer(-1)]}, ("reducers[0].layer=-1", "needs schema eos-profile/2", "correct it")),
    "layer -2": ({"reducers": [reducer(-2)]}, ("profile.reducers.0.layer", "-2", "correct it")),
    "all is discarded": ({"reducers": [reducer(1, 1.0)]}, ("reducers[0]", "gate*discard=1.0", "below 1")),
    "unknown queries": ({"importance": {"queries": "first"}}, ("profile.importance.queries", "'first'", "last_text")),
    "unknown heads": ({"importance": {"heads": "max"}}, ("profile.importance.heads", "'max'", "mean")),
    "unknown norm": ({"operator": {"norm": "l1"}}, ("profile.operator.norm", "'l1'", "frobenius")),
    "sharpness of 0": ({"operator": {"gate_sharpness": 0}}, ("profile.operator.gate_sharpness", "0", "correct it")),
    "budget of 0": ({"budget": {"tokens": 0}}, ("profile.budget.tokens", "0", "greater than or equal to 1")),
    "unknown measure": ({"budget": {"tokens": 9, "measure": "mean"}}, ("profile.budget.measure", "'mean'", "final")),
    "minimum above the tokens": (
        {"budget": {"tokens": 9, "minimum": 101}},
        ("budget.minimum=101", "100", "correct it"),
    ),
    "short schedule": ({"schedules": {"9": [40, 20]}}, ("schedules[9]=[40, 20]", "3 reducers", "correct it")),
    "schedule that rises": ({"schedules": {"9": [40, 50, 9]}}, ("schedules[9]=[40, 50, 9]", "not increase", "1..100")),
    "schedule above the tokens": ({"schedules": {"9": [101, 50, 9]}}, ("schedules[9]", "not increase", "1..100")),
    "schedule of 0": ({"schedules": {"9": [40, 20, 0]}}, ("schedules[9]=[40, 20, 0]", "lie in", "1..100")),
    "schedule for text": ({"schedules": {"few": [40, 20, 9]}}, ("schedules", "'few'", "positive whole number")),
    "schedule for 0": ({"schedules": {"0": [40, 20, 9]}}, ("schedules", "'0'", "positive whole number")),
    "schedule for 09": ({"schedules": {"09": [40, 20, 9]}}, ("schedules", "'09'", "positive whole number")),
    "no schema": ({"schema": None}, ("profile.schema", "None", "eos-profile/1")),
    "later schema": ({"schema": "eos-profile/3"}, ("profile.schema", "'eos-profile/3'", "eos-profile/2")),
}


@pytest.mark.parametrize("change", BAD)
def test_each_mistake_is_told_in_one_line(change: str) -> None:
    changes, words = BAD[change]
    text = refusal(profile_data(**changes))
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize("text", ["", "{", "{'schema': 1}", b"\xff\xfe", "[" * 100_000, "1" * 5000])
def test_what_is_no_json_is_refused(text: str | bytes) -> None:
    assert "it is no JSON (" in refusal(text)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"eos-profile/1"'])
def test_json_that_is_no_object_is_refused(text: str) -> None:
    assert "it is no JSON object" in refusal(text)


def test_a_mebibyte_is_the_most_and_is_not_even_parsed_beyond_it(tmp_path: Path) -> None:
    text = json.dumps(profile_data())
    parse_profile(text + " " * (MAX_BYTES - len(text)))
    assert "it has 1048577 bytes" in refusal(" " * (MAX_BYTES + 1))
    assert f"at most {MAX_BYTES}" in refusal("ä" * (MAX_BYTES // 2 + 1))
    big = tmp_path / "big.json"
    big.write_text(" " * (2 * MAX_BYTES))
    with pytest.raises(ProfileError, match=f"at most {MAX_BYTES}"):
        read_profile(big)


def test_several_mistakes_are_counted() -> None:
    assert "(and 2 more)" in refusal(profile_data(a=1, b=2, c=3))


@pytest.mark.parametrize("name", ["a\nb", "a\rb", "a\u2028b", "\x1b[31mred", "x" * 10_000])
def test_a_hostile_field_name_stays_on_one_short_line(name: str) -> None:
    text = refusal(profile_data(**{name: 1}), source=name)
    assert text.isprintable()
    assert len(text) < 1500


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ProfileError, match="give the path of a readable file") as caught:
            read_profile(path)
        assert str(path) in str(caught.value)


def test_what_is_written_is_read_back_the_same(tmp_path: Path) -> None:
    profile = make_profile(schedules={"20": [50, 30, 20]}, provenance={"seed": 42, "of": {"any": ["shape"]}})
    file = tmp_path / "theta.json"
    file.write_text(json.dumps(profile.to_dict()))
    assert read_profile(file) == profile
    assert parse_profile(profile.to_dict()) == profile


def test_whole_numbers_do_for_fractions_and_defaults_are_the_designs() -> None:
    profile = parse_profile(profile_data(reducers=[{**reducer(6), "gate": 1, "tau": 2}]))
    assert profile.reducers[0].retain == 0.5
    assert (profile.importance.queries, profile.importance.heads) == ("relevant_text", "mean")
    assert profile.operator_params(0) == OperatorParams(0.0, 2.0, 0.0, 0.0, 0.0, 10.0, "token")
    assert profile.budget.minimum == 1


@given(depth=st.integers(2, 40), data=st.data())
def test_segments_partition_the_layers_in_order(depth: int, data: st.DataObject) -> None:
    layers = sorted(data.draw(st.sets(st.integers(0, depth - 2), min_size=1)))
    profile = make_profile(layers=tuple(layers), depth=depth)
    segments = [profile.segment_of_layer(layer) for layer in range(depth)]
    assert segments == sorted(segments)
    assert tuple(segments.count(s) for s in range(profile.num_segments)) == profile.segment_layers()
    assert [layer for layer in range(depth - 1) if segments[layer] != segments[layer + 1]] == layers


def test_errors_cross_processes() -> None:
    error = BudgetError("field", [1, 2], "problem", "remedy")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.value) == (BudgetError, "field=[1, 2]: problem; remedy", [1, 2])
    assert isinstance(copy, EosError)
