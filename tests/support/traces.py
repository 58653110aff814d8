"""Traces of in-process engines, and what they should hold by the Hugging Face reference."""

import json
from typing import Any

from eos_search.reference import Prefill, ReferenceModel
from eos_vllm.serving.trace_book import eos_trace
from eos_vllm.serving.trace_document import Outline, Record, Trace, build_trace
from support.engines import Ask, params_of, prompt_of


def recorder_of(llm: Any) -> Any:
    """The recorder of the engine's one worker."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    return worker.model_runner.get_model().eos_recorder


def trace_of(llm: Any, name: str) -> Trace | None:
    """A request's trace, as a front end reads it: all that travels is plain data."""
    answer = json.loads(json.dumps(eos_trace(llm.llm_engine.engine_core.engine_core, name)))
    if answer is None:
        return None
    records = [Record.model_validate(record) for record in answer["records"]]
    return build_trace(Outline.model_validate(answer["outline"]), records)


def answer_traced(llm: Any, asks: list[Ask]) -> list[tuple[Any, Trace]]:
    """All answers of one call, as vLLM gives them, and their traces."""
    params = [params_of(ask, eos_trace=True) for ask in asks]
    found = []
    for out in llm.generate([prompt_of(ask) for ask in asks], params, use_tqdm=False):
        trace = trace_of(llm, out.request_id)
        assert trace is not None, out.request_id
        assert trace.id == out.request_id
        assert trace_of(llm, out.request_id) is None  # read once
        found.append((out, trace))
    return found


def reference_kept(want: Prefill) -> list[list[list[int]]]:
    """By image, then reducer within the decoder: places left of those that entered it."""
    kept = [positions.tolist() for positions in want.kept]
    return [[[p - span.start for p in left if span.start <= p < span.end] for left in kept] for span in want.plan.spans]


def hold_inside(trace: Trace, ask: Ask, reference: ReferenceModel, entered: list[list[int]] | None = None) -> Prefill:
    """Every kept index of reducers within the decoder is the reference's.

    Args:
        trace: of a request that reduced its images itself.
        ask: the request.
        reference: of the profile.
        entered: by image, the tokens that a selection before the decoder left.
    """
    want = reference.generate(ask.prompt, ask.images, 1, ask.budget).prefill
    layers = list(reference.planner.profile.layers)
    assert len(trace.images) == len(ask.images)
    kept = reference_kept(want) if want.kept else []
    for i, image in enumerate(trace.images):
        inside = [reducer for reducer in image.reducers if reducer.layer >= 0]
        assert [reducer.layer for reducer in inside] == layers
        assert not image.reused
        left = list(range(image.tokens)) if entered is None else entered[i]
        first = left
        for r, reducer in enumerate(inside):
            assert reducer.entered == left, (i, r)
            left = [first[place] for place in kept[i][r]] if kept else left
            assert reducer.kept == left, (i, r)
    return want
