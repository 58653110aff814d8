"""Every family's tiny model in vLLM, stock and reduced, against its own Hugging Face model.

Requests are of mixed sizes, with one image, two, or none, in one turn or two (:mod:`support.families.asks`).
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from eos_vllm.core.plan import RequestPlan
from eos_vllm.core.profile import parse_profile
from support.engines import Answer, Ask, answer_all, engine, free_blocks, marker_of, scheduler_of
from support.families import reference
from support.families.asks import family_asks
from support.families.build import DEPTH, FAMILIES, Family, write
from support.families.counts import expected_counts
from support.families.prompts import HfModel, Prompt
from support.families.reference import Reference
from support.families.watching import PlanWatch, answer_with_preemptions

LOGPROB_BOUND = 1e-4
PRUNE = {"gate": 1.0, "discard": 0.5, "gamma": 0.0, "tau": 0.5, "theta": 0.0, "rho": 0.0, "nu": 0.0}
MIX = {"gate": 1.0, "discard": 0.4, "gamma": 0.3, "tau": 0.4, "theta": 0.1, "rho": 0.6, "nu": 0.35}
UNIFORM = {"layer": -1, "select": {"rule": "uniform"}, **MIX}
MAXMIN = {"layer": -1, "select": {"rule": "maxmin"}, **PRUNE}
# Reducers, query rule, and the server's own budget. Layers 0 and 2 are among those that Qwen3-VL's tower adds to.
PROFILES: dict[str, tuple[list[dict[str, Any]], str, float]] = {
    "inside": ([{"layer": 0, **MIX}, {"layer": 2, **MIX}, {"layer": 4, **PRUNE}], "relevant_text", 0.2),
    "before": ([MAXMIN], "relevant_text", 0.3),
    "both": ([UNIFORM, {"layer": 1, **MIX}, {"layer": 4, **PRUNE}], "last_text", 0.2),
}
BUDGETS = (None, "50%", None, "10%", "100%")  # of requests, in turn


@dataclass
class Case:
    """One family: its tiny model, requests, what transformers gives the decoder for each, and stock vLLM's answers."""

    family: Family
    directory: Path
    hf: HfModel
    asks: list[Ask]
    prompts: list[Prompt]
    stock: list[Answer]

    def profile(self, name: str, **changes: Any) -> dict[str, Any]:
        """A profile's JSON; images of one size are withdrawn by its last reducer."""
        reducers, queries, share = PROFILES[name]
        if self.family.visual_tokens is not None and reducers[-1]["layer"] == 4:
            reducers = [*reducers[:-1], {"layer": 4, "withdraw": True}]
        return {
            "schema": "eos-profile/2",
            "name": name,
            "model": {
                "architecture": self.family.architecture,
                "num_decoder_layers": DEPTH,
                "visual_tokens": self.family.visual_tokens,
            },
            "importance": {"queries": queries, "window": "turn"},
            "operator": {"gate_sharpness": 8.0, "norm": "token"},
            "reducers": reducers,
            "budget": {"measure": "final", "share": share, "minimum": 1},
            **changes,
        }

    def text_places(self, prompt: Prompt, profile: dict[str, Any]) -> list[tuple[int, ...]]:
        """Places of each image that are text: newlines, unless a selection before the decoder had them all."""
        return [() if profile["reducers"][0]["layer"] == -1 else rows for rows in prompt.newlines]

    def counts(self, ask: Ask, prompt: Prompt, profile: dict[str, Any]) -> list[list[int]]:
        """Visual tokens of each image left by each reducer."""
        share = profile["budget"]["share"] if ask.budget is None else float(str(ask.budget).removesuffix("%")) / 100
        counts = []
        for (start, end), text in zip(prompt.spans, self.text_places(prompt, profile), strict=True):
            is_last = end == len(prompt.tokens.ids) and end - start - 1 not in text
            counts.append(expected_counts(profile, share, end - start - len(text), len(text), is_last))
        return counts


def start(directory: Path, family: Family, profile: dict[str, Any] | None) -> Any:
    """An engine whose steps hold two of the largest images and not all of the requests."""
    return engine(
        directory,
        None if profile is None else parse_profile(profile),
        limit_mm_per_prompt=family.image_limits,
        enable_prefix_caching=True,
        max_num_batched_tokens=640 if family.mrope else 1536,
    )


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, asks = FAMILIES[request.param], family_asks(request.param)
    directory = write(request.param, tmp_path_factory.mktemp("families") / request.param)
    with start(directory, family, None) as llm:
        stock = answer_all(llm, asks)
    hf = HfModel(directory, family.chat.image)
    return Case(family, directory, hf, asks, [hf.embed(ask.prompt, ask.images) for ask in asks], stock)


