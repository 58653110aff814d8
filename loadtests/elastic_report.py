"""Figure and tables of a sweep of elastic budgets, from its raw results and nothing else.

python -m loadtests.elastic_report results/elastic-cpu --figure docs/elastic.png --readme README.md
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from eos_vllm.core.errors import SettingError
from loadtests.chart import STYLE
from loadtests.commands import command, parser_of
from loadtests.elastic_cells import ELASTIC
from loadtests.elastic_results import ElasticResults, tables

# The README's tables stand between these.
BEGIN, END = "<!-- made by loadtests.elastic_report -->", "<!-- end of loadtests.elastic_report -->"
NOTHING = "Not measured yet."
_COLOURS = ("#6b6b6b", "#3b528b", "#5ec962", "#d1495b")


@command("elastic_report")
def main(argv: Sequence[str] | None = None) -> int:
    """Draws and prints; 2 for a mistake of the user."""
    parser = parser_of("elastic_report", __doc__)
    parser.add_argument("results", type=Path, nargs="?", default=Path("runs/elastic"))
    parser.add_argument("--figure", type=Path, default=None, help="PNG (default: elastic.png in the results)")
    parser.add_argument("--readme", type=Path, default=None, help="put the tables into this file, between its marks")
    parser.add_argument("--slo-scale", type=float, default=None, help="other limits of goodput than the sweep's")
    args = parser.parse_args(argv)
    results = ElasticResults(args.results, args.slo_scale)
    text = "\n\n".join(table.markdown() for table in tables(results))
    figure = args.figure or args.results / "elastic.png"
    draw(results, figure)
    if args.readme is not None:
        page = between_marks(args.readme.read_text(encoding="utf-8"), section(results, figure.as_posix()))
        args.readme.write_text(page, encoding="utf-8")
    print(text)
    return 0


def section(results: ElasticResults, figure: str) -> str:
    """Figure and tables as the README has them."""
    parts = [f"![goodput and accuracy against the arrival rate]({figure})"]
    return "\n\n".join(parts + [table.markdown() for table in tables(results)])


def between_marks(page: str, text: str) -> str:
    """The page with the text between its marks.

    Raises:
        SettingError: the page lacks one of them.
    """
    if BEGIN not in page or END not in page.partition(BEGIN)[2]:
        raise SettingError("readme", "page", "it has no marks for the tables", f"put {BEGIN} and {END} into it")
    head, _, rest = page.partition(BEGIN)
    return f"{head}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}"


def draw(results: ElasticResults, file: Path) -> None:
    """Writes a PNG of two panels: goodput of the one model, and accuracy of the other, against the arrival rate."""
    x = results.multiples
    subject, judge = results.settings["subject"], results.settings["judge"]
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.4), layout="constrained")
        for arm, colour in zip(results.arms, _COLOURS, strict=True):
            label = arm if not arm.isdigit() else f"fixed {arm}"
            style = {"color": colour, "label": label, "linewidth": 2 if arm == ELASTIC else 1, "markersize": 4}
            points = [(m, value) for m in x if (value := results.goodput(m, arm)) is not None]
            left.plot([m for m, _ in points], [value for _, value in points], marker="o", **style)
            found = [(m, accuracy) for m in x if (accuracy := results.accuracy(results.shares(m, arm))) is not None]
            right.errorbar(
                [m for m, _ in found],
                [100 * mean for _, (mean, _) in found],
                yerr=[100 * half for _, (_, half) in found],
                marker="o",
                capsize=2,
                **style,
            )
        offered = [results.rate(m) for m in x]
        left.plot(x, offered, color="#b0b0b0", linestyle=":", linewidth=1, label="arrivals")
        left.set_title(f"{subject['name']}\nprofile {subject['profile_name']}", fontsize=9)
        left.set_ylabel("good requests/s")
        right.set_title(f"{judge['name']} at the budgets chosen there\nprofile {judge['profile_name']}", fontsize=9)
        right.set_ylabel("right answers, %")
        for axis in (left, right):
            axis.set_xlabel("arrivals over stock's capacity")
        left.set_ylim(bottom=0)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=130, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
