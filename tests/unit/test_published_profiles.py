"""The shipped profiles: valid, complete, and with the published numbers."""

import json
from pathlib import Path

import pytest

from eos_vllm import profiles
from eos_vllm.analysis import corners
from eos_vllm.analysis.comparison import compare
from eos_vllm.analysis.equivalence import gaussian_tokens
from eos_vllm.core.budget import eq11_counts, kept_counts, layer_average
from eos_vllm.core.errors import ProfileError
from eos_vllm.core.operator import unified_operator
from eos_vllm.core.plan import Planner
from eos_vllm.core.profile import MAX_BYTES
from eos_vllm.models.geometry import geometry

ALL = [
    "embedded-eos",
    "embedded-fastv",
    "embedded-pool",
    "embedded-searched",
    "embedded-sparsevlm-v2",
    "embedded-tome-style",
    "eos-llava-1.5-7b",
    "fastv-llava-1.5-7b",
    "pool-llava-1.5-7b",
    "pyramiddrop-llava-1.5-7b",
    "sparsevlm-v1-llava-1.5-7b",
    "sparsevlm-v2-llava-1.5-7b",
    "tome-style-llava-1.5-7b",
]
V2 = {"192": (300, 200, 118), "128": (238, 108, 60), "96": (246, 54, 28), "64": (66, 34, 20)}


def test_the_list_is_complete() -> None:
    assert list(profiles.names()) == ALL


@pytest.mark.parametrize("name", ALL)
def test_each_is_named_after_its_file_and_says_where_it_comes_from(name: str) -> None:
    profile = profiles.load(name)
    assert profile.name == name == profiles.path(name).stem
    assert {"source", "command"} & set(profile.provenance)
    assert len(profile.description) > 100
    if not name.startswith("embedded"):
        assert "Exact: " in profile.description
        assert any(words in profile.description for words in ("Not expressed: ", "cannot express", "Not published"))


@pytest.mark.parametrize("name", ALL)
def test_each_fits_its_model_and_keeps_fewer_tokens_than_stock(name: str) -> None:
    profile = profiles.load(name)
    depth = 8 if name.startswith("embedded") else 32
    assert (profile.model.num_decoder_layers, profile.model.visual_tokens) == (depth, 576)
    assert kept_counts(profile)[-1] < 576
    if depth == 32:
        cost = compare(geometry("llava-1.5-7b"), Planner(profile))
        assert cost.flops_ratio < 1
        assert cost.kv_ratio < 1


@pytest.mark.parametrize("name", ALL)
def test_gates_and_discards_say_the_same_as_the_schedule_of_the_own_budget(name: str) -> None:
    profile = profiles.load(name)
    if schedule := profile.schedules.get(str(profile.budget.tokens)):
        assert eq11_counts(profile) == schedule


def test_fastv_keeps_half_after_layer_1_and_less_for_the_budgets_of_comparisons() -> None:
    profile = profiles.load("fastv-llava-1.5-7b")
    assert (profile.layers, profile.importance.queries) == ((1,), "last_text")
    assert kept_counts(profile) == (288,)
    for budget, count in ((192, 166), (128, 98), (64, 30)):
        assert kept_counts(profile, budget) == (count,)
        assert layer_average(profile, (count,)) == pytest.approx(budget, abs=0.5)


def test_pyramiddrop_halves_three_times_to_a_layer_average_of_270() -> None:
    profile = profiles.load("pyramiddrop-llava-1.5-7b")
    assert (profile.layers, profile.importance.queries) == ((7, 15, 23), "last_text")
    assert kept_counts(profile) == (288, 144, 72)
    assert layer_average(profile, kept_counts(profile)) == 270


@pytest.mark.parametrize("name", ["sparsevlm-v2-llava-1.5-7b", "tome-style-llava-1.5-7b", "pool-llava-1.5-7b"])
def test_sparsevlm_2_and_what_is_compared_with_it_share_layers_queries_and_schedules(name: str) -> None:
    profile = profiles.load(name)
    assert (profile.layers, profile.importance.queries) == ((2, 6, 15), "relevant_text")
    assert profile.schedules == V2
    averages = [round(layer_average(profile, kept_counts(profile, int(b))), 1) for b in V2]
    assert averages == [206.8, 144.1, 113.9, 81.8]


