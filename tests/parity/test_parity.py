"""vLLM against the Hugging Face reference, token by token in float32."""

from typing import Any

import pytest

from eos_search.reference import ReferenceModel
from eos_vllm.models.images import sample_image
from support.engines import Ask, BlockWatch, answer_all, engine, free_blocks, mixed_asks, scheduler_of
from support.profiles import make_profile

PROFILES = {
    "all-parameters-final-relevant": make_profile(
        operator_values={"gamma": 0.3, "tau": 0.4, "theta": 0.1, "rho": 0.6, "nu": 0.35},
        importance={"queries": "relevant_text"},
    ),
    "frobenius-layer_average-all_text": make_profile(
        layers=(0, 2),
        operator_values={"gamma": 0.1, "tau": 0.2, "theta": -0.2, "rho": 0.2, "nu": 0.7, "discard": 0.6},
        operator={"gate_sharpness": 7.0, "norm": "frobenius"},
        importance={"queries": "all_text"},
        budget={"measure": "layer_average", "tokens": 200},
    ),
    "schedule-last_text": make_profile(
        layers=(1, 4, 6),
        schedules={"64": [300, 40, 7], "16": [66, 30, 17], "192": [300, 200, 118]},
        importance={"queries": "last_text"},
    ),
    "max-heads-debiased-means": make_profile(
        schema="eos-profile/2",
        layers=(1, 4),
        operator_values={"gamma": 0.4, "tau": 0.3},
        operator={"aggregate": "mean"},
        importance={
            "queries": "all_text",
            "window": "prompt",
            "reduce": "max",
            "heads": [0, 3],
            "debias": [1.0 + i / 576 for i in range(576)],
        },
    ),
    "prune-one-reducer": make_profile(layers=(2,), operator_values={"discard": 0.8}),
}
LOGPROB_BOUND = 1e-4


@pytest.fixture(scope="module")
def expected(tiny_model: Any) -> Any:
    """Reference answers, each computed once."""
    known: dict[Any, Any] = {}
    models: dict[str, ReferenceModel] = {}

    def answer(name: str, index: int, ask: Ask) -> Any:
        if name not in models:
            models[name] = ReferenceModel.from_pretrained(str(tiny_model), PROFILES[name], block=32)
        if (name, index) not in known:
            known[name, index] = models[name].generate(ask.prompt, ask.images, ask.max_tokens, ask.budget)
        return known[name, index]

    return answer


def budgeted(name: str) -> list[Ask]:
    """The mixed requests, without budgets that the profile's measure cannot reach."""
    asks = mixed_asks()
    if PROFILES[name].budget.measure == "layer_average":
        for ask in asks:
            ask.budget = None if ask.budget in (16, 64) else ask.budget
    return asks


@pytest.mark.parametrize("name", PROFILES)
def test_tokens_logprobs_and_blocks_equal_the_reference(name: str, tiny_model: Any, expected: Any) -> None:
    asks = budgeted(name)
    with engine(tiny_model, PROFILES[name]) as llm:
        free = free_blocks(llm)
        with BlockWatch(scheduler_of(llm)) as watch:
            answers = answer_all(llm, asks)
        assert free_blocks(llm) == free
        assert not scheduler_of(llm).plans
        assert sum(scheduler_of(llm).blocks_held()) == 0
        report = llm.collective_rpc("eos_report")[0]
        assert report["tokens_kept"] == scheduler_of(llm).counters.tokens_kept
    assert not watch.errors
    assert watch.reduced > 500
    assert watch.mixed_steps > 0
    for i, (ask, answer) in enumerate(zip(asks, answers, strict=True)):
        reference = expected(name, i, ask)
        assert answer.token_ids == reference.token_ids, f"request {i}"
        for token, logprob in answer.first_logprobs.items():
            assert abs(logprob - float(reference.logprobs[0, token])) <= LOGPROB_BOUND, f"request {i}"


def test_preempted_requests_answer_the_same(tiny_model: Any, expected: Any) -> None:
    name = "all-parameters-final-relevant"
    asks = budgeted(name)
    # Hardly more than one request of full length: several are admitted, and have to go as others grow.
    blocks = 4 * (1376 // 32) + 2
    with engine(tiny_model, PROFILES[name], max_model_len=1376, num_gpu_blocks_override=blocks) as llm:
        free = free_blocks(llm)
        with BlockWatch(scheduler_of(llm)) as watch:
            answers = answer_all(llm, asks)
        assert free_blocks(llm) == free
    assert watch.preemptions >= 2
    assert watch.reduced_preemptions >= 1  # with generated tokens, which the second prefill has to ignore
    assert not watch.errors
    for i, (ask, answer) in enumerate(zip(asks, answers, strict=True)):
        assert answer.token_ids == expected(name, i, ask).token_ids, f"request {i}"


def test_alone_as_in_a_batch(tiny_model: Any) -> None:
    name = "all-parameters-final-relevant"
    asks = budgeted(name)[:12]
    with engine(tiny_model, PROFILES[name]) as llm:
        together = answer_all(llm, asks)
        alone = [answer_all(llm, [ask])[0] for ask in asks]
    assert [a.token_ids for a in alone] == [a.token_ids for a in together]


def test_prompt_that_ends_in_an_image(tiny_model: Any) -> None:
    name = "all-parameters-final-relevant"
    asks = [
        Ask("USER: look <image>", [sample_image(900)]),
        Ask("USER: <image><image>", [sample_image(901), sample_image(902)], budget=1),
    ]
    reference = ReferenceModel.from_pretrained(str(tiny_model), PROFILES[name], block=32)
    with engine(tiny_model, PROFILES[name]) as llm:
        answers = answer_all(llm, asks)
    for ask, answer in zip(asks, answers, strict=True):
        want = reference.generate(ask.prompt, ask.images, ask.max_tokens, ask.budget)
        last = len(want.prefill.kept) and want.prefill.kept[-1][-1]
        assert int(last) == want.prefill.plan.prompt_length - 1
        assert answer.token_ids == want.token_ids


def test_keeping_all_tokens_is_stock_vllm(tiny_model: Any) -> None:
    asks = mixed_asks(12)
    for ask in asks:
        ask.budget = None
    with engine(tiny_model, None) as llm:
        stock = answer_all(llm, asks)
    with engine(tiny_model, make_profile(), retain=576) as llm:
        ours = answer_all(llm, asks)
    assert [a.token_ids for a in ours] == [a.token_ids for a in stock]
    for a, b in zip(ours, stock, strict=True):
        assert a.first_logprobs == pytest.approx(b.first_logprobs, abs=LOGPROB_BOUND)


def test_a_reduction_changes_the_answers(tiny_model: Any) -> None:
    """Guards the tests above against profiles that do nothing."""
    asks = [ask for ask in mixed_asks(9) if ask.images]
    for ask in asks:
        ask.budget = None
    with engine(tiny_model, make_profile()) as llm:
        whole = answer_all(llm, [Ask(a.prompt, a.images, 576) for a in asks])
        reduced = answer_all(llm, [Ask(a.prompt, a.images, 16) for a in asks])
    assert sum(a.token_ids != b.token_ids for a, b in zip(whole, reduced, strict=True)) >= len(asks) - 1
