"""Parts of traces without an engine: the document, what a request may say, the recorder, and the scheduler's book."""

import asyncio
import json
import threading
import tracemalloc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request, RequestStatus

from eos_vllm.core.operator import OperatorParams
from eos_vllm.core.plan import Planner
from eos_vllm.serving import trace_endpoint
from eos_vllm.serving.batch import StepEntry
from eos_vllm.serving.endpoints import EosEndpoints
from eos_vllm.serving.hosts import mrope
from eos_vllm.serving.hosts.host import Grid
from eos_vllm.serving.request_checks import check_trace_of_body
from eos_vllm.serving.trace import TRACED, Recorder, _hold
from eos_vllm.serving.trace_book import MOST_BYTES, MOST_REQUESTS, TraceBook, eos_trace
from eos_vllm.serving.trace_document import BEFORE, ImageOutline, Outline, Record, boxes_of, build_trace
from eos_vllm.serving.trace_requests import TRACE_FIELD, check_trace, name_of, write_name
from support.profiles import make_profile

PLANNER = Planner(make_profile(), block=32)
TEXT = 24


def outline(counts: list[int], selects: bool = False, covered: bool = False) -> Outline:
    """Of a request with one image of six tokens."""
    image = ImageOutline(tokens=6, rows=2, columns=3, counts=counts, end=9, covered=covered)
    return Outline(id="a", budget=None, selects=selects, layers=[1, 4][: len(counts) - 1], images=[image])


def test_indices_are_the_image_s_own() -> None:
    """Each reducer chooses among what the one before it left."""
    records = [
        Record(image=0, reducer=BEFORE, chosen=[0, 2, 3, 5], importance=[0.1] * 6),
        Record(image=0, reducer=0, chosen=[1, 3], importance=[0.1, 0.4, 0.2, 0.3], share=0.5, assigned=[1, 0]),
        Record(image=0, reducer=1, chosen=[0]),
    ]
    (image,) = build_trace(outline([4, 2, 1], selects=True), records).images
    before, first, second = image.reducers
    assert (before.layer, before.entered, before.kept) == (-1, [0, 1, 2, 3, 4, 5], [0, 2, 3, 5])
    assert (first.layer, first.entered, first.kept, first.assigned) == (1, [0, 2, 3, 5], [2, 5], [5, 2])
    assert (second.layer, second.entered, second.kept) == (4, [2, 5], [2])
    assert not image.reused


def test_stages_send_their_own_reducers_in_any_order() -> None:
    records = [Record(image=0, reducer=1, chosen=[1]), Record(image=0, reducer=0, chosen=[0, 4])]
    (image,) = build_trace(outline([6, 2, 1]), records).images
    assert [reducer.kept for reducer in image.reducers] == [[0, 4], [4]]


def test_what_needs_no_record() -> None:
    (image,) = build_trace(outline([6, 6, 0]), []).images
    assert [(len(r.entered), len(r.kept)) for r in image.reducers] == [(6, 6), (6, 0)]


def test_a_reused_image_has_what_is_remembered() -> None:
    assert build_trace(outline([6, 3, 2], covered=True), []).images[0].reducers == []
    remembered = Record(image=0, reducer=BEFORE, chosen=[1, 4], remembered=True)
    (image,) = build_trace(outline([2, 1, 1], selects=True, covered=True), [remembered]).images
    assert image.reused
    assert [reducer.kept for reducer in image.reducers] == [[1, 4]]
    (alone,) = build_trace(outline([2], selects=True), [remembered]).images
    assert alone.reused


def test_boxes_of_an_image_with_tiles() -> None:
    """A copy of 1, then a grid of 2 rows and 2 columns; ends of rows are text, or count as visual tokens."""
    whole = (0.0, 0.0, 1.0, 1.0)
    upper, lower = [(0.0, 0.0, 0.5, 0.5), (0.5, 0.0, 1.0, 0.5)], [(0.0, 0.5, 0.5, 1.0), (0.5, 0.5, 1.0, 1.0)]
    assert boxes_of(5, 1, 2, 2) == [whole, *upper, *lower]
    assert boxes_of(7, 1, 2, 2) == [whole, *upper, None, *lower, None]
    assert boxes_of(6, 1, 2, 2) is None
    tiled = ImageOutline(tokens=5, tiles=(1, 2, 2), counts=[5], end=9)
    (image,) = build_trace(Outline(id="a", budget=None, selects=False, layers=[], images=[tiled]), []).images
    assert (image.boxes, image.cropped, image.rows) == ([whole, *upper, *lower], False, None)