def hold(answer: Answer, want: reference.Answer, which: str) -> None:
    """Prompt, tokens and first log-probabilities are the reference's."""
    assert answer.prompt_tokens == want.lengths[0], which
    assert answer.token_ids == want.token_ids, which
    for token, logprob in answer.first_logprobs.items():
        assert abs(logprob - float(want.first_logprobs[token])) <= LOGPROB_BOUND, which


def hold_plan(plan: RequestPlan | None, counts: list[list[int]], text: list[tuple[int, ...]], selects: bool) -> None:
    """What is kept of each image is what the documented rule says, and what is text is where the model has newlines."""
    if plan is None:  # nothing is reduced
        inside = [of[selects:] for of in counts]
        assert all(len(set(of)) == 1 for of in inside)
        return
    assert [span.text for span in plan.spans] == text
    kept = [[n - len(places) for n in of[not selects :]] for of, places in zip(plan.kept, text, strict=True)]
    assert kept == counts


def test_stock_vllm_is_transformers_and_so_is_the_reference(case: Case) -> None:
    unreduced = Reference(case.hf)
    for i, (ask, prompt, answer) in enumerate(zip(case.asks, case.prompts, case.stock, strict=True)):
        want = unreduced.generate(prompt, [], ask.max_tokens)
        hold(answer, want, f"request {i}")
        if case.family.mrope and i == len(case.asks) - 1:
            continue  # behind a last image transformers counts on row by row, vLLM from the largest of the three
        inputs = case.hf.process(ask.prompt, ask.images)
        out = case.hf.model.generate(**inputs, max_new_tokens=ask.max_tokens, do_sample=False)
        assert out[0, len(prompt.tokens.ids) :].tolist() == want.token_ids, f"request {i}"
    # Or a model that says one thing whatever it sees would pass.
    assert len({tuple(answer.token_ids) for answer in case.stock}) == len(case.asks)


@pytest.mark.parametrize("name", PROFILES)
def test_reduced_vllm_is_the_reference(case: Case, name: str) -> None:
    profile, selects = case.profile(name), PROFILES[name][0][0]["layer"] == -1
    budgets: list[Any] = [BUDGETS[i % len(BUDGETS)] if ask.images else None for i, ask in enumerate(case.asks)]
    asks = [replace(ask, budget=budget) for ask, budget in zip(case.asks, budgets, strict=True)]
    plans: list[RequestPlan | None] = []
    with start(case.directory, case.family, profile) as llm:
        free = free_blocks(llm)
        if name == "before":  # vLLM's own scheduler and blocks
            answers = answer_all(llm, asks)
            again, forced = answer_with_preemptions(llm, asks, seed=1)
        else:
            with PlanWatch(scheduler_of(llm)) as watch:
                answers = answer_all(llm, asks)
                plans = list(watch.plans.values())
                again, forced = answer_with_preemptions(llm, asks, seed=1)
            assert not watch.errors
            assert watch.reduced
            assert watch.chunks
        assert free_blocks(llm) == free
        assert llm.collective_rpc("eos_report")[0]["lost"] == []
        expected = Reference(case.hf, profile, marker_of(llm))
    assert forced
    assert any(answer.cached_tokens for answer in again)
    changed = 0
    for i, (ask, prompt, answer) in enumerate(zip(asks, case.prompts, answers, strict=True)):
        counts = case.counts(ask, prompt, profile)
        if plans:
            hold_plan(plans[i], counts, case.text_places(prompt, profile), selects)
        want = expected.generate(prompt, counts, ask.max_tokens)
        hold(answer, want, f"request {i}")
        assert again[i].token_ids == want.token_ids, f"request {i}, found in the cache or preempted"
        changed += want.token_ids != case.stock[i].token_ids
    # Guards against profiles that do nothing. Small images lose no whole block, some budgets keep all.
    assert changed >= 5


def test_keeping_all_through_the_reducing_pass_is_stock(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Needs no second opinion: were positions, deepstack rows or newlines wrong there, answers would differ."""
    monkeypatch.setattr(RequestPlan, "reduces", property(lambda plan: bool(plan.spans)))
    profile = case.profile("inside", budget={"measure": "final", "share": 1.0})
    with start(case.directory, case.family, profile) as llm:
        answers = answer_all(llm, case.asks)
        report = llm.collective_rpc("eos_report")[0]
    assert report["images"] == sum(len(ask.images) for ask in case.asks)
    for i, (answer, stock) in enumerate(zip(answers, case.stock, strict=True)):
        assert answer.token_ids == stock.token_ids, f"request {i}"
        assert answer.first_logprobs == pytest.approx(stock.first_logprobs, abs=LOGPROB_BOUND), f"request {i}"