def test_sparsevlm_1_has_its_own_schedules() -> None:
    profile = profiles.load("sparsevlm-v1-llava-1.5-7b")
    assert (profile.layers, profile.importance.queries) == ((2, 6, 15), "relevant_text")
    assert profile.schedules == {"192": (300, 200, 110), "128": (303, 110, 36), "96": (238, 48, 26), "64": (66, 30, 17)}


def test_eos_is_table_6() -> None:
    profile = profiles.load("eos-llava-1.5-7b")
    assert profile.layers == (3, 6, 16)
    outer, middle, last = profile.reducers
    assert (middle.gamma, middle.tau, middle.theta, middle.rho, middle.nu) == (0.083, 0.22, 0.1, 0, 0)
    assert [(r.gamma, r.rho, r.nu) for r in (outer, last)] == [(0, 0, 0)] * 2
    assert profile.operator.gate_sharpness == 10
    assert (profile.budget.measure, profile.schedules) == ("final", {})
    assert [kept_counts(profile, r)[-1] for r in (16, 32, 64, 96, 128, 192)] == [16, 32, 64, 96, 128, 192]


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "sparsevlm-v1", "sparsevlm-v2"])
def test_pruning_methods_prune(name: str) -> None:
    profile = profiles.load(f"{name}-llava-1.5-7b")
    assert all(profile.operator_params(i).is_identity for i in range(len(profile.reducers)))


@pytest.mark.parametrize(
    "name", ["tome-style-llava-1.5-7b", "pool-llava-1.5-7b", "embedded-tome-style", "embedded-pool"]
)
def test_merge_and_pool_are_their_corners(name: str) -> None:
    corner = corners.pool if "pool" in name else corners.merge
    profile = profiles.load(name)
    anchors, discards, scores = gaussian_tokens(42)
    for index in range(len(profile.reducers)):
        out = unified_operator(anchors, discards, scores, profile.operator_params(index))
        assert float((out - corner(anchors, discards, scores)).abs().max()) <= 2e-6


def test_the_embedded_baselines_differ_in_the_operator_or_the_choice_alone() -> None:
    pruning, fastv = profiles.load("embedded-sparsevlm-v2"), profiles.load("embedded-fastv")
    for name in ("embedded-tome-style", "embedded-pool"):
        profile = profiles.load(name)
        assert (profile.layers, profile.importance) == (pruning.layers, pruning.importance)
        assert all(kept_counts(profile, r) == kept_counts(pruning, r) for r in (16, 32, 64, 96, 128, 192))
    assert (fastv.layers, fastv.importance.queries) == ((pruning.layers[0],), "last_text")
    assert [kept_counts(fastv, r) for r in (16, 192)] == [(16,), (192,)]


def test_the_embedded_hybrid_uses_every_parameter() -> None:
    profile = profiles.load("embedded-eos")
    assert kept_counts(profile)[-1] == kept_counts(profiles.load("embedded-sparsevlm-v2"))[-1] == 64
    for parameter in ("gamma", "theta", "rho", "nu"):
        assert any(getattr(reducer, parameter) for reducer in profile.reducers)
    assert any(profile.operator_params(i).is_identity for i in range(3))


def test_files_are_small_and_written_with_every_field_of_the_design() -> None:
    for name in profiles.names():
        text = profiles.path(name).read_text(encoding="utf-8")
        assert len(text) < MAX_BYTES / 100
        fields = {
            "schema",
            "name",
            "description",
            "model",
            "importance",
            "operator",
            "reducers",
            "budget",
            "provenance",
        }
        assert set(json.loads(text)) - {"schedules"} == fields


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    for unknown in ("sparsevlm", "../profiles/pool-llava-1.5-7b", ""):
        with pytest.raises(ProfileError, match=r"neither a file nor a shipped profile.*sparsevlm-v2-llava-1\.5-7b"):
            profiles.load(unknown)


def test_resolve_takes_names_and_files_and_a_file_of_the_name_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert profiles.resolve("eos-llava-1.5-7b") == profiles.load("eos-llava-1.5-7b")
    (tmp_path / "eos-llava-1.5-7b").write_bytes(profiles.path("embedded-eos").read_bytes())
    assert profiles.resolve("eos-llava-1.5-7b").name == "embedded-eos"
    assert profiles.resolve(str(profiles.path("pool-llava-1.5-7b"))).name == "pool-llava-1.5-7b"
    with pytest.raises(ProfileError, match="neither a file nor a shipped profile"):
        profiles.resolve("nothing.json")