def test_a_record_that_is_missing_is_no_trace() -> None:
    with pytest.raises(RuntimeError, match="nobody recorded"):
        build_trace(outline([6, 3, 2]), [Record(image=0, reducer=0, chosen=[0, 1, 2])])


def test_the_event_loop_does_none_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation, building and encoding take milliseconds, for which no other request would stream."""
    threads = []

    def noted(*args: Any) -> Any:
        threads.append(threading.current_thread())
        return build_trace(*args)

    class Engine:
        async def call_utility_all_async(self, method: str, name: str) -> list[Any]:
            return [{"outline": outline([6, 6, 0]).model_dump(), "records": []}]

    monkeypatch.setattr(trace_endpoint, "build_trace", noted)
    found = asyncio.run(trace_endpoint.trace_of(SimpleNamespace(engine_core=Engine()), "a"))
    assert isinstance(found, bytes)
    assert json.loads(found)["images"][0]["tokens"] == 6
    assert threading.main_thread() not in threads
    assert len(threads) == 1


@pytest.mark.parametrize("value", ["yes", 2, [1], None, "true", 0.5])
def test_a_wish_that_is_none(value: Any) -> None:
    with pytest.raises(VLLMValidationError, match=TRACE_FIELD):
        check_trace({TRACE_FIELD: value}, page=True)


def test_a_server_without_a_page_keeps_no_traces() -> None:
    with pytest.raises(VLLMValidationError, match="--eos-page"):
        check_trace({TRACE_FIELD: True}, page=False)
    assert not check_trace({"eos_retain": 64}, page=False)
    assert not check_trace(None, page=False)
    wishes = [check_trace({TRACE_FIELD: wish}, page=True) for wish in (True, 1, 1.0, False, 0)]
    assert wishes == [True] * 3 + [False] * 2


def test_a_beam_search_would_lose_the_wish() -> None:
    body = SimpleNamespace(vllm_xargs={TRACE_FIELD: 1}, use_beam_search=True)
    with pytest.raises(VLLMValidationError, match="beam search"):
        check_trace_of_body(body, page=True)
    body.vllm_xargs = {TRACE_FIELD: 0}
    check_trace_of_body(body, page=True)


def test_the_response_s_id_is_the_name() -> None:
    asked = SamplingParams(extra_args={TRACE_FIELD: 1, "eos_retain": 64})
    request = SimpleNamespace(sampling_params=asked)
    assert name_of(asked) is None  # no front end has looked at it
    write_name(request, "chatcmpl-7")
    assert name_of(request.sampling_params) == "chatcmpl-7"
    assert request.sampling_params.extra_args["eos_retain"] == 64
    refused = SimpleNamespace(sampling_params=SamplingParams(extra_args={TRACE_FIELD: False}))
    write_name(refused, "chatcmpl-8")
    assert name_of(refused.sampling_params) is None


def test_shares_and_assignments_by_the_letter() -> None:
    """One discarded token at a time, in plain Python."""
    torch.manual_seed(0)
    tokens, chosen = torch.randn(9, 5, dtype=torch.float64), torch.tensor([1, 4, 8])
    params = OperatorParams(0.5, 0.1, 0.2, 0.0, 0.0, gate_sharpness=7.0)
    held = _hold(chosen, torch.arange(9.0), params, tokens)
    gates, goes = [], []
    for place in range(9):
        if place in (1, 4, 8):
            continue
        alike = [float(torch.cosine_similarity(tokens[place], tokens[kept], dim=0)) for kept in (1, 4, 8)]
        goes.append(alike.index(max(alike)))
        gates.append(1 / (1 + 2.718281828459045 ** (-7.0 * (max(alike) - 0.2))))
    record = held.to_record(0, 2)
    assert record.assigned == goes
    assert record.share == pytest.approx(sum(gates) / 6, abs=1e-5)
    assert record.importance == [float(n) for n in range(9)]
    pruned = _hold(chosen, None, params, None).to_record(0, 2)
    assert (pruned.share, pruned.assigned, pruned.importance) == (None, None, None)


def test_copies_hold_no_batch() -> None:
    """A view would keep scores of all images of a step."""
    scores, chosen = torch.rand(8, 600), torch.arange(64).expand(8, 64).contiguous()
    held = _hold(chosen[3], scores[3], OperatorParams(0.3, 0.1, 0.0, 0.0, 0.0), torch.rand(600, 4))
    for tensor in (held.chosen, held.importance, held.assigned):
        assert tensor is not None
        assert tensor.untyped_storage().nbytes() == 4 * tensor.numel()


class FakeEngine:
    """A scheduler's book and a worker's recorder, driven as engine core and runner drive them."""

    def __init__(self) -> None:
        model = SimpleNamespace(architectures=["LlavaForConditionalGeneration"], model="tiny")
        self.manager = SimpleNamespace(kv_cache_spec=SimpleNamespace(segment=0), req_to_blocks={})
        self.traces = TraceBook(PLANNER, SimpleNamespace(model_config=model), [self.manager])
        self.recorder = Recorder()
        self.scheduler = self
        self.requests: dict[str, Request] = {}

    def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        assert method == "eos_trace"
        return [[record.model_dump() for record in self.recorder.take(*args, {})]]

    def add(self, name: str, images: int = 1, engine_id: str | None = None) -> Request:
        """A traced request, taken in."""
        features = [
            SimpleNamespace(
                modality="image", data=None, mm_position=SimpleNamespace(offset=5 + 600 * i, length=576), identifier="x"
            )
            for i in range(images)
        ]
        request = Request(
            request_id=engine_id or f"{name}-random",
            prompt_token_ids=[3] * (600 * images + TEXT),
            sampling_params=SamplingParams(max_tokens=1, extra_args={TRACE_FIELD: name}),
            pooling_params=None,
            mm_features=features,
        )
        self.requests[request.request_id] = request
        self.traces.add(request)
        return request

    def step(self, request: Request | None = None) -> None:
        """One step, which prefills all of a request."""
        step = SchedulerOutput.make_empty()
        if request is not None:
            count = request.num_prompt_tokens
            new: Any = SimpleNamespace(req_id=request.request_id, num_computed_tokens=0)
            step.scheduled_new_reqs, step.num_scheduled_tokens = [new], {request.request_id: count}
            request.num_computed_tokens = count
        if self.traces.is_busy:
            self.traces.announce(step, self.requests)
        if (traces := getattr(step, TRACED, None)) is None:
            return
        self.recorder.begin(traces)
        if request is not None:
            self._reduce(request)
        self.recorder.end()

    def _reduce(self, request: Request) -> None:
        from eos_vllm.serving.requests import plan_of_features

        plan = plan_of_features(PLANNER, request.prompt_token_ids or (), request.mm_features, request.sampling_params)
        self.recorder.lay_out([StepEntry(request.request_id, plan, 0, request.num_prompt_tokens)])
        images = len(plan.spans)
        group: Any = SimpleNamespace(numbers=tuple(range(images)))
        for r in range(3):
            total, keep = plan.kept[0][r], plan.kept[0][r + 1]
            rows = torch.arange(total).expand(images, total)
            chosen = torch.arange(keep).expand(images, keep)
            params = PLANNER.profile.operator_params(r)
            self.recorder.reduced(r, params, torch.zeros(total, 2), group, rows, torch.zeros(images, total), chosen)

    def end(self, request: Request, status: RequestStatus = RequestStatus.FINISHED_LENGTH_CAPPED) -> None:
        """The request is over."""
        request.status = status
        self.traces.end(request)
        del self.requests[request.request_id]

    def held(self) -> int:
        """Traces that anybody holds."""
        book = self.traces
        return len(book.held) + len(book.active) + len(book.forget) + len(self.recorder.reductions)


def test_ten_thousand_traces_leave_no_memory() -> None:
    """A third is read, a third never, a third aborted; what is held never exceeds the bound, and memory stays."""
    engine = FakeEngine()

    def run(numbers: range) -> None:
        for i in numbers:
            request = engine.add(f"r{i}")
            engine.step(request)
            engine.end(request, RequestStatus.FINISHED_ABORTED if i % 3 == 2 else RequestStatus.FINISHED_LENGTH_CAPPED)
            if i % 3 == 0:
                answer = eos_trace(engine, f"r{i}")
                assert answer is not None
                assert len(answer["records"]) == 3
            assert len(engine.traces.held) <= MOST_REQUESTS
            assert len(engine.recorder.reductions) <= MOST_REQUESTS + 1

    run(range(1000))
    tracemalloc.start()
    try:
        run(range(1000, 2000))
        before = tracemalloc.get_traced_memory()[0]
        run(range(2000, 10000))
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 64 << 10  # eight bytes for each of them would be as much
    for name in list(engine.traces.held):
        assert eos_trace(engine, name) is not None
    engine.step()
    assert engine.held() == 0
    assert engine.traces.size == 0


def test_size_is_bounded_as_well() -> None:
    engine = FakeEngine()
    engine.traces.size = MOST_BYTES - 1  # of others
    engine.add("large")
    assert engine.held() == 1  # told to be forgotten
    assert not engine.traces.held


def test_a_second_request_of_the_same_name() -> None:
    engine = FakeEngine()
    first = engine.add("same")
    entry = engine.traces.active[first.request_id]
    engine.add("same")  # under way: the first stands
    assert engine.traces.active == {first.request_id: entry}
    engine.step(first)
    engine.end(first)
    second = engine.add("same")  # over: it is replaced
    assert engine.traces.held["same"] is not entry
    engine.step(second)
    engine.end(second)
    assert eos_trace(engine, "same") is not None
    assert eos_trace(engine, "same") is None


def test_two_requests_under_one_id_at_once_have_no_trace() -> None:
    """Each would read the other's; several answers to one prompt are of one request."""
    engine = FakeEngine()
    first, second = engine.add("same", engine_id="same-aaaaaaaa"), engine.add("same", engine_id="same-bbbbbbbb")
    for request in (first, second):
        engine.step(request)
        engine.end(request)
    assert eos_trace(engine, "same") is None
    engine.step()
    assert engine.held() == 0
    answers = [engine.add("n", engine_id=f"{i}_n-cccccccc") for i in range(3)]
    for request in answers:
        engine.step(request)
        engine.end(request)
    answer = eos_trace(engine, "n")
    assert answer is not None
    assert len(answer["records"]) == 3


