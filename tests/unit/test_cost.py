"""Costs against figures worked out by hand, published conventions, and vLLM's own grouping rule."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit_builders import make_profile

from eos_vllm import profiles
from eos_vllm.analysis.comparison import CostComparison, compare
from eos_vllm.analysis.cost import kv_bytes_per_token, layer_flops, prompt_cost
from eos_vllm.analysis.kv_groups import kv_groups
from eos_vllm.core.errors import BudgetError, ProfileError, SettingError
from eos_vllm.core.plan import ImageSpan, Planner
from eos_vllm.models.geometry import ModelGeometry, geometry

MIB = 1 << 20
LLAVA = geometry("llava-1.5-7b")
# Grouped-query attention whose heads together are no multiple of the width.
SMALL = replace(
    LLAVA,
    num_decoder_layers=8,
    hidden_size=10,
    intermediate_size=7,
    num_attention_heads=6,
    num_kv_heads=2,
    head_dim=4,
    visual_tokens=100,
)


def sparsevlm(budget: int, **options: int) -> CostComparison:
    return compare(LLAVA, Planner(profiles.load("sparsevlm-v2-llava-1.5-7b")), budget=budget, **options)


def test_flops_of_a_layer_by_hand() -> None:
    # n=3, d=10, m=7, HD=24, HkD=8: q and o 2*3*10*24, k and v 2*3*10*8, attention 2*9*24, MLP 3*3*10*7; twice that.
    assert layer_flops(SMALL, 3) == 2 * (1440 + 480 + 432 + 630)
    assert layer_flops(SMALL, 0) == 0


def test_flops_of_a_layer_without_grouping_follow_the_published_convention() -> None:
    d, m, n = 4096, 11008, 664
    assert layer_flops(LLAVA, n) == 2 * (4 * n * d * d + 2 * n * n * d + 3 * n * d * m)


@pytest.mark.parametrize(("budget", "ratio"), [(192, 0.438), (128, 0.346), (64, 0.253)])
def test_published_flops_ratios_of_sparsevlm(budget: int, ratio: float) -> None:
    # The published figures stand for versions 1 and 2 at once, which differ by 0.002 at most.
    assert sparsevlm(budget).flops_ratio == pytest.approx(ratio, abs=0.0015)


def test_sparsevlm_at_64_in_full() -> None:
    cost = sparsevlm(64)
    assert (cost.counts, cost.final, cost.budget) == ((66, 34, 20), 20, 64)
    assert cost.layer_average == (3 * 576 + 4 * 66 + 9 * 34 + 16 * 20) / 32 == 81.8125
    assert cost.reduced.layer_visual_tokens == (576,) * 3 + (66,) * 4 + (34,) * 9 + (20,) * 16
    assert cost.reduced.layer_tokens == (664,) * 3 + (154,) * 4 + (122,) * 9 + (108,) * 16
    assert cost.stock.visual_kv_bytes == 288 * MIB
    assert cost.reduced.visual_kv_bytes == pytest.approx(40.9 * MIB, abs=0.05 * MIB)
    assert cost.stock.kv_bytes == 664 * 32 * 16 * 1024
    flops = [layer_flops(LLAVA, n) for n in (664, 154, 122, 108)]
    total = 3 * flops[0] + 4 * flops[1] + 9 * flops[2] + 16 * flops[3]
    assert (cost.reduced.flops, cost.stock.flops) == (total, 32 * flops[0])
    assert cost.prefill_ceiling == 32 * flops[0] / total == pytest.approx(3.96, abs=0.01)


def test_blocks_round_up_in_each_segment_on_its_own_and_padding_is_paid_for() -> None:
    cost = sparsevlm(64)
    # Segments of 3, 4, 9 and 16 layers in groups of 3; 664, 154, 122 and 108 tokens in blocks of 16.
    assert [s.kv_groups for s in cost.reduced.segments] == [1, 2, 3, 6]
    assert [s.padding_layers for s in cost.reduced.segments] == [0, 2, 0, 2]
    assert [s.blocks for s in cost.reduced.segments] == [42, 2 * 10, 3 * 8, 6 * 7]
    assert cost.reduced.block_bytes == 3 * 16 * 16 * 1024
    assert cost.reduced.allocated_bytes == 128 * cost.reduced.block_bytes == 96 * MIB
    assert (cost.stock.blocks, cost.stock.allocated_bytes) == (42, 42 * 32 * 16 * 16 * 1024)
    assert cost.kv_ratio == 96 / 336


def test_cache_types_and_block_sizes() -> None:
    assert [kv_bytes_per_token(LLAVA, t) for t in ("float16", "bfloat16", "float32", "fp8")] == [
        16384,
        16384,
        32768,
        8192,
    ]
    assert kv_bytes_per_token(SMALL) == 2 * 2 * 4 * 2
    planner = Planner(make_profile())
    one, large = (compare(SMALL, planner, block_size=size).reduced for size in (1, 1000))
    assert one.allocated_bytes == one.kv_bytes
    assert large.blocks == sum(s.kv_groups for s in large.segments)


@given(
    text=st.integers(0, 200),
    images=st.integers(1, 3),
    budget=st.integers(1, 100),
    block=st.integers(1, 64),
    layers=st.sets(st.integers(0, 6), min_size=1, max_size=4),
)
def test_totals_are_sums_over_layers_and_never_above_stock(
    text: int, images: int, budget: int, block: int, layers: set[int]
) -> None:
    profile = make_profile(layers=tuple(sorted(layers)))
    cost = compare(SMALL, Planner(profile), text, images, budget, "float32", block)
    for prompt in (cost.stock, cost.reduced):
        assert len(prompt.layer_tokens) == 8
        assert [t - v for t, v in zip(prompt.layer_tokens, prompt.layer_visual_tokens, strict=True)] == [text] * 8
        assert prompt.kv_bytes == sum(prompt.layer_tokens) * 2 * 2 * 4 * 4
        assert prompt.flops == sum(layer_flops(SMALL, n) for n in prompt.layer_tokens)
        assert prompt.allocated_bytes >= prompt.kv_bytes
    per_image = [v / images for v in cost.reduced.layer_visual_tokens]
    assert cost.layer_average == pytest.approx(sum(per_image) / 8)
    assert (cost.final, cost.counts[-1]) == (per_image[-1],) * 2
    assert cost.flops_ratio <= 1
    assert (cost.flops_ratio == 1) == (cost.counts[0] == 100 and cost.final == 100)


def test_a_plan_that_reduces_nothing_costs_what_stock_does() -> None:
    cost = compare(SMALL, Planner(make_profile()), budget=100)
    assert cost.reduced.layer_tokens == cost.stock.layer_tokens
    assert cost.reduced.flops == cost.stock.flops
    assert (cost.flops_ratio, cost.prefill_ceiling) == (1, 1)


def test_where_images_stand_makes_no_difference() -> None:
    planner, layers = Planner(make_profile()), (2, 2, 2, 2)
    plans = [planner.plan(250, [ImageSpan(a, 100), ImageSpan(b, 100)]) for a, b in ((0, 100), (3, 140), (50, 150))]
    assert len({prompt_cost(SMALL, plan, layers) for plan in plans}) == 1


@pytest.mark.parametrize(
    ("layers", "size", "count", "padding"),
    [
        ((3, 4, 9, 16), 3, (1, 2, 3, 6), (0, 2, 0, 2)),
        ((4, 3, 10, 15), 3, (2, 1, 4, 5), (2, 0, 2, 0)),
        ((8, 8, 8, 8), 8, (1, 1, 1, 1), (0, 0, 0, 0)),
        ((12, 13), 13, (1, 1), (1, 0)),
        ((2, 3), 2, (1, 2), (0, 1)),  # 3 is not below 1.5 * 2
        ((2, 30), 2, (1, 15), (0, 0)),
        ((32,), 32, (1,), (0,)),
    ],
)
def test_kv_groups(layers: tuple[int, ...], size: int, count: tuple[int, ...], padding: tuple[int, ...]) -> None:
    groups = kv_groups(layers)
    assert (groups.size, groups.count, groups.padding) == (size, count, padding)


@given(layers=st.lists(st.integers(1, 20), min_size=2, max_size=5))
def test_kv_groups_are_those_that_vllm_makes(layers: list[int]) -> None:
    torch = pytest.importorskip("torch")
    utils = pytest.importorskip("vllm.v1.core.kv_cache_utils")
    from eos_vllm.serving.kv_cache import SegmentSpec, segments_of_groups

    specs = {
        f"layer.{s}.{n}": SegmentSpec(block_size=16, num_kv_heads=1, head_size=32, dtype=torch.float16, segment=s)
        for s, count in enumerate(layers)
        for n in range(count)
    }
    made = utils._get_kv_cache_groups_uniform_page_size(specs)
    expected = kv_groups(layers)
    config = type("Config", (), {"kv_cache_groups": made})
    segments = segments_of_groups(config)  # type: ignore[arg-type]
    assert tuple(segments.count(s) for s in range(len(layers))) == expected.count
    assert max(len(group.layer_names) for group in made) == expected.size
    missing = [expected.size * expected.count[s] - layers[s] for s in range(len(layers))]
    assert tuple(missing) == expected.padding


@pytest.mark.parametrize("field", ["architecture", "num_decoder_layers", "visual_tokens"])
def test_a_profile_for_another_model_is_refused(field: str) -> None:
    other = replace(SMALL, **{field: "Other" if field == "architecture" else 4})
    with pytest.raises(ProfileError, match=rf"profile\.model\.{field}=.*the model has .*profile scale"):
        compare(other, Planner(make_profile()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_tokens": -1}, "text-tokens=-1: "),
        ({"images": 0}, "images=0: "),
        ({"block_size": 0}, "block-size=0: "),
        ({"dtype": "int4"}, "dtype='int4': .*give one of float16"),
    ],
)
def test_senseless_prompts_are_refused(options: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        compare(SMALL, Planner(make_profile()), **options)
    with pytest.raises(BudgetError):
        compare(SMALL, Planner(make_profile()), budget=0)


def test_plain_data_holds_every_figure() -> None:
    cost = sparsevlm(64, images=2)
    data = json.loads(json.dumps(cost.to_dict()))
    assert data["counts"] == [66, 34, 20]
    assert (data["flops_ratio"], data["kv_ratio"]) == (cost.flops_ratio, cost.kv_ratio)
    assert data["reduced"]["layers"]["visual_tokens"] == [
        2 * n for n in (576,) * 3 + (66,) * 4 + (34,) * 9 + (20,) * 16
    ]
    assert sum(data["reduced"]["layers"]["kv_bytes"]) == data["reduced"]["kv_bytes"] == cost.reduced.kv_bytes
    assert sum(data["stock"]["layers"]["flops"]) == data["stock"]["flops"]
    assert [s["first_layer"] for s in data["reduced"]["segments"]] == [0, 3, 7, 16]
    assert [s["last_layer"] for s in data["reduced"]["segments"]] == [2, 6, 15, 31]


def test_the_geometry_of_a_model_directory_has_all_that_a_cost_needs() -> None:
    assert isinstance(LLAVA, ModelGeometry)
    assert (LLAVA.num_decoder_layers, LLAVA.visual_tokens, LLAVA.num_kv_heads * LLAVA.head_dim) == (32, 576, 4096)
