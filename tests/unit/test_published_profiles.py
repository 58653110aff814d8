"""The shipped profiles: valid, complete, and with the published numbers."""

import json
from pathlib import Path

import pytest
import torch

from eos_vllm import profiles
from eos_vllm.analysis import corners
from eos_vllm.analysis.comparison import compare
from eos_vllm.analysis.cost import flops_crossover
from eos_vllm.analysis.equivalence import gaussian_tokens
from eos_vllm.analysis.scaling import scale_to_model
from eos_vllm.core.budget import eq11_counts, kept_counts, layer_average
from eos_vllm.core.errors import ProfileError
from eos_vllm.core.operator import unified_operator
from eos_vllm.core.plan import Planner
from eos_vllm.core.profile import MAX_BYTES, Withdrawal
from eos_vllm.core.selectors import LAST, QueriesAndKeys, TowerOutput
from eos_vllm.core.selectors.visionzip import VisionZip
from eos_vllm.core.selectors.window_topk import WindowTopK
from eos_vllm.models import embedded
from eos_vllm.models.geometry import geometry

ALL = [
    "divprune-llava-1.5-7b",
    "divprune-llava-next-mistral-7b",
    "divprune-llava-onevision-7b",
    "divprune-qwen2.5-vl-7b",
    "divprune-qwen3-vl-8b",
    "embedded-divprune",
    "embedded-eos",
    "embedded-fastervlm",
    "embedded-fastv",
    "embedded-pool",
    "embedded-prumerge-plus",
    "embedded-scope",
    "embedded-searched",
    "embedded-shared-image",
    "embedded-sparsevlm-v2",
    "embedded-tome-style",
    "embedded-two-stage",
    "embedded-visionzip",
    "embedded-vispruner",
    "embedded-vscan",
    "eos-llava-1.5-7b",
    "fastervlm-llava-1.5-7b",
    "fastv-llava-1.5-7b",
    "fastv-llava-next-mistral-7b",
    "fastv-llava-onevision-7b",
    "fastv-qwen2.5-vl-7b",
    "fastv-qwen3-vl-8b",
    "pool-llava-1.5-7b",
    "prumerge-plus-llava-1.5-7b",
    "pyramiddrop-llava-1.5-7b",
    "pyramiddrop-llava-next-mistral-7b",
    "scope-llava-1.5-7b",
    "shared-image-llava-1.5-7b",
    "sparsevlm-v1-llava-1.5-7b",
    "sparsevlm-v2-llava-1.5-7b",
    "tome-style-llava-1.5-7b",
    "two-stage-llava-1.5-7b",
    "two-stage-qwen2.5-vl-7b",
    "two-stage-qwen3-vl-8b",
    "visionzip-llava-1.5-7b",
    "vispruner-llava-1.5-7b",
    "vscan-llava-1.5-7b",
]
# What images of any size are reduced by has its own tests (test_published_profiles_any_size.py).
LLAVA = [name for name in ALL if name.startswith("embedded-") or name.endswith("-llava-1.5-7b")]
# Published methods that work before the decoder alone, and what selects.
BEFORE = {
    "fastervlm": {"rule": "topk", "score": "cls_attention"},
    "visionzip": {"rule": "visionzip", "contextual": 5 / 32},
    "divprune": {"rule": "maxmin", "features": "projected"},
    "scope": {"rule": "coverage", "score": "cls_attention", "features": "vision", "alpha": 1.0},
    "vispruner": {"rule": "visprune", "score": "cls_attention", "features": "vision", "share": 0.5},
    "prumerge-plus": {"rule": "prumerge_plus"},
}
OWN = ("shared-image", "two-stage")
SELECTING = [name.format(stem) for stem in (*BEFORE, "vscan", *OWN) for name in ("{}-llava-1.5-7b", "embedded-{}")]
V2 = {"192": (300, 200, 118), "128": (238, 108, 60), "96": (246, 54, 28), "64": (66, 34, 20)}


def test_the_list_is_complete() -> None:
    assert list(profiles.names()) == ALL


