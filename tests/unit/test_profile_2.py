"""What schema ``eos-profile/2`` adds: reducers before the decoder, withdrawal, score options, budgets by cost."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eos_vllm import profiles
from eos_vllm.analysis.scaling import scale_to_model, upgrade
from eos_vllm.cli.main import main
from eos_vllm.core.budget import cost, flops_share, kept_counts, layer_average, mean_layer_flops
from eos_vllm.core.errors import BudgetError, ProfileError
from eos_vllm.core.plan import ImageSpan, Planner
from eos_vllm.core.profile import Profile, parse_profile

VALUES = {"gate": 1.0, "gamma": 0.0, "tau": 0.5, "theta": 0.0, "rho": 0.0, "nu": 0.0}


def reducer(layer: int, discard: float = 0.5, **more: Any) -> dict[str, Any]:
    return {"layer": layer, **VALUES, "discard": discard, **more}


def data(*reducers: dict[str, Any], measure: str = "layer_average", tokens: int = 64, **more: Any) -> dict[str, Any]:
    return {
        "schema": "eos-profile/2",
        "name": "test",
        "model": {
            "architecture": "LlavaForConditionalGeneration",
            "num_decoder_layers": 8,
            "visual_tokens": 576,
            "flops_crossover": 640,
        },
        "reducers": list(reducers),
        "budget": {"measure": measure, "tokens": tokens},
        **more,
    }


def profile(*reducers: dict[str, Any], **more: Any) -> Profile:
    return parse_profile(data(*reducers, **more))


WITHDRAW = {"layer": 5, "withdraw": True}
BAD = {
    "-1 not first": (data(reducer(1), reducer(-1)), "reducers[1].layer=-1: only the first"),
    "-1 twice": (data(reducer(-1), reducer(-1)), "reducers[1].layer=-1: only the first"),
    "select in the decoder": (data(reducer(1, select={"rule": "maxmin"})), "reducers[0].select belongs to layer -1"),
    "unknown rule": (data(reducer(-1, select={"rule": "best"})), "reducers.0.select"),
    "another rule's field": (data(reducer(-1, select={"rule": "maxmin", "alpha": 1.0})), "alpha"),
    "it mixes itself": (data(reducer(-1, select={"rule": "visionzip"}, gamma=0.1)), "visionzip mixes tokens itself"),
    "resize with another": (data(reducer(-1, select={"rule": "resize"}), reducer(2)), "resize keeps squares"),
    "withdrawn before another": (data(WITHDRAW, reducer(6)), "reducers[0].withdraw: nothing is left"),
    "withdrawn too deep": (data(reducer(1), {"layer": 7, "withdraw": True}), "reducers[1].layer=7 is too deep"),
    "withdrawn with values": (data(reducer(1), {**reducer(5), "withdraw": True}), "profile.reducers.1.gate"),
    "withdraw: false": (data(reducer(1), {"layer": 5, "withdraw": False}), "profile.reducers.1.withdraw"),
    "a schedule that does not withdraw": (data(reducer(1), WITHDRAW, schedules={"64": [100, 1]}), "must end in 0"),
    "a schedule of 0": (data(reducer(1), reducer(3), schedules={"64": [100, 0]}), "lie in 1..576"),
    "flops of an unknown model": (
        data(reducer(1), measure="flops") | {"model": {**data()["model"], "flops_crossover": None}},
        "budget.measure=flops needs model.flops_crossover",
    ),
    "debias behind a selector": (data(reducer(-1), importance={"debias": [1.0] * 576}), "behind layer -1"),
    "debias too short": (data(reducer(1), importance={"debias": [1.0] * 575}), "needs 576 numbers above 0"),
    "heads twice": (data(reducer(1), importance={"heads": [1, 1]}), "importance.heads"),
}


@pytest.mark.parametrize("case", BAD)
def test_each_mistake_is_told_in_one_line(case: str) -> None:
    wrong, words = BAD[case]
    with pytest.raises(ProfileError) as caught:
        parse_profile(wrong)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["reducers", "importance", "operator", "budget", "withdraw"])
def test_schema_1_has_none_of_it(part: str) -> None:
    changes: dict[str, Any] = {
        "reducers": {"reducers": [reducer(-1)]},
        "importance": {"importance": {"reduce": "max"}},
        "operator": {"operator": {"aggregate": "mean"}},
        "budget": {"budget": {"measure": "kv_bytes", "tokens": 64}},
        "withdraw": {"reducers": [reducer(1), WITHDRAW]},
    }
    model = {key: value for key, value in data()["model"].items() if key != "flops_crossover"}
    with pytest.raises(ProfileError, match="needs schema eos-profile/2"):
        parse_profile(data(reducer(1)) | {"schema": "eos-profile/1", "model": model} | changes[part])


def test_what_is_written_is_read_again() -> None:
    first = reducer(-1, select={"rule": "coverage", "alpha": 2.0}, gamma=0.2)
    whole = profile(first, reducer(2), WITHDRAW, importance={"reduce": "max", "heads": [0, 2]})
    assert parse_profile(json.dumps(whole.to_dict())) == whole
    assert whole.to_dict()["reducers"][2] == {"layer": 5, "withdraw": True}
    assert (whole.layers, whole.num_segments, whole.segment_layers()) == ((2, 5), 3, (3, 3, 2))
    assert profile(reducer(-1)).selector.rule == "maxmin"  # type: ignore[union-attr]


def test_costs_by_hand() -> None:
    whole = profile(reducer(-1), reducer(3), WITHDRAW)
    counts = (100, 40, 0)
    assert layer_average(whole, counts) == (4 * 100 + 2 * 40) / 8
    assert cost(whole, counts, "final") == 40
    assert cost(whole, counts, "kv_bytes") == layer_average(whole, counts)

    def flops(visual: int) -> float:
        return (visual + 88) * (1 + (visual + 88) / 640)

    assert mean_layer_flops(whole, counts) == pytest.approx((4 * flops(100) + 2 * flops(40) + 2 * flops(0)) / 8)
    assert flops_share(whole, counts) == pytest.approx(mean_layer_flops(whole, counts) / flops(576))
    assert cost(profile(reducer(-1)), (77,), "flops") == pytest.approx(77)


@given(
    tokens=st.integers(1, 575),
    measure=st.sampled_from(["final", "layer_average", "kv_bytes", "flops"]),
    inside=st.sampled_from([(), (2,), (1, 3)]),
    withdraws=st.booleans(),
)
def test_a_budget_is_met_by_its_own_measure(
    tokens: int, measure: str, inside: tuple[int, ...], withdraws: bool
) -> None:
    reducers = [reducer(-1, 0.7), *(reducer(layer) for layer in inside), *([WITHDRAW] if withdraws else [])]
    whole = profile(*reducers, measure=measure, tokens=tokens)
    counts = kept_counts(whole)
    assert all(a >= b for a, b in zip((576, *counts), counts, strict=False))
    assert (counts[-1] == 0) == withdraws
    most = cost(whole, [576] * (len(counts) - withdraws) + [0] * withdraws, measure)  # type: ignore[arg-type]
    # Rounded to whole tokens, and never below one.
    assert cost(whole, counts, measure) == pytest.approx(min(tokens, most), abs=1.5)  # type: ignore[arg-type]


def test_a_withdrawal_alone() -> None:
    alone = profile(WITHDRAW, measure="final")
    assert kept_counts(alone) == (0,)
    assert kept_counts(alone, 576) == (576,)
    by_cost = profile(WITHDRAW)
    assert kept_counts(by_cost, 432) == (0,)
    with pytest.raises(BudgetError, match="only withdraws, which leaves 432"):
        kept_counts(by_cost, 64)


def test_reducers_inside_set_the_floor_and_one_before_has_none() -> None:
    with pytest.raises(BudgetError, match="cannot go below 216"):
        kept_counts(profile(reducer(2)), 200)
    assert layer_average(profile(reducer(-1)), kept_counts(profile(reducer(-1)), 5)) == 5


@given(budget=st.integers(1, 600), block=st.sampled_from([1, 16, 32]), withdraws=st.booleans())
def test_plans_start_from_what_enters_the_decoder(budget: int, block: int, withdraws: bool) -> None:
    whole = profile(reducer(-1), reducer(3), *([WITHDRAW] if withdraws else []))
    planner = Planner(whole, block=block)
    entering = planner.image_tokens(budget)
    assert entering % block == 0
    plan = planner.plan([0] * (entering + 20), [ImageSpan(3, entering)], budget)
    assert plan.kept[0] == planner.counts(budget)
    assert (plan.kept[0][-1] == 0) == (withdraws and budget < 576)
    assert all((entering - kept) % block == 0 for kept in plan.kept[0])
    last = planner.plan([0] * (entering + 3), [ImageSpan(3, entering)], budget)
    assert last.kept[0][-1] >= 1  # the sampler reads the prompt's last token


def test_alone_counts_are_exact_and_a_resized_picture_is_a_square() -> None:
    assert Planner(profile(reducer(-1)), block=32).counts(77) == (77,)
    assert Planner(profile(reducer(-1, select={"rule": "resize"})), block=32).counts(77) == (64,)


def test_scaled_and_upgraded() -> None:
    scaled = scale_to_model(profile(reducer(-1), reducer(3), WITHDRAW, schedules={"64": [96, 32, 0]}), 32, 144)
    assert ([r.layer for r in scaled.reducers], scaled.schedules) == ([-1, 15, 23], {"16": (24, 8, 0)})
    old = profiles.load("sparsevlm-v2-llava-1.5-7b").to_dict()
    old["schema"] = "eos-profile/1"
    old["importance"].pop("window", None)
    for part, name in (("importance", "reduce"), ("operator", "aggregate")):
        old[part].pop(name, None)
    first = parse_profile(old)
    new = upgrade(first)
    assert (new.schema_, first.window, new.window, upgrade(first, "turn").window) == (
        *("eos-profile/2", "prompt", "prompt"),
        "turn",
    )
    assert kept_counts(new, 64) == kept_counts(first, 64)


def test_the_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "theta.json"
    file.write_text(json.dumps(data(reducer(-1), reducer(3), WITHDRAW)))
    assert main(["profile", "show", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "before the decoder: keeps " in shown
    assert "after layer 5: withdraws what is left" in shown
    assert "layer average 63.8, visual KV 11.1% of stock's" in shown
    argv = ["plan", "--compare", f"{file},embedded-eos", "--at", "64", "--model", "embedded", "--exact-counts"]
    assert main(argv) == 0
    first, second = capsys.readouterr().out.splitlines()[2:]
    assert first.split()[0].startswith("6")
    assert "cannot go below" in second
    assert main(["profile", "upgrade", str(file)]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == "eos-profile/2"
