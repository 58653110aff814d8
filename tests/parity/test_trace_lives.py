"""What traces cost and leave behind: nothing for other requests, nothing after an abort, a bounded number at most."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eos_vllm.models.images import sample_image
from eos_vllm.serving.trace import Recorder
from eos_vllm.serving.trace_book import MOST_REQUESTS, TraceBook
from support.engines import Ask, answer_all, engine, params_of, prompt_of, scheduler_of
from support.profiles import make_profile
from support.traces import answer_traced, recorder_of, trace_of

PROFILE = make_profile(operator_values={"gamma": 0.3, "tau": 0.4})
ASK = Ask("USER: <image>\nWhat is it? ASSISTANT:", [sample_image(80)], max_tokens=12)


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[Any]:
    with engine(tiny_model, PROFILE, page=True) as running:
        yield running


def holds_nothing(llm: Any) -> bool:
    """Neither scheduler nor worker holds a trace, nor owes one."""
    book, recorder = scheduler_of(llm).traces, recorder_of(llm)
    assert book.size == 0
    return not (book.held or book.active or book.forget or recorder.reductions or recorder.selections)


def test_without_the_flag_there_is_nobody_to_call(tiny_model: Path) -> None:
    with engine(tiny_model, PROFILE) as plain:
        assert recorder_of(plain) is None
        assert scheduler_of(plain).traces is None


def test_requests_that_are_not_traced_call_nobody(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted over all steps of prefill and decode: with the flag, and none that is traced, no method is called."""
    calls: list[str] = []

    def counted(owner: type, name: str) -> None:
        method = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: (calls.append(name), method(*args, **kwargs))[1])

    for name in ("begin", "end", "lay_out", "reduced", "selected", "resized", "take"):
        counted(Recorder, name)
    counted(TraceBook, "announce")
    llm.reset_prefix_cache()
    asks = [Ask(ASK.prompt, [sample_image(81 + i)], max_tokens=8) for i in range(4)]
    answer_all(llm, asks)
    assert calls == []
    llm.reset_prefix_cache()
    answer_traced(llm, asks[:1])
    assert {"announce", "begin", "lay_out", "reduced", "end", "take"} <= set(calls)
    # In decode steps of the traced request the worker is not called either: the one step with its image, and reading.
    assert calls.count("begin") == calls.count("lay_out") == calls.count("take") == 1


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_an_aborted_request_leaves_nothing(steps: int, llm: Any) -> None:
    llm.reset_prefix_cache()
    llm.llm_engine.add_request("gone", prompt_of(ASK), params_of(ASK, eos_trace=True))
    for _ in range(steps):
        llm.llm_engine.step()
    assert bool(recorder_of(llm).reductions) == (steps > 0)
    llm.llm_engine.abort_request(["gone"])
    llm.llm_engine.step()  # which tells the worker
    assert trace_of(llm, "gone") is None
    assert holds_nothing(llm)


def test_a_request_under_way_cannot_be_read(llm: Any) -> None:
    llm.reset_prefix_cache()
    llm.llm_engine.add_request("early", prompt_of(ASK), params_of(ASK, eos_trace=True))
    llm.llm_engine.step()
    assert trace_of(llm, "early") is None
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    trace = trace_of(llm, "early")
    assert trace is not None
    assert len(trace.images[0].reducers) == 3
    assert holds_nothing(llm)


def test_a_stop_string_ends_a_request_and_aborts_none(llm: Any) -> None:
    """vLLM's front end finds it, and aborts the request in the engine."""
    (answer,) = llm.generate([prompt_of(ASK)], [params_of(ASK)], use_tqdm=False)
    params = params_of(ASK, eos_trace=True)
    params.stop = [answer.outputs[0].text[3]]
    (out,) = llm.generate([prompt_of(ASK)], [params], use_tqdm=False)
    assert out.outputs[0].finish_reason == "stop"
    assert trace_of(llm, out.request_id) is not None


def test_of_several_answers_the_first_is_traced(llm: Any) -> None:
    llm.reset_prefix_cache()
    params = params_of(ASK, eos_trace=True)
    params.n, params.temperature = 3, 0.7
    (out,) = llm.generate([prompt_of(ASK)], [params], use_tqdm=False)
    assert len(out.outputs) == 3
    trace = trace_of(llm, out.request_id)
    assert trace is not None
    assert len(trace.images[0].reducers) == 3
    assert holds_nothing(llm)


def test_hundreds_of_traces_that_nobody_reads(llm: Any) -> None:
    llm.reset_prefix_cache()
    asks = [Ask(f"USER: <image>\nNumber {i}? ASSISTANT:", [sample_image(i % 3)], max_tokens=1) for i in range(200)]
    outputs = llm.generate([prompt_of(a) for a in asks], [params_of(a, eos_trace=True) for a in asks], use_tqdm=False)
    book, recorder = scheduler_of(llm).traces, recorder_of(llm)
    assert len(book.held) == MOST_REQUESTS
    assert not book.active
    answer_all(llm, [ASK])  # carries what may go
    assert set(recorder.reductions) == {entry.request_id for entry in book.held.values()}
    traces = [trace_of(llm, out.request_id) for out in outputs]
    assert [trace is not None for trace in traces] == [False] * (200 - MOST_REQUESTS) + [True] * MOST_REQUESTS
    assert holds_nothing(llm)
