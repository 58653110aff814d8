"""The searches of a comparison: by gradients, and then each opponent with the CPU-seconds that those took."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from eos_search.frozen import model_path, model_sizes
from eos_search.opponents.base import Method
from eos_search.opponents.contest import make_opponent, run_opponent
from eos_search.opponents.costs import OFF, at_costs, nearest_counts
from eos_search.opponents.judge import Budget
from eos_search.opponents.settings import DEFAULT_SELECTORS, MINIMUMS, SPLIT, OpponentSettings
from eos_search.process import ends_its_process, stopped_together
from eos_search.raw import digest, weights_digest
from eos_search.restarts import run_restarts
from eos_search.run_folder import SETTINGS, THETA
from eos_search.settings import SearchSettings, read_settings
from eos_search.spent import seconds_of
from eos_search.starts import Start
from eos_vllm.core.budget import layer_average
from eos_vllm.core.errors import BudgetError, SettingError
from eos_vllm.core.profile import Profile, read_profile

GRADIENT = "gradient"


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        config: settings of the gradient search, but for seed, name, output, and the budgets that it serves: the costs.
        starts: that it begins from; the end with the lowest loss is taken, and the time of all of them counts.
        opponents: who searches as long.
        costs: layer averages in tokens.
        seeds: of every search.
        out: folder of all of it.
        images: validation images on which opponents judge in the end.
        race: steps behind which the best third of the starts goes on alone.
    """

    config: Mapping[str, Any]
    starts: Sequence[Start]
    opponents: Sequence[Method]
    costs: tuple[int, ...]
    seeds: tuple[int, ...]
    out: Path
    images: int = 72
    race: int | None = None

    def gradient(self, seed: int) -> SearchSettings:
        """Settings of the gradient search of a seed."""
        name = f"{GRADIENT}-s{seed}"
        own = {"seed": seed, "name": name, "output": self.out / name, "device": "cpu", "serve_budgets": self.costs}
        return read_settings({**self.config, **own})

    def check(self) -> None:
        """Refuses what would only fail after hours.

        Raises:
            SettingError: no seed, cost or opponent, a model, measure, cost or version that opponents cannot have, or
                a package that one of them lacks.
        """
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise SettingError("seeds", list(self.seeds), "these are no seeds", "give one or more, each once")
        settings = self.gradient(self.seeds[0])
        if settings.data_format != "cluttervqa":
            problem = f"opponents are judged on ClutterVQA's {SPLIT} split"
            raise SettingError("data_format", settings.data_format, problem, "compare on cluttervqa")
        if settings.budget_measure != "layer_average":
            problem = "costs are layer averages"
            raise SettingError("budget_measure", settings.budget_measure, problem, "search by layer_average")
        if settings.split == "test" or (settings.split == SPLIT and self.opponents):
            raise SettingError("split", settings.split, "a search may not see it", "take train")
        sizes = model_sizes(settings.model)
        for method in self.opponents:
            own = self.opponent(method, self.seeds[0], 1.0)
            own.check_model(sizes.visual_tokens or 0)
            make_opponent(own, sizes)

    def opponent(self, method: Method, seed: int, seconds: float) -> OpponentSettings:
        """Settings of an opponent."""
        settings = self.gradient(seed)
        begun = [read_settings({**settings.to_dict(), **start}) for start in self.starts]
        selectors = {own.select for own in begun if own.select is not None}
        return OpponentSettings(
            method=method,
            costs=self.costs,
            budget=Budget(seconds, None),
            model=settings.model,
            seed=seed,
            name=f"{method}-s{seed}",
            images=self.images,
            first_images=min(8, self.images),
            # One before the decoder is one more than C.
            max_reducers=settings.max_reducers + bool(selectors),
            selectors=(*DEFAULT_SELECTORS, *sorted(selectors - set(DEFAULT_SELECTORS))),
            minimums=tuple(sorted({*MINIMUMS, *(own.minimum for own in begun)})),
            benchmark_version=settings.benchmark_version,
        )


