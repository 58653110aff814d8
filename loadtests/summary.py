"""What the figures say, in plain words made from them; where eos is slower it says so first."""

from collections.abc import Iterator

from loadtests.grid import STOCK
from loadtests.measures import wilson
from loadtests.results import Results, Verdict, phase_title, settings_of
from loadtests.sweep_options import ACCURACY

_WORSE = {"requests/s": "fewer requests per second", "TTFT": "a later first token", "TPOT": "slower tokens"}


def summary(results: Results) -> list[str]:
    """Sentences, most important first."""
    return [
        *_slower(results),
        *_gains(results),
        *_memory(results),
        *_accuracy(results),
        *_failures(results),
        *_agreement(results),
        *_cautions(results),
    ]


def _name(results: Results, verdict: Verdict) -> str:
    phase = phase_title(verdict.phase)
    return f"{phase}, {results.load_label(verdict.load)}, budget {verdict.setting}"


def _slower(results: Results) -> Iterator[str]:
    rates = [v for v in results.verdicts if v.figure == "requests/s"]
    if not rates:
        yield "Nothing was measured both with stock vLLM and with eos, so neither can be called slower."
        return
    for figure, what in (
        ("requests/s", "fewer requests per second"),
        ("TTFT", "a later first token"),
        ("TPOT", "slower tokens"),
    ):
        verdicts = [v for v in results.verdicts if v.figure == figure]
        bad = [v for v in verdicts if v.slower]
        if bad:
            cells = "; ".join(
                f"{_name(results, v)} ({v.ratio:.2f} of stock's speed, {v.low:.2f} to {v.high:.2f})" for v in bad
            )
            yield f"eos is slower than stock ({what}, beyond the spread of the repeats) here: {cells}."
        elif figure == "requests/s":
            lowest = min(verdicts, key=lambda v: v.ratio)
            yield (
                f"In none of {len(verdicts)} settings does eos answer fewer requests per second than stock beyond the "
                f"spread of the repeats; the lowest ratio is {lowest.ratio:.2f} ({_name(results, lowest)})."
            )
    if any(v.spread is None for v in rates):
        yield "Some settings were measured once only: their spread is unknown, and any ratio below 1 counts as slower."


def _gains(results: Results) -> Iterator[str]:
    rates = [v for v in results.verdicts if v.figure == "requests/s"]
    for phase in results.phases:
        for load in results.loads(phase):
            here = [v for v in rates if v.phase == phase and v.load == load]
            stock = results.group(phase, STOCK, load)
            if not here or stock is None:
                continue
            here.sort(key=lambda v: -int(v.setting))
            parts = ", ".join(f"{v.ratio:.2f}x at {v.setting}" for v in here)
            yield (
                f"{phase_title(phase)}, {results.load_label(load)}: stock answers {stock.rate:.3f} "
                f"requests per second; eos {parts}."
            )


def _memory(results: Results) -> Iterator[str]:
    for phase in (p for p in results.phases if p == "bound" and not results.open_loop):
        load = results.loads(phase)[-1]
        stock = results.group(phase, STOCK, load)
        best = results.group(phase, results.budgets[-1], load)
        if stock is None or best is None or stock.most_running is None or best.most_running is None:
            continue
        pool = results.pool_bytes(phase)
        size = f" of {pool / 2**20:.0f} MiB" if pool else ""
        yield (
            f"In a KV cache{size} at most {stock.most_running} requests were seen running at once with stock, "
            f"{best.most_running} at budget {best.setting} (of {load:g} that wanted to)."
        )


def _accuracy(results: Results) -> Iterator[str]:
    marked = [g for s in settings_of(results) for g in results.groups if (g.phase, g.setting) == (ACCURACY, s)]
    marked = [group for group in marked if group.marks[1]]
    if marked:
        parts = []
        for g in marked:
            right, total = g.marks
            low, high = wilson(right, total)
            parts.append(f"{g.setting}: {right / total:.1%} ({low:.1%} to {high:.1%}, {total} questions)")
        yield "The embedded model's answers, right by the benchmark's rule: " + "; ".join(parts) + "."
    elif not any(g.marks[1] for g in results.groups):
        yield "No accuracy here: no answers could be marked."


def _failures(results: Results) -> Iterator[str]:
    total = sum(len(cell.records) for cell in results.cells)
    causes: dict[str, int] = {}
    for cell in results.cells:
        for cause, count in cell.failures.items():
            causes[cause] = causes.get(cause, 0) + count
    if causes:
        parts = ", ".join(f"{count} {cause}" for cause, count in sorted(causes.items()))
        yield f"{sum(causes.values())} of {total} requests failed: {parts}."
    else:
        yield f"All {total} requests were answered in full."


def _agreement(results: Results) -> Iterator[str]:
    compared, differing = 0, []
    for cell in results.cells:
        counts = cell.agreement()
        compared += bool(counts)
        for name, (client, server) in counts.items():
            if client != server:
                where = f"{cell.phase} {cell.setting} {cell.load:g} repeat {cell.repeat}"
                differing.append(f"{name} {client:g} against {server:g} ({where})")
    if differing:
        yield "Client and server count differently: " + "; ".join(differing) + "."
    elif compared:
        yield (
            f"Client and server agree on requests, output tokens and prompt tokens in all {compared} runs "
            f"that could be compared."
        )


def _cautions(results: Results) -> Iterator[str]:
    # What an earlier session left out, the last one may have measured.
    for what, why in results.sessions[-1].get("left_out", {}).items():
        yield f"Left out: {what} ({why})."
    few = min((len(g.good) for g in results.groups if g.phase != ACCURACY), default=0)
    if few < 100:
        yield f"Groups hold as few as {few} requests: a 99th percentile of fewer than 100 is close to the slowest one."
    lag = max((cell.client.get("lag_seconds", {}).get("p99", 0.0) for cell in results.cells), default=0.0)
    yield f"The client's own loop was at most {lag * 1000:.0f} ms late in 99 of 100 naps of any run."
