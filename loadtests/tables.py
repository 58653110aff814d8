"""The report's tables, as rows of text; the README's table is the first of them."""

from dataclasses import dataclass

from loadtests.figures import Group, ratios
from loadtests.grid import STOCK
from loadtests.measures import wilson
from loadtests.results import Results, phase_title, settings_of
from loadtests.sweep_options import ACCURACY


@dataclass(frozen=True)
class Row:
    """Cells of one line; ``slower`` marks lines where eos is slower than stock beyond the spread."""

    cells: tuple[str, ...]
    slower: bool = False


@dataclass(frozen=True)
class Table:
    """A titled table."""

    title: str
    head: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""

    def markdown(self) -> str:
        """For a README."""
        lines = ["| " + " | ".join(self.head) + " |", "|" + " --- |" * len(self.head)]
        return "\n".join(lines + ["| " + " | ".join(row.cells) + " |" for row in self.rows])


def tables(results: Results) -> list[Table]:
    """A table of speed for each phase, one of the plan's promises, and one of what servers counted."""
    return [*(speed_table(results, phase) for phase in results.phases), *_plan_tables(results), _server_table(results)]


def speed_table(results: Results, phase: str) -> Table:
    """Requests per second, ratio, goodput and latencies of every setting under every load."""
    rows = []
    slower = {(v.setting, v.load) for v in results.verdicts if v.phase == phase and v.slower}
    for load in results.loads(phase):
        stock = results.group(phase, STOCK, load)
        for setting in settings_of(results):
            group = results.group(phase, setting, load)
            if group is not None:
                rows.append(Row(_speed_cells(results, group, stock), (setting, load) in slower))
    head = (
        *(
            "load",
            "budget",
            "requests",
            "failed",
            "requests/s",
            "against stock (range)",
            "share of ceiling",
            "goodput/s",
        ),
        *("TTFT p50 s", "p99", "TPOT p50 ms", "p99", "ITL p99 ms", "answer p50 s"),
    )
    pool = results.pool_bytes(phase)
    size = f", {pool / 2**20:.0f} MiB" if pool else ""
    ours = " (five times what a lone request takes in stock)" if results.slo_is_ours else ""
    note = f"Goodput counts requests with {results.slo}{ours}. Ceiling: by the plan's tokens over all layers."
    return Table(f"Speed, {phase_title(phase)}{size}", head, tuple(rows), note)


def _speed_cells(results: Results, group: Group, stock: Group | None) -> tuple[str, ...]:
    values = ratios(group, stock) if stock is not None and group.setting != STOCK else []
    promised = results.promise(group.phase, group.setting)
    reached = f"{sum(values) / len(values) / promised.by_tokens:.0%}" if values and promised else ""
    goodputs = group.goodputs(results.slo)
    return (
        results.load_label(group.load),
        group.setting,
        str(sum(len(cell.records) for cell in group.cells)),
        str(sum(sum(cell.failures.values()) for cell in group.cells)),
        f"{group.rate:.3f}",
        _against(group, stock),
        reached,
        f"{sum(goodputs) / len(goodputs):.3f}",
        *(_number(group.ttft(share)) for share in (50, 99)),
        *(_number(group.tpot(share), 1000) for share in (50, 99)),
        _number(group.itl(99), 1000),
        _number(group.e2e(50)),
    )


def _number(value: float | None, factor: float = 1.0) -> str:
    return "" if value is None else f"{value * factor:.3g}"


def readme_table(results: Results) -> Table:
    """The one table that matters: every setting at the highest load, with what it costs in answers."""
    phases = results.phases
    head = ["budget"]
    for phase in phases:
        head += [f"requests/s, {phase_title(phase)}", "against stock (range)"]
    rows = []
    for setting in settings_of(results):
        cells = [setting]
        for phase in phases:
            load = results.loads(phase)[-1]
            group, stock = results.group(phase, setting, load), results.group(phase, STOCK, load)
            rate = "" if group is None else f"{group.rate:.3f}"
            cells += [rate, "" if group is None else _against(group, stock)]
        first = results.group(phases[0], setting, results.loads(phases[0])[-1]) if phases else None
        promised = results.promise(phases[0], setting) if phases else None
        measured = first.kv_per_request(promised.block_bytes) if first and promised else None
        cells += [
            "" if first is None else _number(first.ttft(50)),
            "" if measured is None else f"{measured / 2**20:.1f}",
            _marks(results, setting),
        ]
        rows.append(Row(tuple(cells)))
    head += ["TTFT p50 s", "KV MiB per request", "answers right (95 %)"]
    loads = ", ".join(results.load_label(results.loads(phase)[-1]) for phase in phases)
    return Table(f"At the highest load ({loads})", tuple(head), tuple(rows))


