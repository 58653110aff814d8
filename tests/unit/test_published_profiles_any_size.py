"""The shipped profiles for models that take images of any size: recipes, counts, and that they are marked untested."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli_runs import output, refusal

from eos_vllm import profiles
from eos_vllm.analysis.comparison import compare
from eos_vllm.core.budget import Share, eq11_counts, kept_counts, kept_of_selected, layer_average
from eos_vllm.core.plan import Planner
from eos_vllm.core.profile import Withdrawal
from eos_vllm.models.geometry import geometry
from eos_vllm.serving.hosts.host import check_rows_selector

# What of a published config.json the geometry reads.
TEXT_7B: dict[str, Any] = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
}
MISTRAL_7B = {"model_type": "mistral", "vocab_size": 32064, "max_position_embeddings": 32768}
QWEN3_8B = TEXT_7B | {
    "model_type": "qwen3_vl_text",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
}
CONFIGS: dict[str, dict[str, Any]] = {
    # Qwen2.5-VL was published with its language model's sizes beside everything else.
    "qwen2.5-vl-7b": {"model_type": "qwen2_5_vl", **TEXT_7B},
    "qwen3-vl-8b": {"model_type": "qwen3_vl", "text_config": QWEN3_8B},
    "llava-next-mistral-7b": {"model_type": "llava_next", "text_config": MISTRAL_7B},
    "llava-onevision-7b": {"model_type": "llava_onevision", "text_config": {"model_type": "qwen2", **TEXT_7B}},
}
# Profile to the counts that it leaves of an image of 1000 tokens, and to its layer average.
COUNTS: dict[str, tuple[tuple[int, ...], float]] = {
    "fastv-qwen2.5-vl-7b": ((500,), (2 * 1000 + 26 * 500) / 28),
    "fastv-qwen3-vl-8b": ((500,), (2 * 1000 + 34 * 500) / 36),
    "fastv-llava-next-mistral-7b": ((500,), (2 * 1000 + 30 * 500) / 32),
    "fastv-llava-onevision-7b": ((500,), (2 * 1000 + 26 * 500) / 28),
    "divprune-qwen2.5-vl-7b": ((250,), 250),
    "divprune-qwen3-vl-8b": ((222,), 222),
    "divprune-llava-next-mistral-7b": ((98,), 98),
    "divprune-llava-onevision-7b": ((250,), 250),
    "pyramiddrop-llava-next-mistral-7b": ((500, 250, 125), 8 * (1000 + 500 + 250 + 125) / 32),
    "two-stage-qwen2.5-vl-7b": ((389, 130), (13 * 389 + 15 * 130) / 28),
    "two-stage-qwen3-vl-8b": ((386, 129), (17 * 386 + 19 * 129) / 36),
}
NAMES = list(COUNTS)


def model_of(name: str) -> str:
    return next(model for model in CONFIGS if name.endswith(model))


def test_the_list_is_complete() -> None:
    found = [name for name in profiles.names() if profiles.load(name).model.visual_tokens is None]
    assert found == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_says_that_it_was_never_run_on_real_weights(name: str) -> None:
    description = profiles.load(name).description
    assert description.endswith("Never run on real weights: no accuracy is claimed.")
    if "qwen" in name:
        assert "(M-RoPE)" in description
    else:
        assert "learnt rows at the ends of grid rows" in description
    assert ("deepstack" in description) is ("qwen3" in name)


@pytest.mark.parametrize("name", NAMES)
def test_each_fits_its_model_and_costs_less_than_stock(name: str) -> None:
    profile, model = profiles.load(name), geometry(CONFIGS[model_of(name)])
    assert (profile.model.architecture, profile.model.num_decoder_layers) == (
        model.architecture,
        model.num_decoder_layers,
    )
    for tokens in (300, 1196, 2880):
        plan = compare(model, Planner(profile, example=tokens))
        assert plan.flops_ratio < 1
        assert plan.kv_ratio < 1


@pytest.mark.parametrize("name", NAMES)
def test_counts_of_an_image_of_a_thousand_tokens(name: str) -> None:
    profile = profiles.load(name)
    counts, average = COUNTS[name]
    assert kept_counts(profile, total=1000) == counts
    assert layer_average(profile, counts, 1000) == average
    assert profile.budget.share is not None
    # Rounding each count moves the average by half a token at most.
    assert average == pytest.approx(1000 * profile.budget.share, abs=0.5)
    assert all(abs(a - b) <= 1 for a, b in zip(eq11_counts(profile, 1000), counts, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_each_meets_the_shares_that_are_compared(name: str) -> None:
    profile = profiles.load(name)
    for share in (0.11, 0.22, 0.33):
        if name.startswith("pyramiddrop") and share < 0.25:
            continue  # its first quarter of layers carries all
        counts = kept_counts(profile, Share(share), 2880)
        assert layer_average(profile, counts, 2880) == pytest.approx(share * 2880, abs=0.5)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("two-stage")])
def test_our_own_starting_points_select_and_reduce_once_at_nearly_half_of_the_depth(name: str) -> None:
    profile = profiles.load(name)
    depth = profile.model.num_decoder_layers
    assert not any(isinstance(reducer, Withdrawal) for reducer in profile.reducers)
    assert (profile.layers[0] + 1) / depth == pytest.approx(0.45, abs=0.03)
    assert (profile.importance.queries, profile.window) == ("relevant_text", "turn")
    # The decoder sees what is left of the image, not its size.
    selected, reduced = kept_counts(profile, total=1000)
    assert kept_of_selected(profile, Share(0.25), selected) == (reduced,)


@pytest.mark.parametrize("name", NAMES)
def test_all_prune_by_published_rules_that_their_host_takes(name: str) -> None:
    profile = profiles.load(name)
    check_rows_selector(profile, SimpleNamespace())
    assert all(profile.params_of(reducer).is_identity for reducer in profile.reducers)
    method = name.removesuffix(f"-{model_of(name)}")
    if method in ("divprune", "two-stage"):
        assert profile.selector is not None
        assert profile.selector.model_dump() == {"rule": "maxmin", "features": "projected"}
    else:
        published = profiles.load(f"{method}-llava-1.5-7b")
        assert profile.importance == published.importance
        assert profile.layers == published.layers


@pytest.mark.parametrize("name", NAMES)
def test_profile_show_and_validate_take_an_image_of_a_thousand(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(profiles.path(name))
    kept = ", ".join(map(str, COUNTS[name][0]))
    assert f"{file}: valid, {name} keeps {kept} of 1000, " in output(capsys, "profile", "validate", file)
    shown = output(capsys, "profile", "show", name)
    assert "images of any size" in shown
    assert "counts are of an image of 1000 visual tokens" in shown


def test_plan_takes_a_models_config_and_an_images_tokens(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["qwen2.5-vl-7b"]))
    argv = ["plan", "--profile", "fastv-qwen2.5-vl-7b", "--model", str(tmp_path), "--visual-tokens", "1196"]
    lines = output(capsys, *argv, "--exact-counts").splitlines()
    assert "prompt   88 text + 1196 visual tokens (1 image)" in lines
    average = (2 * 1196 + 26 * 598) / 28
    assert any(f"keeps 598 per image; layer average {average:.1f}, " in line for line in lines)
    data = json.loads(output(capsys, *argv, "--retain", "25%", "--json"))
    # 230 of 1196; whole blocks of 16 are removed.
    assert data["plans"][0]["counts"] == [236]
    other = ["plan", "--profile", "fastv-qwen3-vl-8b", "--model", str(tmp_path), "--visual-tokens", "1196"]
    assert "profile.model.architecture='Qwen3VLForConditionalGeneration'" in refusal(capsys, *other)