@pytest.mark.parametrize("name", ALL)
def test_each_is_named_after_its_file_and_says_where_it_comes_from(name: str) -> None:
    profile = profiles.load(name)
    assert profile.name == name == profiles.path(name).stem
    assert {"source", "command"} & set(profile.provenance)
    assert len(profile.description) > 100
    if not name.startswith("embedded") and name.startswith(OWN):
        assert "A starting point for a search, ours: " in profile.description
        assert "Not published, not searched and not measured" in profile.description
    elif not name.startswith("embedded"):
        assert "Exact: " in profile.description
        assert any(words in profile.description for words in ("Not expressed: ", "cannot express", "Not published"))


@pytest.mark.parametrize("name", LLAVA)
def test_each_fits_its_model_and_keeps_fewer_tokens_than_stock(name: str) -> None:
    profile = profiles.load(name)
    depth = 8 if name.startswith("embedded") else 32
    assert (profile.model.num_decoder_layers, profile.model.visual_tokens) == (depth, 576)
    assert kept_counts(profile)[-1] < 576
    if depth == 32:
        cost = compare(geometry("llava-1.5-7b"), Planner(profile))
        assert cost.flops_ratio < 1
        assert cost.kv_ratio < 1


@pytest.mark.parametrize("name", LLAVA)
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


@pytest.mark.parametrize("name", [name for name in SELECTING if not name.endswith("-llava-1.5-7b")])
def test_embedded_profiles_say_what_an_untrained_cls_token_means(name: str) -> None:
    profile = profiles.load(name)
    assert "CLS token" in profile.description
    assert profile.selector is not None
    assert "never trained" in profile.description
    assert ("judged on noise" in profile.description) is profile.selector.needs_cls


@pytest.mark.parametrize("name", SELECTING)
def test_profiles_before_the_decoder_meet_their_cost_and_know_their_flops(name: str) -> None:
    profile = profiles.load(name)
    model = str(embedded.path()) if name.startswith("embedded") else "llava-1.5-7b"
    assert profile.model.flops_crossover == flops_crossover(geometry(model))
    assert (profile.schema_, profile.importance.window) == ("eos-profile/2", None)
    assert (profile.budget.measure, profile.budget.tokens, profile.budget.minimum) == ("layer_average", 64, 1)
    counts = kept_counts(profile)
    assert counts == eq11_counts(profile)
    # Rounding each count moves the average by half a token at most.
    assert 63.5 <= layer_average(profile, counts) <= 64
    for budget in (16, 32, 128, 192):
        assert layer_average(profile, kept_counts(profile, budget)) == pytest.approx(budget, abs=0.5)
    assert profile.before is not None
    assert profile.before.select is not None


@pytest.mark.parametrize("stem", BEFORE)
def test_one_stage_methods_before_the_decoder_carry_exactly_their_count(stem: str) -> None:
    for name in (f"{stem}-llava-1.5-7b", f"embedded-{stem}"):
        profile = profiles.load(name)
        assert profile.selector is not None
        assert profile.before is not None
        assert profile.selector.model_dump() == BEFORE[stem]
        assert (profile.inside, profile.schedules) == ((), {})
        assert profile.params_of(profile.before).is_identity
        for budget in (16, 32, 64, 128, 192):
            assert kept_counts(profile, budget) == (budget,)
            assert layer_average(profile, (budget,)) == budget
            assert profile.selector.count(budget, 576) == budget


def test_visionzip_has_its_published_split() -> None:
    selector = profiles.load("visionzip-llava-1.5-7b").selector
    assert isinstance(selector, VisionZip)
    g = torch.Generator().manual_seed(42)
    query, key = torch.randn(2, 1, 577, 2, 4, generator=g)
    tower = TowerOutput(
        vision=torch.randn(1, 576, 8, generator=g),
        project=lambda features: features,
        cls=torch.zeros(1, 8),
        layers={LAST: QueriesAndKeys(query, key)},
    )
    for budget, contextual in ((64, 10), (128, 20), (192, 30)):
        choice = selector.choose(tower, budget)
        assert choice.features is not None
        assert choice.features.shape[1] == budget
        assert choice.kept.shape[1] == budget - 1
        # Dominant patches stand as they are, contextual ones as more than themselves.
        same = (choice.features[0, 1 : budget - contextual, None] == tower.vision[0]).all(dim=-1).any(dim=-1)
        more = (choice.features[0, budget - contextual :, None] == tower.vision[0]).all(dim=-1).any(dim=-1)
        assert bool(same.all())
        assert not bool(more.any())


