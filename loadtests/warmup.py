"""Requests that nobody counts, sent before the first cell: every kind of visit at every budget in use."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import requests

from eos_vllm.core.errors import EosError
from loadtests.feed import Feed
from loadtests.grid import SCENARIOS
from loadtests.records import Record
from loadtests.settings import Workload


def warm_up(workload: Workload, scenarios: Sequence[str]) -> None:
    """Sends one visit of each kind that the scenarios hold, all at once, and waits for the answers.

    Args:
        workload: of the server and the budget to warm up; its scenarios, loads and limits are not used.
        scenarios: names of :data:`loadtests.grid.SCENARIOS`.

    Raises:
        EosError: a request failed; the server would fail in the sweep as well.
    """
    kinds = sorted({kind for name in scenarios for kind, weight in SCENARIOS[name].items() if weight})
    with ThreadPoolExecutor(len(kinds)) as pool:
        for kind, records in zip(kinds, pool.map(lambda kind: _visit(workload, kind), kinds), strict=True):
            for record in records:
                if not record.good:
                    what = f"{kind}: {record.cause} {record.detail}".strip()
                    remedy = "look at the server's log; --max-model-len and --rows must fit the model"
                    raise EosError("warm-up", record.budget or "stock", what, remedy)


def _visit(workload: Workload, kind: str) -> list[Record]:
    records: list[Record] = []
    plain = replace(workload, scenarios={kind: 1.0}, window=None, rate=None, seconds=None, requests=None, prepare=1)
    feed = Feed(replace(plain, label=f"{workload.label} {kind}"), None, records.append)
    visit = feed.next()
    assert visit is not None
    try:
        feed.run(visit)
    except requests.RequestException as e:
        raise EosError("warm-up", kind, str(e), "look at the server's log") from None
    finally:
        feed.close()
    return records
