"""One HTML page and its pictures from a sweep's raw results, and from nothing else.

python -m loadtests.report                          # runs/loadtest, what make loadtest measured
python -m loadtests.report results/loadtest-cpu --slo ttft:2000,tpot:100 --markdown
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jinja2

from eos_vllm.core.errors import EosError
from loadtests.charts import draw_all
from loadtests.facts import facts, profile_text
from loadtests.measures import parse_slo
from loadtests.results import Results
from loadtests.summary import summary
from loadtests.tables import readme_table, tables

_TEMPLATE = Path(__file__).with_name("report.html.j2")


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the report; 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="?", default=Path("runs/loadtest"))
    parser.add_argument("--slo", default=None, help="limits of goodput in milliseconds, e.g. ttft:2000,tpot:100")
    parser.add_argument("--out", type=Path, default=None, help="folder of the report (default: report in the results)")
    parser.add_argument("--markdown", action="store_true", help="print the table of the README, write nothing")
    args = parser.parse_args(argv)
    try:
        results = Results(args.results, parse_slo(args.slo) if args.slo else None)
        if args.markdown:
            print(readme_table(results).markdown())
        else:
            print(write_report(results, args.out or args.results / "report"))
    except EosError as e:
        print(f"loadtests.report: error: {e}", file=sys.stderr)
        return 2
    return 0


def write_report(results: Results, folder: Path) -> Path:
    """Writes page and pictures into ``folder`` and returns the page."""
    pictures = draw_all(results, folder)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    names = {subject["name"] for subject in results.settings["subjects"].values()}
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=f"Throughput against the retain budget: {', '.join(sorted(names))}",
        summary=summary(results),
        tables=tables(results),
        pictures=pictures,
        facts=facts(results),
        profiles=profile_text(results),
    )
    file = folder / "index.html"
    file.write_text(page + "\n", encoding="utf-8")
    return file


if __name__ == "__main__":
    sys.exit(main())
