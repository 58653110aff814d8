"""Tables and one figure from a sweep's raw results, and from nothing else.

python -m loadtests.report results/loadtest-cpu                 # writes report/report.md and report/speed.png there
python -m loadtests.report results/loadtest-cpu --markdown      # prints the README's tables as well
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtests.chart import draw
from loadtests.commands import command, parser_of
from loadtests.measures import SLO, parse_slo
from loadtests.results import Results
from loadtests.tables import full_table, ratio_table, sentences, turns_table

FIGURE, PAGE = "speed.png", "report.md"


@command("report")
def main(argv: Sequence[str] | None = None) -> int:
    """Writes the report; 2 for a mistake of the user."""
    parser = parser_of("report", __doc__)
    parser.add_argument("results", type=Path, nargs="?", default=Path("runs/loadtest"))
    parser.add_argument("--slo", default=None, help=f"limits of goodput in milliseconds (default: {SLO})")
    parser.add_argument("--out", type=Path, default=None, help="folder of the report (default: report in the results)")
    parser.add_argument("--markdown", action="store_true", help="print the README's tables, too")
    args = parser.parse_args(argv)
    results = Results(args.results, parse_slo(args.slo) if args.slo else SLO)
    page = write_report(results, args.out or args.results / "report")
    print(readme(results) if args.markdown else page)
    return 0


def readme(results: Results) -> str:
    """Sentences and the two tables that matter most."""
    tables = [ratio_table(results), turns_table(results)]
    parts = ["\n".join(f"* {sentence}" for sentence in sentences(results))]
    return "\n\n".join(parts + [table.markdown() for table in tables if table is not None])


def write_report(results: Results, folder: Path) -> Path:
    """Writes page and figure into ``folder`` and returns the page."""
    draw(results, folder / FIGURE)
    parts = [
        f"# Stock vLLM against eos: {results.subject}",
        f"![requests per second over stock's]({FIGURE})",
        readme(results),
        full_table(results).markdown(),
        "## How it was measured",
        "\n".join(f"* {name}: {value}" for name, value in facts(results)),
    ]
    file = folder / PAGE
    file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return file


def facts(results: Results) -> list[tuple[str, str]]:
    """What a reader needs to judge the figures, or to measure again, in reading order."""
    found = []
    for session in results.sessions:
        origin = session["provenance"]
        seconds = f"{session['seconds']} s" if "seconds" in session else "stopped before its end"
        found += [
            ("measured", f"{origin['created']}, {seconds}; git {origin['git']}"),
            ("command", f"`{origin['command']}`"),
            ("machine", _joined(origin["machine"])),
            ("versions", _joined(origin["versions"])),
        ]
    found += [
        (name.replace("_", " "), str(value))
        for name, value in results.settings.items()
        if name != "subject" and value is not None
    ]
    found.append(("seeds", ", ".join(str(seed) for seed in sorted({cell.seed for cell in results.cells}))))
    return found


def _joined(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


if __name__ == "__main__":
    sys.exit(main())
