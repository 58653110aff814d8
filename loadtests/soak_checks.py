"""What must hold after a soak: everybody served, nothing leaked, memory flat, the server alive."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loadtests.memory import growth
from loadtests.records import Record

MOST_GROWTH = 0.05


@dataclass(frozen=True)
class Check:
    """One thing that must hold, and what was seen of it."""

    name: str
    holds: bool
    seen: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def checks(
    records: Sequence[Record],
    alive: bool,
    drained: dict[str, float],
    sizes: Sequence[int],
    last_answer: bool,
    most_growth: float = MOST_GROWTH,
) -> list[Check]:
    """Judges a soak.

    Args:
        records: all requests.
        alive: whether the server's process still runs.
        drained: its gauges once everybody had left.
        sizes: resident bytes of its processes over time.
        last_answer: whether one more request, sent in the end, was answered.
        most_growth: share by which memory may grow from the second quarter to the last.
    """
    meant = [r for r in records if r.fault is None and not r.aborted]
    failed = Counter(r.cause for r in meant if r.cause is not None)
    broken = [r for r in records if r.fault is not None]
    accepted = Counter(r.cause for r in broken if r.cause is not None)
    left = [r for r in records if r.aborted]
    crashes = Counter(r.status for r in records if r.status is not None and r.status >= 500)
    grown = growth(sizes)
    gauges = ("running", "waiting", "kv_usage", "eos_blocks_held")
    held = {name: drained[name] for name in gauges if drained.get(name)}
    unknown = [name for name in gauges if name not in drained]
    return [
        Check("the server lives", alive and last_answer, "answers one more request" if last_answer else "no answer"),
        Check("no answer of status 500 or above", not crashes, _counted(crashes) or f"none in {len(records)} requests"),
        Check(
            "every good request is answered in full",
            bool(meant) and not failed,
            _counted(failed) or f"{len(meant)} of {len(meant)}",
        ),
        Check(
            "every broken request is refused as the sender's mistake",
            bool(broken) and not accepted,
            _counted(accepted) or f"{len(broken)} of {len(broken)}",
        ),
        Check("some streams were left half way", bool(left), f"{len(left)} of {len(records)}"),
        Check(
            "no KV block stays behind",
            not held and not unknown,
            _counted(held) or (f"not on /metrics: {', '.join(unknown)}" if unknown else "all gauges at 0"),
        ),
        Check(
            "memory is flat",
            grown is not None and grown <= most_growth,
            "too few samples" if grown is None else f"{grown:+.1%} from second to last quarter, of {_mib(sizes)}",
        ),
    ]


def _counted(counts: dict[Any, Any]) -> str:
    return ", ".join(f"{name}: {count:g}" for name, count in counts.items())


def _mib(sizes: Sequence[int]) -> str:
    return f"{sizes[-1] / 2**20:.0f} MiB"
