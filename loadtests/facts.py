"""How a sweep was measured, for its page: what a reader needs to judge the figures, or to measure again."""

import json
from typing import Any

from loadtests.results import Results

# Told elsewhere on the page, or in words of their own below.
_TOLD = {"subjects", "phases", "kv_cache_bytes", "budgets"}


def facts(results: Results) -> list[tuple[str, str]]:
    """Names and values, in reading order."""
    return [*_subjects(results), *_sessions(results), *_load(results), *_rest(results)]


def _subjects(results: Results) -> list[tuple[str, str]]:
    found = []
    for name, subject in results.settings["subjects"].items():
        parameters = f", {subject['parameters']:,} parameters" if subject.get("parameters") else ""
        found.append((f"model ({name})", f"{subject['name']}{parameters}"))
    return found


def _sessions(results: Results) -> list[tuple[str, str]]:
    found = []
    for session in results.sessions:
        origin = session["provenance"]
        seconds = f"{session['seconds']} s" if "seconds" in session else "stopped before its end"
        found += [
            ("measured", f"{origin['created']}, {seconds}; git {origin['git']}"),
            ("command", origin["command"]),
            ("machine", _joined(origin["machine"])),
            ("versions", _joined(origin["versions"])),
        ]
    return found


def _load(results: Results) -> list[tuple[str, str]]:
    requests = {
        f"{phase['name']}, {load['rate'] or load['concurrency']}": load["requests"]
        for phase in results.settings["phases"]
        for load in phase["loads"]
    }
    shown = [cell.repeated_images for cell in results.cells]
    again, images = sum(r for r, _ in shown), sum(n for _, n in shown)
    return [
        ("requests of each run (phase, load)", _joined(requests)),
        ("image reuse", f"{again} of {images} images had been shown before in the same run, none in another run"),
        ("seeds", ", ".join(str(seed) for seed in sorted({cell.seed for cell in results.cells}))),
    ]


def _rest(results: Results) -> list[tuple[str, str]]:
    found = [
        (name.replace("_", " "), _joined(value) if isinstance(value, dict) else str(value))
        for name, value in results.settings.items()
        if name not in _TOLD and value is not None
    ]
    if results.settings["servers"] != "given":
        found.append(("prefix caching, chunked prefill", "off in both servers"))
    return found


def _joined(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def profile_text(results: Results) -> dict[str, str]:
    """Each profile as JSON by the phases that it served; equal ones stand there once."""
    found: dict[str, list[str]] = {}
    for phase, subject in results.settings["subjects"].items():
        if subject.get("profile") is not None:
            found.setdefault(json.dumps(subject["profile"], indent=1), []).append(phase)
    return {", ".join(phases): text for text, phases in found.items()}
