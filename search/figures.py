"""Figures from raw results; nothing is measured here."""

from pathlib import Path
from typing import Any

from eos_search.accuracy import AVERAGE, Share
from eos_search.scorers import EXACT, scorer_of

_MARKS = "osD^vPX*<>"


def accuracy_figure(result: dict[str, Any], file: Path) -> None:
    """Draws accuracy against the retain budget, one panel on average and one per kind, with 95 % intervals.

    Args:
        result: raw result of ``eos-search evaluate``.
        file: PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    scorer = scorer_of(result)
    kinds = [AVERAGE, *(kind for kind in result["cases"][0]["accuracy"] if kind != AVERAGE)]
    columns = 4
    figure, axes = pyplot.subplots(
        -(-len(kinds) // columns), columns, figsize=(4 * columns, 3.6 * -(-len(kinds) // columns)), squeeze=False
    )
    names = dict.fromkeys(case["profile"] for case in result["cases"] if case["budget"] is not None)
    palette = pyplot.get_cmap("tab20")
    colours = ["black", *(palette(n % palette.N) for n in range(len(names)))]
    for axis, kind in zip(axes.flat, kinds, strict=False):
        for number, (name, colour) in enumerate(zip(names, colours, strict=False)):
            line = sorted((c["budget"], Share(**c["accuracy"][kind])) for c in result["cases"] if _is(c, name))
            budgets, values = [b for b, _ in line], [100 * s.value for _, s in line]
            ends = [100 * s.low for _, s in line], [100 * s.high for _, s in line]
            mark = _MARKS[number % len(_MARKS)]
            # The first profile is what the others are there for.
            axis.plot(
                budgets, values, marker=mark, markersize=4, linewidth=1.5 if number else 3, color=colour, label=name
            )
            axis.fill_between(budgets, *ends, alpha=0.1, color=colour)
        for case in result["cases"]:
            if case["budget"] is None:
                style = "--" if case["profile"] == "none" else ":"
                label = "all tokens" if case["profile"] == "none" else case["profile"]
                axis.axhline(100 * case["accuracy"][kind]["value"], color="black", linestyle=style, label=label)
        if kind in result["chance"]:
            axis.axhline(100 * result["chance"][kind], color="grey", linestyle="-.", linewidth=1, label="chance")
        axis.set_xscale("log", base=2)
        ticks = sorted({c["budget"] for c in result["cases"] if c["budget"] is not None})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set_xlabel("visual tokens kept per image after the last reducer")
        axis.set_ylabel("right answers, %" if scorer is EXACT else f"score by {scorer.name}, %")
        axis.set_title(kind)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(kinds) :]:
        axis.axis("off")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower right", fontsize=9)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    # Neither date nor version inside: the same result gives the same file.
    figure.savefig(file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _is(case: dict[str, Any], name: str) -> bool:
    return case["profile"] == name and case["budget"] is not None
