"""The study that needs searches of its own: the weight of the alignment (Fig. 4), with CE-off."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eos_search.ablations.variants import Variant
from eos_search.settings import SearchSettings, read_settings
from eos_vllm.core.errors import EosError
from eos_vllm.core.profile import Profile

# The paper's sweep (section 4.1).
LAMBDAS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
CE_OFF = "CE off"
NO_REDUCER = "gate_threshold"


@dataclass(frozen=True)
class Search:
    """A search of the study: its label, its settings, and what of them it varies."""

    label: str
    settings: SearchSettings
    about: dict[str, Any]


def alignment_searches(settings: SearchSettings, folder: Path, lambdas: Sequence[float] = LAMBDAS) -> list[Search]:
    """One search for each weight of the alignment, and one on the alignment alone.

    Args:
        settings: of the search that is varied; CE-off takes its ``lambda_align``.
        folder: each search gets a folder of its own in here.
        lambdas: weights.

    Raises:
        SettingError: a weight below 0; or CE-off without alignment.
    """
    found = []
    for weight in dict.fromkeys(lambdas):
        changes = {"lambda_align": weight, "cross_entropy": True, "output": folder / f"lambda-{weight:g}"}
        about = {"lambda_align": weight, "cross_entropy": True}
        found.append(Search(f"lambda {weight:g}", _changed(settings, changes), about))
    alone = settings.lambda_align or max(lambdas, default=0.0)
    changes = {"lambda_align": alone, "cross_entropy": False, "output": folder / "ce-off"}
    found.append(Search(CE_OFF, _changed(settings, changes), {"lambda_align": alone, "cross_entropy": False}))
    return found


def run_searches(
    searches: Sequence[Search], say: Callable[[str], Any], quiet: bool = False
) -> tuple[list[Variant], dict[str, str]]:
    """Runs what has not run yet, and goes on with what was stopped.

    Args:
        searches: each with its own output folder.
        say: told which search comes next.
        quiet: no progress of the searches.

    Returns:
        A variant for each search that came to a profile, and the reason for each that has none: no gate was left above
        the threshold.

    Raises:
        SettingError: a folder holds a search of other settings.
    """
    variants, failed = [], {}
    for search in searches:
        say(f"search {search.label}: {search.settings.output}")
        try:
            profile = profile_of(search.settings, quiet)
        except EosError as error:
            if error.field != NO_REDUCER:
                raise
            failed[search.label] = str(error)
            continue
        variants.append(Variant(search.label, profile, {**search.about, "layers": list(profile.layers)}))
    return variants, failed


def profile_of(settings: SearchSettings, quiet: bool) -> Profile:
    """What a search found: read where it has ended, gone on with where it was stopped.

    Raises:
        EosError: as :func:`eos_search.run.run_search`; the folder holds a search of other settings.
    """
    from eos_search.restarts import read_or_search

    return read_or_search(settings, resume=True, quiet=quiet).profile


def _changed(settings: SearchSettings, changes: dict[str, Any]) -> SearchSettings:
    return read_settings({**settings.to_dict(), **changes})