@dataclass(frozen=True)
class Found:
    """A profile that a search found.

    Attributes:
        method: gradient, or an opponent.
        seed: of the search.
        profile: with a schedule for each cost that its layers can have.
        costs: those.
        cpu_seconds: that the search took.
    """

    method: str
    seed: int
    profile: Profile
    costs: tuple[int, ...]
    cpu_seconds: float

    def about(self) -> dict[str, Any]:
        """Plain data for a raw result."""
        return {
            "profile": self.profile.name,
            "does": digest(self.profile),
            "method": self.method,
            "seed": self.seed,
            "layers": [reducer.layer for reducer in self.profile.reducers],
            "select": None if self.profile.selector is None else self.profile.selector.model_dump(),
            "costs": list(self.costs),
            "cpu_seconds": round(self.cpu_seconds, 1),
            "theta": self.profile.to_dict(),
        }


def run_searches(plan: Plan, processes: int | None, say: Callable[[str], Any]) -> Iterator[Found]:
    """Searches whatever has not been searched yet, and gives what was found, method by method.

    Args:
        plan: what is compared.
        processes: gradient searches at a time, and processes of an opponent; one for each core where None.
        say: told of each search that begins.

    Raises:
        EosError: as the searches.
    """
    plan.check()
    for seed, profile in zip(plan.seeds, _gradient_searches(plan, processes, say), strict=True):
        yield _found(GRADIENT, seed, profile, plan, seconds_of(plan.out / f"{GRADIENT}-s{seed}"))
    for method in plan.opponents:
        for seed in plan.seeds:
            seconds = seconds_of(plan.out / f"{GRADIENT}-s{seed}")
            settings = plan.opponent(method, seed, seconds)
            folder = plan.out / settings.name
            say(f"{settings.name}: {seconds:.0f} CPU-seconds")
            yield _found(method, seed, _opponent(settings, folder, processes), plan, seconds_of(folder))


def _gradient_searches(plan: Plan, processes: int | None, say: Callable[[str], Any]) -> Iterator[Profile]:
    wanted = [plan.gradient(seed) for seed in plan.seeds]
    # Each takes one thread, whose number would show in the last bits.
    at_once = min(len(wanted), processes or os.cpu_count() or 1)
    if at_once == 1:
        for settings in wanted:
            say(settings.name)
            yield _search(settings, plan.starts, plan.race)
        return
    say(", ".join(settings.name for settings in wanted))
    with ProcessPoolExecutor(at_once, mp_context=get_context("spawn")) as pool, stopped_together(pool):
        yield from pool.map(_search_apart, wanted, [plan.starts] * len(wanted), [plan.race] * len(wanted))


def _search_apart(settings: SearchSettings, starts: Sequence[Start], race: int | None) -> Profile:
    with ends_its_process():
        return _search(settings, starts, race)


def _search(settings: SearchSettings, starts: Sequence[Start], race: int | None) -> Profile:
    # What has ended is checked against these settings, and not searched again.
    return run_restarts(settings, starts, resume=True, quiet=True, race=race).profile


def _opponent(settings: OpponentSettings, folder: Path, processes: int | None) -> Profile:
    if not (folder / THETA).exists():
        return run_opponent(settings, folder, (folder / SETTINGS).exists(), processes).profile
    held = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    for name, value in (settings.to_dict() | {"weights": weights_digest(model_path(settings.model))}).items():
        had_more = name == "seconds" and (held.get(name) or 0.0) >= value  # an advantage for it, if any
        if held.get(name) != value and not had_more:
            problem = f"the search in {folder} has {held.get(name)!r}"
            raise SettingError(name, value, problem, "give the same settings, or another --runs")
    return read_profile(folder / THETA)


def _found(method: str, seed: int, profile: Profile, plan: Plan, seconds: float) -> Found:
    priced, costs = at_reachable_costs(profile, plan.costs)
    if not costs:
        problem = f"the layers of {profile.name} can have none of them"
        raise SettingError("costs", list(plan.costs), problem, "compare at higher costs")
    return Found(method, seed, priced, costs, seconds)


def at_reachable_costs(profile: Profile, costs: Sequence[int]) -> tuple[Profile, tuple[int, ...]]:
    """The profile with a schedule for each cost that its layers can have, its own where it has one, and these costs."""
    own = {str(cost): profile.schedules[str(cost)] for cost in costs if _has_own(profile, cost)}
    draft = profile.model_copy(update={"schedules": own})
    reachable = []
    for cost in costs:
        try:
            nearest_counts(draft, cost)
        except BudgetError:
            continue
        reachable.append(cost)
    return (at_costs(draft, reachable) if reachable else profile), tuple(reachable)


def _has_own(profile: Profile, cost: int) -> bool:
    counts = profile.schedules.get(str(cost))
    return counts is not None and abs(layer_average(profile, counts) - cost) <= OFF
