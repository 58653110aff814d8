"""Every family's tiny model in vLLM, stock and reduced, against its own Hugging Face model.

Requests are of mixed sizes, with one image, two, or none, in one turn or two (:mod:`support.families.asks`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from eos_vllm.core.plan import RequestPlan
from eos_vllm.core.profile import Profile, parse_profile
from support.engines import Answer, Ask, answer_all, engine, free_blocks, marker_of, scheduler_of
from support.families import reference as reduced
from support.families.asks import family_asks
from support.families.build import DEPTH, FAMILIES, PATCH, SIDE, Family, write
from support.families.counts import expected_counts
from support.families.prompts import embed
from support.families.watching import PlanWatch, answer_with_preemptions

LOGPROB_BOUND = 1e-4
PRUNE = {"gate": 1.0, "discard": 0.5, "gamma": 0.0, "tau": 0.5, "theta": 0.0, "rho": 0.0, "nu": 0.0}
MIX = {"gate": 1.0, "discard": 0.4, "gamma": 0.3, "tau": 0.4, "theta": 0.1, "rho": 0.6, "nu": 0.35}
# Reducers, query rule, and the server's own budget. Behind layer 0 and 2 stand Qwen3-VL's deepstack additions.
PROFILES: dict[str, tuple[list[dict[str, Any]], str, float]] = {
    "hybrid": ([{"layer": 0, **MIX}, {"layer": 2, **MIX}, {"layer": 4, **PRUNE}], "relevant_text", 0.2),
    "before": ([{"layer": -1, "select": {"rule": "maxmin"}, **PRUNE}], "relevant_text", 0.3),
    "both": (
        [{"layer": -1, "select": {"rule": "uniform"}, **MIX}, {"layer": 1, **MIX}, {"layer": 4, **PRUNE}],
        "all_text",
        0.2,
    ),
}
BUDGETS = (None, "50%", None, "10%", "100%")


@dataclass
class Case:
    """One family: its model, its requests, and what stock vLLM answers them."""

    name: str
    directory: Path
    asks: list[Ask]
    stock: list[Answer]

    @property
    def family(self) -> Family:
        return FAMILIES[self.name]

    def engine(self, profile: Profile | None, **settings: Any) -> Any:
        """Steps hold two of the largest images, and not all of the requests."""
        return engine(
            self.directory,
            profile,
            limit_mm_per_prompt=self.family.image_limits,
            enable_prefix_caching=True,
            max_num_batched_tokens=1536,
            **settings,
        )

    def profile(self, name: str) -> dict[str, Any]:
        """A profile's JSON."""
        reducers, queries, share = PROFILES[name]
        visual = (SIDE // PATCH) ** 2 if self.name in ("llava-llama", "llava-mistral", "llava-qwen2") else None
        model = {"architecture": self.family.architecture, "num_decoder_layers": DEPTH, "visual_tokens": visual}
        return {
            "schema": "eos-profile/2",
            "name": name,
            "model": model,
            "importance": {"queries": queries, "window": "turn"},
            "operator": {"gate_sharpness": 8.0, "norm": "token"},
            "reducers": reducers,
            "budget": {"measure": "final", "share": share, "minimum": 1},
        }


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    directory = write(request.param, tmp_path_factory.mktemp("families") / request.param)
    case = Case(request.param, directory, family_asks(request.param), [])
    with case.engine(None) as llm:
        case.stock = answer_all(llm, case.asks)
    return case


def hold(answer: Answer, want: reduced.Answer, which: str) -> None:
    """Prompt, tokens and first log-probabilities are the reference's."""
    assert answer.prompt_tokens == want.lengths[0], which
    assert answer.token_ids == want.token_ids, which
    for token, logprob in answer.first_logprobs.items():
        assert abs(logprob - float(want.first_logprobs[token])) <= LOGPROB_BOUND, which


def test_stock_vllm_is_transformers_and_so_is_the_reference(case: Case) -> None:
    model: Any = AutoModelForImageTextToText.from_pretrained(case.directory, dtype=torch.float32).eval()
    processor: Any = AutoProcessor.from_pretrained(case.directory)
    reference = reduced.Reference(case.directory, case.family.chat.image)
    for i, (ask, answer) in enumerate(zip(case.asks, case.stock, strict=True)):
        want = reference.generate(ask.prompt, ask.images, [], ask.max_tokens)
        hold(answer, want, f"request {i}")
        if case.family.mrope and i == len(case.asks) - 1:
            continue  # behind a last image transformers counts on row by row, vLLM from the largest of the three
        inputs = processor(text=[ask.prompt], images=ask.images or None, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=ask.max_tokens, do_sample=False)
        assert out[0, inputs["input_ids"].shape[1] :].tolist() == want.token_ids, f"request {i}"
    # Or a model that says one thing whatever it sees would pass.
    assert len({tuple(answer.token_ids) for answer in case.stock}) == len(case.asks)


@pytest.mark.parametrize("name", PROFILES)
def test_reduced_vllm_is_the_reference(case: Case, name: str) -> None:
    profile, asks = case.profile(name), [Ask(a.prompt, a.images, None, a.max_tokens) for a in case.asks]
    for i, ask in enumerate(asks):
        ask.budget = BUDGETS[i % len(BUDGETS)] if ask.images else None  # type: ignore[assignment]
    inside = name != "before"
    plans: list[RequestPlan | None] = []
    with case.engine(parse_profile(profile)) as llm:
        free = free_blocks(llm)
        if inside:
            with PlanWatch(scheduler_of(llm)) as watch:
                answers = answer_all(llm, asks)
                plans = list(watch.plans.values())
                again, forced = answer_with_preemptions(llm, asks, seed=1)
            assert not watch.errors
            assert watch.chunks
            assert watch.reduced
        else:
            answers = answer_all(llm, asks)
            again, forced = answer_with_preemptions(llm, asks, seed=1)
        assert free_blocks(llm) == free
        reference = reduced.Reference(case.directory, case.family.chat.image, profile, marker_of(llm))
    assert forced
    assert sum(answer.cached_tokens for answer in again)
    changed = 0
    for i, (ask, answer, stock) in enumerate(zip(asks, answers, case.stock, strict=True)):
        share = PROFILES[name][2] if ask.budget is None else float(str(ask.budget).removesuffix("%")) / 100
        prompt = embed(reference.model, reference.processor, reference.image_text, ask.prompt, ask.images)
        sizes = [
            (end - start, 0 if name != "hybrid" else len(newlines))
            for (start, end), newlines in zip(prompt.spans, prompt.newlines, strict=True)
        ]
        counts = [expected_counts(profile, share, length - text, text) for length, text in sizes]
        if inside and ask.images:
            hold_plan(plans[i], counts, [text for _, text in sizes], name == "both")
        want = reference.generate(ask.prompt, ask.images, counts, ask.max_tokens)
        hold(answer, want, f"request {i}")
        assert again[i].token_ids == want.token_ids, f"request {i}, preempted"
        changed += want.token_ids != stock.token_ids
    assert changed >= 10  # guards against profiles that do nothing


def hold_plan(plan: RequestPlan | None, counts: list[list[int]], text: list[int], before: bool) -> None:
    """The plan is what the documented rounding rule says."""
    if plan is not None:
        kept = [[n - t for n in k[not before :]] for k, t in zip(plan.kept, text, strict=True)]
        assert kept == counts
