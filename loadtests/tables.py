"""The report's tables and sentences; each table is of one model and one profile, which its title names."""

from collections.abc import Iterator
from dataclasses import dataclass

from loadtests.figures import Group
from loadtests.grid import STOCK
from loadtests.results import LATER, Comparison, Results


@dataclass(frozen=True)
class Table:
    """A titled table."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        """Title, table and note."""
        lines = [f"**{self.title}**", "", "| " + " | ".join(self.head) + " |", "|" + " --- |" * len(self.head)]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join(lines + (["", self.note] if self.note else []))


def sentences(results: Results) -> list[str]:
    """What the figures say, in plain words made from them; where eos is slower they say so first."""
    return [*_verdicts(results), *_failures(results), *_cautions(results)]


def _verdicts(results: Results) -> Iterator[str]:
    by_verdict: dict[str, list[Comparison]] = {}
    for comparison in results.comparisons:
        by_verdict.setdefault(comparison.ratio.verdict, []).append(comparison)
    if not results.comparisons:
        yield "Nothing was measured both with stock vLLM and with eos, so neither can be called slower."
        return
    total = len(results.comparisons)
    for verdict, words in (
        ("slower", "eos is slower than stock, the whole interval below 1, in"),
        ("not decided", "Not decided (too few repeats for a ratio this near to 1, or below) are"),
    ):
        if found := by_verdict.get(verdict):
            yield (
                f"{words} {len(found)} of {total} comparisons: " + "; ".join(f"{c.name} {c.ratio}" for c in found) + "."
            )
    if "slower" not in by_verdict:
        yield f"In none of {total} comparisons is eos slower than stock with an interval below 1."
    counts = ", ".join(f"{len(by_verdict[v])} {v}" for v in ("faster", "no difference") if v in by_verdict)
    if counts:
        yield f"The others: {counts}."


def _failures(results: Results) -> Iterator[str]:
    total = sum(len(cell.records) for cell in results.cells)
    causes: dict[str, int] = {}
    for cell in results.cells:
        for cause, count in cell.failures.items():
            causes[cause] = causes.get(cause, 0) + count
    cut = sum(record.cut for cell in results.cells for record in cell.records)
    if causes:
        parts = ", ".join(f"{count} {cause}" for cause, count in sorted(causes.items()))
        yield f"{sum(causes.values())} of {total} requests failed: {parts}."
    else:
        yield f"None of {total} requests failed; {cut} of them were on their way when a window closed."


def _cautions(results: Results) -> Iterator[str]:
    if (left_out := results.sessions[-1].get("left_out")) is not None:
        yield f"Left out: {left_out}."
    short = [cell for cell in results.cells if not cell.client.get("window", {}).get("full", True)]
    if short:
        names = "; ".join(f"{c.scenario}, {c.load.label}, {c.setting}, repeat {c.repeat}" for c in short)
        yield f"A time limit opened or closed {len(short)} windows early: {names}."
    lag = max((cell.client.get("lag_seconds", {}).get("p99", 0.0) for cell in results.cells), default=0.0)
    encoded = sum(cell.client.get("late_encodings", 0) for cell in results.cells)
    yield (
        f"The client's own loop was at most {lag * 1000:.0f} ms late in 99 of 100 naps of any run, "
        f"and encoded {encoded} images while requests were under way."
    )


def ratio_table(results: Results) -> Table:
    """Requests per second over stock's, a row for each scenario and budget, a column for each load."""
    rows = []
    for scenario in results.scenarios:
        for budget in results.budgets:
            ratios = [results.ratio(scenario, load, budget) for load in results.loads]
            cells = ("" if r is None else f"{r}, {r.verdict}" for r in ratios)
            rows.append((scenario, budget, *cells))
    head = ("scenario", "budget", *(load.label for load in results.loads))
    note = "In brackets the 95 % interval of the mean over repeats, where there are several."
    return Table(f"Requests per second over stock's ({results.subject})", head, tuple(rows), note)


def turns_table(results: Results) -> Table | None:
    """TTFT of each question of a conversation, eos against stock; None where none was measured."""
    rows = []
    for scenario, later in LATER.items():
        for load in results.loads:
            stock = results.group(scenario, load, STOCK)
            for budget in results.budgets:
                ours = results.group(scenario, load, budget)
                if ours is None or stock is None:
                    continue
                cells = []
                for question in (1, *later):
                    ratio = results.ratio(scenario, load, budget, question)
                    seen = f"{_number(ours.ttft(50, question))} ({_number(stock.ttft(50, question))})"
                    cells += [seen, "" if ratio is None else f"{ratio}, {ratio.verdict}"]
                rows.append((load.label, budget, *cells))
    if not rows:
        return None
    head: list[str] = ["load", "budget"]
    for turn in (1, 2, 3):
        head += [f"turn {turn}: s (stock)", "times as early"]
    return Table(f"Conversations, median time to first token ({results.subject})", tuple(head), tuple(rows))


def full_table(results: Results) -> Table:
    """Every setting under every load in every scenario, with all figures."""
    rows = []
    open_loop = any(load.rate is not None for load in results.loads)
    for scenario in results.scenarios:
        for load in results.loads:
            for setting in results.order:
                group = results.group(scenario, load, setting)
                if group is not None:
                    rows.append((scenario, load.label, setting, *_figures(results, group), *_open(group, open_loop)))
    head = (
        *("scenario", "load", "setting", "repeats", "answers", "failed", "requests/s", "over stock", "goodput/s"),
        *("TTFT p50 s", "p99", "TPOT p50 ms", "p99", "answer p50 s", "prefix cache hits"),
        *(("sent late p50 s", "worst", "TTFT from due p50 s", "p99") if open_loop else ()),
    )
    note = f"Goodput: requests per second that kept {results.slo}, the same for all rows."
    return Table(f"All figures ({results.subject})", head, tuple(rows), note)


def _figures(results: Results, group: Group) -> tuple[str, ...]:
    ratio = results.ratio(group.scenario, group.load, group.setting)
    rise = [cell.metrics.get("rise", {}) for cell in group.cells]
    hits, queries = (sum(r.get(f"prefix_cache_{name}", 0) for r in rise) for name in ("hits", "queries"))
    return (
        str(len(group.cells)),
        str(len(group.full)),
        str(sum(sum(cell.failures.values()) for cell in group.cells)),
        f"{group.rate:.3f}",
        "" if ratio is None or group.setting == STOCK else str(ratio),
        f"{group.goodput(results.slo):.3f}",
        *(_number(group.ttft(share)) for share in (50, 99)),
        *(_number(group.tpot(share), 1000) for share in (50, 99)),
        _number(group.e2e(50)),
        f"{hits / queries:.0%}" if queries else "",
    )


def _open(group: Group, open_loop: bool) -> tuple[str, ...]:
    if not open_loop:
        return ()
    late = (_number(group.late(share)) for share in (50, 100))
    return (*late, *(_number(group.ttft(share, from_due=True)) for share in (50, 99)))


def _number(value: float | None, factor: float = 1.0) -> str:
    return "" if value is None else f"{value * factor:.3g}"