def _against(group: Group, stock: Group | None) -> str:
    values = ratios(group, stock) if stock is not None and group.setting != STOCK else []
    return f"{sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else ""


def _marks(results: Results, setting: str) -> str:
    for group in results.groups:
        right, total = group.marks
        if group.phase == ACCURACY and group.setting == setting and total:
            low, high = wilson(right, total)
            return f"{right / total:.1%} ({low:.1%} to {high:.1%})"
    return ""


def _plan_tables(results: Results) -> list[Table]:
    found = []
    for phase in [ACCURACY, *results.phases] if results.settings["subjects"].get(ACCURACY) else results.phases:
        rows = []
        for setting in settings_of(results):
            promised, loads = results.promise(phase, setting), results.loads(phase)
            group = results.group(phase, setting, loads[-1]) if loads else None
            if promised is None or group is None:
                continue
            measured = group.kv_per_request(promised.block_bytes)
            pool = results.pool_bytes(phase)
            rows.append(
                Row(
                    (
                        setting,
                        "" if setting == STOCK else " → ".join(map(str, promised.counts)),
                        str(promised.final),
                        f"{promised.layer_average:.1f}",
                        f"{promised.first_blocks} to {promised.blocks} of {promised.block_bytes / 2**10:.0f} KiB",
                        f"{promised.kv_bytes / 2**20:.2f}",
                        "" if measured is None else f"{measured / 2**20:.2f}",
                        "" if pool is None else str(promised.fits(pool)),
                        "" if group.most_running is None else str(group.most_running),
                        f"{promised.by_tokens:.2f}",
                        f"{promised.by_flops:.2f}",
                    )
                )
            )
        if rows:
            head = (
                *("budget", "kept after reducers", "final", "layer average", "KV blocks planned", "MiB planned"),
                *("MiB measured", "requests that fit", "most running", "ceiling by tokens", "by FLOPs"),
            )
            title = f"Plan and KV memory per request, {phase_title(phase)}, highest load"
            note = "Planned: held when the answer ends. Measured: mean over looks at /metrics, once a second."
            found.append(Table(title, head, tuple(rows), note))
    return found


def _server_table(results: Results) -> Table:
    rows = []
    for group in results.groups:
        rise = [cell.metrics["rise"] for cell in group.cells]
        waiting = [max(cell.metrics["series"].get("waiting", [0]), default=0) for cell in group.cells]
        usage = [max(cell.metrics["series"].get("kv_usage", [0]), default=0) for cell in group.cells]
        shown = [cell.repeated_images for cell in group.cells]
        repeats, images = sum(r for r, _ in shown), sum(n for _, n in shown)
        hits, queries = (sum(r.get(name, 0) for r in rise) for name in ("mm_cache_hits", "mm_cache_queries"))
        rows.append(
            Row(
                (
                    f"{group.phase}, {results.load_label(group.load)}",
                    group.setting,
                    str(len(group.cells)),
                    f"{max(usage):.0%}",
                    f"{group.most_running or 0}",
                    f"{max(waiting):.0f}",
                    f"{sum(r.get('preemptions', 0) for r in rise):.0f}",
                    f"{repeats} of {images}",
                    f"{hits:.0f} of {queries:.0f}",
                    _kept(rise),
                )
            )
        )
    head = (
        *("runs", "budget", "repeats", "KV used at most", "running at most", "waiting at most", "preemptions"),
        *("images shown again", "image cache hits", "visual tokens kept per image"),
    )
    return Table("What the servers said of themselves", head, tuple(rows))


def _kept(rise: list[dict[str, float]]) -> str:
    images = sum(r.get("eos_images", 0) for r in rise)
    # The counter adds up what each reducer kept.
    return f"{sum(r.get('eos_tokens_kept', 0) for r in rise) / images:.0f} over all reducers" if images else ""
