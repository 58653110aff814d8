"""What the study of gradients says: means with standard errors; whose sign, order and size are right."""

from collections.abc import Mapping
from math import sqrt
from typing import Any

import numpy as np

from eos_search.estimators.base import KEEP_NAMES

BRUTE = "brute"
# A reference that is not further than this from 0, in standard errors, has no sign, and no ratio is taken to it.
_SURE = 2.0
RATIO = (0.5, 2.0)


def summarise(result: Mapping[str, Any]) -> dict[str, Any]:
    """Means, ratios and verdicts of a raw result.

    Args:
        result: with ``rows`` and ``points`` of :func:`eos_search.ablations.gradients.run_gradients`.

    Returns:
        ``summary``: by mode, the acting layers and for each estimator and the reference ``mean``, ``se`` and ``sd`` by
        layer, ``ratio`` of the means and its standard error ``ratio_se`` (None where the reference is not clearly other
        than 0); and ``verdicts`` by estimator. ``default``: the estimators for which all of these hold in all modes.
    """
    rows = result["rows"]
    if len(rows) < 2:
        return {"summary": {}, "default": []}
    summary = {name: _mode(result, name) for name in rows[0]["gradients"]}
    passed = [
        name
        for name in KEEP_NAMES
        if all(all(entry["verdicts"][name][what] for what in ("sign", "order", "size")) for entry in summary.values())
    ]
    return {"summary": summary, "default": passed}


def _mode(result: Mapping[str, Any], name: str) -> dict[str, Any]:
    rows = [row["gradients"][name] for row in result["rows"]]
    values = {who: np.array([row[who] for row in rows], dtype=float) for who in rows[0]}
    layers = result["points"][name.split(", ", maxsplit=1)[0]]["layers"]
    brute = values[BRUTE]
    clear = np.abs(brute.mean(axis=0)) > _SURE * _error(brute)
    entry: dict[str, Any] = {"layers": layers, "clear": clear.tolist(), "estimates": {}, "verdicts": {}}
    for who, found in values.items():
        estimate = {"mean": found.mean(axis=0).tolist(), "se": _error(found).tolist(), "sd": _spread(found).tolist()}
        if who != BRUTE:
            estimate |= _ratios(found, brute, clear)
            entry["verdicts"][who] = _verdict(found, brute, clear, estimate["ratio"])
        entry["estimates"][who] = estimate
    return entry


def _verdict(found: np.ndarray, brute: np.ndarray, clear: np.ndarray, ratio: list[float | None]) -> dict[str, bool]:
    theirs, ours = brute.mean(axis=0), found.mean(axis=0)
    order = True
    for one in range(len(theirs)):
        for other in range(one):
            apart = brute[:, one] - brute[:, other]
            # Only layers that the reference tells apart have an order.
            if abs(apart.mean()) > _SURE * _error(apart[:, None])[0]:
                order &= bool((ours[one] - ours[other]) * apart.mean() > 0)
    size = all(RATIO[0] <= value <= RATIO[1] for value in ratio if value is not None)
    return {"sign": bool((np.sign(ours) == np.sign(theirs))[clear].all()), "order": order, "size": size}


def _ratios(found: np.ndarray, brute: np.ndarray, clear: np.ndarray) -> dict[str, list[float | None]]:
    """Ratio of means and its standard error by the delta method, paired over questions."""
    ratios: list[float | None] = []
    errors: list[float | None] = []
    for layer, sure in enumerate(clear):
        if not sure:
            ratios.append(None)
            errors.append(None)
            continue
        ratio = found[:, layer].mean() / brute[:, layer].mean()
        left = found[:, layer] - ratio * brute[:, layer]
        ratios.append(float(ratio))
        errors.append(float(_error(left[:, None])[0] / abs(brute[:, layer].mean())))
    return {"ratio": ratios, "ratio_se": errors}


def _spread(values: np.ndarray) -> np.ndarray:
    return values.std(axis=0, ddof=1)


def _error(values: np.ndarray) -> np.ndarray:
    return _spread(values) / sqrt(len(values))


def gradients_table(result: Mapping[str, Any]) -> str:
    """A table for each mode: gradient of the loss to the discard of each layer (standard error), ratio and verdicts."""
    lines = []
    for name, entry in result["summary"].items():
        heads = [f"layer {layer}" for layer in entry["layers"]]
        marks = ["ratio", "sign", "order", "0.5 to 2"]
        lines += [f"{name}:", "", "| " + " | ".join(["estimator", *heads, *marks]) + " |"]
        lines += ["| --- " * (1 + len(heads) + len(marks)) + "|"]
        for who, estimate in entry["estimates"].items():
            cells = [f"{mean:.2f} ({se:.2f})" for mean, se in zip(estimate["mean"], estimate["se"], strict=True)]
            if who in entry["verdicts"]:
                ratio = " ".join("-" if value is None else f"{value:.2f}" for value in estimate["ratio"])
                verdict = ["yes" if entry["verdicts"][who][what] else "no" for what in ("sign", "order", "size")]
            else:
                ratio, verdict = "", ["", "", ""]
            lines.append("| " + " | ".join([who, *cells, ratio, *verdict]) + " |")
        lines.append("")
    right = ", ".join(result["default"]) or "none"
    return "\n".join([*lines, f"Sign, order and size right in all of these: {right}."])
