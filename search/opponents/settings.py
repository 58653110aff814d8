"""Settings of an opponent: what its result depends on, as plain data in its folder and as a command."""

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eos_search.opponents.base import Method
from eos_search.opponents.judge import Budget
from eos_search.opponents.space import check_names
from eos_search.selectors import NAMED
from eos_vllm.cluttervqa import VERSIONS
from eos_vllm.core.errors import SettingError
from eos_vllm.core.profile import QueryRule

QUERIES: tuple[QueryRule, ...] = ("relevant_text", "all_text", "last_text", "image")
DEFAULT_SELECTORS = tuple(name for name in NAMED if name != "cls")
MINIMUMS = (1, 8, 16)
# The questions that may choose a profile; those that judge it in the end are others.
SPLIT = "validation"


@dataclass(frozen=True)
class OpponentSettings:
    """All that the result depends on.

    Attributes:
        method: which opponent.
        costs: layer averages in tokens; the first is the profile's own.
        budget: CPU-seconds or questions.
        model: directory of a LLaVA, or ``embedded``.
        seed: of what is drawn.
        name: of the exported profile.
        images: validation images of the last rung.
        first_images: those of the first.
        max_reducers: most reducers, one before the decoder included; of random search and TPE.
        selectors: names in :data:`~eos_search.selectors.NAMED`, of random search and TPE; may be empty.
        queries: query rules to choose from.
        minimums: least counts after any reducer to choose from, 1 first.
        benchmark_version: of ClutterVQA.
        max_tokens: longest answer.
    """

    method: Method
    costs: tuple[int, ...]
    budget: Budget
    model: str = "embedded"
    seed: int = 0
    name: str = "opponent"
    images: int = 72
    first_images: int = 8
    max_reducers: int = 3
    selectors: tuple[str, ...] = DEFAULT_SELECTORS
    queries: tuple[str, ...] = QUERIES
    minimums: tuple[int, ...] = MINIMUMS
    benchmark_version: int = 1
    max_tokens: int = 8

    def __post_init__(self) -> None:
        """Refuses what cannot be.

        Raises:
            SettingError: a value out of range, an unknown name, or no budget.
        """
        for name in ("images", "first_images", "max_reducers", "max_tokens"):
            if getattr(self, name) < 1:
                raise SettingError(name, getattr(self, name), "is below 1", "give 1 or more")
        if self.first_images > self.images:
            problem = f"there are {self.images} images in all"
            raise SettingError("first_images", self.first_images, problem, "give fewer, or more images")
        if not 0 <= self.seed < 2**32:
            raise SettingError("seed", self.seed, "this is no seed", "give 0 to 4294967295")
        if not 1 <= len(self.name) <= 200:
            raise SettingError("name", self.name, "this is no name of a profile", "give 1 to 200 characters")
        if self.benchmark_version not in VERSIONS:
            problem = "is none of ClutterVQA"
            raise SettingError(
                "benchmark_version", self.benchmark_version, problem, f"choose from {', '.join(map(str, VERSIONS))}"
            )
        if not self.queries:
            raise SettingError("queries", "", "names no query rule", f"choose from {', '.join(QUERIES)}")
        check_names("queries", self.queries, QUERIES)
        check_names("selectors", self.selectors, tuple(NAMED))
        self._check_numbers()

    def _check_numbers(self) -> None:
        if not self.costs or len(set(self.costs)) < len(self.costs):
            raise SettingError("cost", list(self.costs), "these are no different costs", "give one or more, each once")
        if self.minimums[:1] != (1,) or list(self.minimums) != sorted(set(self.minimums)):
            problem = "these are no minimums"
            raise SettingError(
                "minimums", list(self.minimums), problem, "give 1 and, ascending, what else may be tried"
            )
        seconds, questions = self.budget.seconds, self.budget.questions
        if (seconds is None) == (questions is None):
            problem = "an opponent has one budget"
            raise SettingError("seconds", seconds, problem, "give one of --seconds, --like and --questions")
        if seconds is not None and not 0 < seconds < float("inf"):
            raise SettingError("seconds", seconds, "this is no time", "give CPU-seconds above 0")
        if questions is not None and questions < 1:
            raise SettingError("questions", questions, "is below 1", "give 1 or more")

    def check_model(self, visual_tokens: int) -> None:
        """Whether the costs are those of a reduction, and the minimums possible.

        Raises:
            SettingError: a cost is below 1, or not below what an image has; or a minimum is above that.
        """
        for cost in self.costs:
            if not 1 <= cost < visual_tokens:
                problem = f"an image has {visual_tokens} visual tokens"
                raise SettingError("cost", cost, problem, f"give 1 to {visual_tokens - 1}")
        if self.minimums[-1] > visual_tokens:
            problem = f"an image has {visual_tokens} visual tokens"
            raise SettingError("minimums", self.minimums[-1], problem, f"give 1 to {visual_tokens}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without folders of the machine."""
        data = asdict(self) | asdict(self.budget)
        del data["budget"]
        lists = {name: list(value) for name, value in data.items() if isinstance(value, tuple)}
        path = Path(self.model)
        return data | lists | {"model": path.name if path.is_absolute() else self.model}

    def command_line(self) -> str:
        """The command that does the same: all settings that are not at their defaults."""
        defaults = {name: field.default for name, field in type(self).__dataclass_fields__.items()}
        words = ["eos-search", "oppose"]
        for name, value in self.to_dict().items():
            default = defaults.get(name)
            if value is None or value == (list(default) if isinstance(default, tuple) else default):
                continue
            flag = "cost" if name == "costs" else name.replace("_", "-")
            text = ",".join(map(str, value)) or "none" if isinstance(value, list) else f"{value}"
            words += [f"--{flag}", text]
        return shlex.join(words)