@pytest.mark.parametrize("name", ["vscan-llava-1.5-7b", "embedded-vscan"])
def test_vscan_has_its_published_counts_and_merges_into_the_nearest_by_the_mean(name: str) -> None:
    profile = profiles.load(name)
    half = profile.model.num_decoder_layers // 2 - 1
    assert (profile.layers, profile.importance.queries) == ((half,), "last_text")
    assert profile.schedules == {"192": (288, 96), "128": (192, 64), "64": (96, 32)}
    for budget in (64, 128, 192):
        assert layer_average(profile, kept_counts(profile, budget)) == budget
    selector = profile.selector
    assert isinstance(selector, WindowTopK)
    assert (selector.window, selector.shallow_layer) == (6, 5 if half == 15 else 0)
    assert profile.before is not None
    anchors, discards, scores = gaussian_tokens(42)
    similar = torch.nn.functional.normalize(discards, dim=-1) @ torch.nn.functional.normalize(anchors, dim=-1).mT
    goes_to = torch.nn.functional.one_hot(similar.argmax(dim=-1), anchors.shape[-2]).to(anchors.dtype)
    mean = (anchors + goes_to.mT @ discards) / (1 + goes_to.sum(dim=-2).unsqueeze(-1))
    merged = unified_operator(anchors, discards, scores, profile.params_of(profile.before))
    assert float((merged - mean).abs().max()) <= 2e-6
    assert profile.operator_params(0).is_identity


@pytest.mark.parametrize(
    ("name", "layers", "counts"),
    [
        ("shared-image-llava-1.5-7b", (23,), {64: (85, 0), 128: (171, 0), 192: (256, 0)}),
        ("embedded-shared-image", (5,), {64: (85, 0), 128: (171, 0), 192: (256, 0)}),
        ("two-stage-llava-1.5-7b", (15, 23), {64: (110, 36, 0), 128: (205, 102, 0), 192: (292, 184, 0)}),
        ("embedded-two-stage", (3, 5), {64: (110, 36, 0), 128: (205, 102, 0), 192: (292, 184, 0)}),
    ],
)
def test_our_own_starting_points_cover_then_withdraw(
    name: str, layers: tuple[int, ...], counts: dict[int, tuple[int, ...]]
) -> None:
    profile = profiles.load(name)
    assert profile.layers == layers
    assert {budget: kept_counts(profile, budget) for budget in counts} == counts
    assert isinstance(profile.reducers[-1], Withdrawal)
    assert all(profile.params_of(reducer).is_identity for reducer in profile.reducers)
    # A reducer works after its layer: so many layers have run by then.
    depth = profile.model.num_decoder_layers
    assert (layers[-1] + 1) / depth == pytest.approx(0.73, abs=0.03)
    if "two-stage" in name:
        assert (layers[0] + 1) / depth == pytest.approx(0.48, abs=0.03)
        assert (profile.importance.queries, profile.window) == ("relevant_text", "turn")
    else:
        assert (profile.importance.queries, profile.window) == ("image", "image")


def test_the_embedded_starting_points_are_those_of_the_7b_model_scaled() -> None:
    for stem in OWN:
        scaled = scale_to_model(profiles.load(f"{stem}-llava-1.5-7b"), 8, 576)
        assert scaled.layers == profiles.load(f"embedded-{stem}").layers


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


def test_an_unknown_name_is_refused_with_where_to_look() -> None:
    for unknown in ("sparsevlm", "../profiles/pool-llava-1.5-7b", ""):
        with pytest.raises(ProfileError, match=r"neither a file nor a shipped profile.*`eos-vllm profile list`"):
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