def test_a_preempted_request_may_find_its_image_cached() -> None:
    """It was first scheduled in front of its image, and came back behind it: nobody reduced it for this request."""
    engine = FakeEngine()
    request = engine.add("back")
    request.num_preemptions = 1
    engine.end(request)
    answer = eos_trace(engine, "back")
    assert answer is not None
    assert answer["records"] == []
    (image,) = build_trace(Outline.model_validate(answer["outline"]), []).images
    assert (image.reused, image.reducers) == (True, [])


def test_the_family_says_where_the_middle_is_cropped() -> None:
    """A small image of Qwen's may be a square grid as well, and all of it is seen."""
    engine = FakeEngine()
    (image,) = engine.traces.active[engine.add("llava").request_id].outline.images
    assert (image.rows, image.columns, image.cropped) == (24, 24, True)
    sizes = SimpleNamespace(hf_config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2)))
    data = {"image_grid_thw": SimpleNamespace(data=torch.tensor([1, 8, 8]))}
    assert mrope.grids(sizes)(data, 16) == Grid(4, 4, cropped=False)


def test_what_the_scheduler_holds_does_not_grow_with_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    monkeypatch.setattr(engine.traces, "grid", lambda data, tokens: Grid(tiles=(24, 60, 60)))
    outline = engine.traces.active[engine.add("tiled").request_id].outline
    assert outline.images[0].tiles == (24, 60, 60)
    assert len(outline.model_dump_json()) < 1000
    engine.add("many", images=40)
    many = engine.traces.held["many"]
    on_device = 8 * 3 * sum(image.tokens for image in many.outline.images)
    assert many.size - on_device >= len(many.outline.model_dump_json())


