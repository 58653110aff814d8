"""Parts of the status that need no server: the document, who is asked how often, and counts that disagree."""

import asyncio
import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from eos_vllm.core.plan import ImageSpan, Planner
from eos_vllm.core.profile import profile_digest
from eos_vllm.profiles import load
from eos_vllm.serving import endpoints
from eos_vllm.serving.endpoints import Watch
from eos_vllm.serving.metrics import Counters
from eos_vllm.serving.status import FrontEndStatus, build_status, public_source
from eos_vllm.serving.watch import count_problem
from eos_vllm.serving.worker import parts_missing
from support.profiles import make_profile

PLANNER = Planner(make_profile(), block=32)
FRONT_END = FrontEndStatus(server=0, servers=1, requests=0, refused=0)


def report(rank: int = 0, lost: tuple[str, ...] = (), engine: int = 0) -> dict[str, Any]:
    counts = {"images": 1, "tokens_in": [576, 300, 150], "tokens_kept": [300, 150, 64]}
    return {
        **{"engine": engine, "rank": rank, "runner": "Runner", "rehearsal": "passed", "lost": list(lost)},
        **{**counts, "planned": counts, "segments": [0, 1], "backends": ["B", "B"]},
    }


@pytest.mark.parametrize(
    ("engines", "unanswered", "status", "reasons"),
    [
        ([[report()]], None, "proved", []),
        ([[report(0), report(1)], [report(0, engine=1), report(1, ("gone",), engine=1)]], None, "lost",
         ["engine 1, worker 1: gone"]),
        ([], "late", "unknown", ["late"]),
        ([], None, "unknown", ["no worker reported"]),
        ([[report()], []], None, "unknown", ["no worker reported"]),
    ],
)  # fmt: skip
def test_one_worker_is_enough_to_lose_it(engines: Any, unanswered: str | None, status: str, reasons: list[str]) -> None:
    found = build_status(PLANNER, "theta.json", engines, FRONT_END, unanswered)
    assert (found.status, found.reasons) == (status, reasons)


def test_all_measures_of_the_budget() -> None:
    budget = build_status(PLANNER, "theta.json", [[report()]], FRONT_END).budget
    kept = PLANNER.counts()
    average = (2 * 576 + 2 * kept[0] + 2 * kept[1] + 2 * kept[2]) / 8
    assert (budget.retain, budget.kept, budget.final) == (64, list(kept), kept[-1])
    assert (budget.layer_average, budget.kv_share) == (average, average / 576)


def test_a_digest_is_of_what_a_profile_says() -> None:
    profile = make_profile()
    assert profile_digest(profile) == profile_digest(make_profile())
    assert profile_digest(profile) != profile_digest(make_profile(layers=(1, 3, 6)))
    assert profile_digest(profile) != profile_digest(make_profile(budget={"measure": "final", "tokens": 65}))


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("/etc/eos/theta.json", "/etc/eos/theta.json"),
        ("embedded-eos", "embedded-eos"),
        ("https://me:secret@host:8443/a/theta.json?token=secret#x", "https://host:8443/a/theta.json"),
        ("https://host/theta.json", "https://host/theta.json"),
    ],
)
def test_a_source_is_shown_without_secrets(source: str, shown: str) -> None:
    assert public_source(source) == shown


def counted(images: int = 1) -> Counters:
    counters = Counters(3)
    plan = PLANNER.plan(600, [ImageSpan(5, 576)])
    for _ in range(images):
        counters.count(plan, range(1))
    return counters


def test_counts_are_compared_to_the_token_and_by_stage() -> None:
    profile, all_layers = PLANNER.profile, range(8)
    assert count_problem(profile, all_layers, True, counted(2), counted(2)) is None
    assert "2 images were planned, 1 were reduced" in str(
        count_problem(profile, all_layers, True, *map(counted, (2, 1)))
    )
    done = counted()
    done.tokens_kept[1] += 1
    assert "after layer 3" in str(count_problem(profile, all_layers, True, counted(), done))
    # A stage counts what is reduced after its own layers, and only the last one counts images.
    first = copy.deepcopy(counted())
    first.images, first.tokens_in[1:], first.tokens_kept[1:] = 0, [0, 0], [0, 0]
    assert count_problem(profile, range(3), False, counted(), first) is None
    assert count_problem(profile, range(3), True, counted(), first) is not None
    assert count_problem(profile, range(4), False, counted(), first) is not None


class Engine:
    """Front end's client of engines whose workers answer as ``answer`` does."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        self.vllm_config = SimpleNamespace(additional_config={"eos": {"source": "theta.json"}})
        self.calls, self.answer, self.engine_core, self.client_index = 0, answer, self, 0

    async def call_utility_all_async(self, method: str, *args: Any) -> Any:
        assert (method, *args) == ("collective_rpc", "eos_report", None, (), {})
        self.calls += 1
        return await self.answer()


def test_many_probes_at_once_are_one_question() -> None:
    async def answer() -> Any:
        await asyncio.sleep(0.01)
        return [[report()]]

    async def run() -> None:
        engine = Engine(answer)
        watch = Watch(engine, PLANNER)
        found = await asyncio.gather(*(watch.status() for _ in range(50)))
        assert [status.status for status in found] == ["proved"] * 50
        assert engine.calls == 1
        watch.at -= endpoints.FRESH_SECONDS
        await watch.status()
        assert engine.calls == 2

    asyncio.run(run())


def test_a_late_answer_is_waited_for_and_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "ANSWER_SECONDS", 0.01)
    monkeypatch.setattr(endpoints, "FRESH_SECONDS", 0.0)

    async def run() -> None:
        free = asyncio.Event()

        async def answer() -> Any:
            await free.wait()
            return [[report()]]

        engine = Engine(answer)
        watch = Watch(engine, PLANNER)
        for _ in range(3):
            found = await watch.status()
            assert (found.status, found.reasons) == ("unknown", ["the workers did not answer within 0.01 s"])
        free.set()
        await asyncio.sleep(0)
        assert (await watch.status()).status == "proved"
        assert engine.calls == 1

    asyncio.run(run())


def test_an_engine_that_is_gone() -> None:
    async def answer() -> Any:
        raise RuntimeError("EngineCore encountered an issue\nwith details")

    found = asyncio.run(Watch(Engine(answer), PLANNER).status())
    assert found.status == "unknown"
    assert found.reasons == ["the workers could not be asked: RuntimeError: EngineCore encountered an issue"]


def test_a_model_without_what_the_profile_asks_for() -> None:
    assert parts_missing(None, SimpleNamespace()) == ["there is no profile"]
    assert parts_missing(PLANNER, SimpleNamespace(eos=object(), eos_before=None)) == []
    assert "within the decoder" in parts_missing(PLANNER, SimpleNamespace(eos=None))[0]
    assert "within the decoder" in parts_missing(PLANNER, SimpleNamespace())[0]
    selects = Planner(load("divprune-llava-1.5-7b"), block=32)
    assert not selects.profile.inside
    assert "before the decoder" in parts_missing(selects, SimpleNamespace(eos=None, eos_before=None))[0]
    stage = SimpleNamespace(eos=None, eos_before=None, eos_takes_images=lambda: False)
    assert parts_missing(selects, stage) == []
