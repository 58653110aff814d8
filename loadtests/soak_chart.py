"""Memory over the requests of a soak: ``python -m loadtests.soak_chart results/soak-two-replicas.json soak.png``."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

_MIB = 1 << 20
_COLOURS = {"eos": "#1f77b4", "stock": "#6b6b6b"}


def curves(result: dict[str, Any]) -> dict[str, list[tuple[list[float], list[float]]]]:
    """For eos and stock, of each server: requests sent so far (at an even pace), and resident MiB."""
    found = {}
    for kind, soaked in (("eos", result), ("stock", result["stock"])):
        pace = soaked["requests"]["all"] / soaked["seconds"]
        found[kind] = [
            ([at * pace for at, _ in samples], [size / _MIB for _, size in samples])
            for samples in soaked["resident_bytes"]
        ]
    return found


def draw(result: dict[str, Any], file: Path) -> None:
    """Writes a PNG: a line for each server."""
    figure, axis = plt.subplots(figsize=(7.2, 3.4), layout="constrained")
    for kind, servers in curves(result).items():
        for number, (sent, sizes) in enumerate(servers):
            axis.plot(
                *(sent, sizes),
                color=_COLOURS[kind],
                linestyle=("-", "--", ":")[number % 3],
                linewidth=1.2,
                label=f"{kind}, replica {number + 1}",
            )
    axis.set_ylim(bottom=0)
    axis.set_xlim(left=0)
    axis.set_xlabel("requests sent to both replicas")
    axis.set_ylabel("resident memory of a replica, MiB")
    axis.grid(color="#e6e6e6")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, ncols=2, loc="lower right")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Draws the figure of a result; 2 for a mistake of the user."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if len(arguments) != 2:
        print("usage: python -m loadtests.soak_chart RESULT PNG", file=sys.stderr)
        return 2
    result = json.loads(Path(arguments[0]).read_text())
    if "stock" not in result:
        print(
            f"loadtests.soak_chart: error: {arguments[0]} has no stock servers: soak with --replicas", file=sys.stderr
        )
        return 2
    draw(result, Path(arguments[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