def test_the_route_is_there_with_the_page_only() -> None:
    class Client:
        """An engine that holds one trace, and another that holds none."""

        engine_core: Any

        async def call_utility_all_async(self, method: str, name: str) -> list[Any]:
            assert method == "eos_trace"
            if name == "broken":
                raise ConnectionError
            found = {"outline": outline([6, 6, 0]).model_dump(), "records": []}
            return [None, found if name == "a" else None]

    refused = (401, {"error": "Unauthorized"})
    app, plain = FastAPI(), FastAPI()
    EosEndpoints(page=True).attach_router(app)
    EosEndpoints().attach_router(plain)
    for one in (app, plain):
        one.state.eos_guard, one.state.eos_client = None, Client()
        one.state.eos_client.engine_core = one.state.eos_client
    with TestClient(app) as client:
        answer = client.get("/eos/trace/a")
        assert (answer.status_code, answer.json()["id"]) == (200, "a")
        missing = client.get("/eos/trace/b")
        assert missing.status_code == 404
        assert TRACE_FIELD in missing.json()["error"]
        assert client.get("/eos/trace/broken").status_code == 503
        app.state.eos_guard = SimpleNamespace(verify_token=lambda headers: headers.get("authorization") == "Bearer k")
        for path in ("trace/a", "status", "choices", "samples/0"):
            assert (client.get(f"/eos/{path}").status_code, client.get(f"/eos/{path}").json()) == refused, path
        assert (client.post("/eos/plan").status_code, client.post("/eos/plan").json()) == refused
        assert client.get("/eos/trace/a", headers={"Authorization": "Bearer k"}).status_code == 200
    with TestClient(plain) as client:
        assert client.get("/eos/trace/a").status_code == 404
        assert "/eos/trace/{trace_id}" not in client.get("/openapi.json").json()["paths"]
