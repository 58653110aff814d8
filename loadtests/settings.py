"""What one run of locust depends on, checked before anything is sent; travels to locust's process as JSON."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from eos_vllm.core.errors import SettingError

# The field of `vllm_xargs`, as eos_vllm.core.budget has it: importing that would load torch into every locust process.
BUDGET_FIELD = "eos_retain"
SCENARIOS = ("single", "several", "multi_turn", "two_images", "text_only", "shared_system", "long_text")


@dataclass(frozen=True)
class Workload:
    """One locust run against one server.

    Attributes:
        base_url: the server, without ``/v1``.
        model: name under which it serves.
        rows: JSONL of questions (:mod:`loadtests.questions`).
        concurrency: users of the closed loop; each sends its next request when the last is answered.
        rate: visits per second of the open loop (Poisson arrivals); closed loop where None.
        requests: end after so many requests; all of them are waited for.
        seconds: start nothing new after so many seconds.
        window: measure a steady state for at least so many seconds (:mod:`loadtests.window`); what is still on its
            way when the window closes is cut off.
        window_requests: at least so many requests answered within the window of a closed loop.
        window_most: seconds after which the window closes all the same.
        open_ramp: seconds in front of an open loop's window; half its length where None.
        ramp_most: seconds after which the window opens though not every user has had an answer; also how long an open
            loop waits for answers when its window has closed.
        prepare: visits whose images are encoded before the first request, where the run's length is not known.
        budgets: retain budgets; each visit draws one. Empty: requests name none.
        scenarios: weight of each kind of visit.
        questions_per_image: of a ``several`` visit.
        turns: of a ``multi_turn`` visit.
        system_characters: length of the one system prompt that all ``shared_system`` requests begin with.
        long_characters: length of the text in front of a ``long_text`` question, another one for each visit.
        repeat_share: share of visits that show an image sent before in this run.
        distinct: flip lowest bits of some pixels so that no image equals one of another run, or its own first showing.
        label: name of the run; images of different labels are never equal where ``distinct`` is set.
        output_tokens: most tokens of an answer.
        fixed_output: answers have exactly that length (vLLM's ``ignore_eos``).
        prompt_characters: repeat or cut each question to this length, for a prompt of a known number of tokens.
        abort_share: share of requests whose stream the client closes half way.
        abort_pieces: pieces of the answer that it has seen by then at most; half of ``output_tokens`` where None.
        malformed_share: share of requests that are broken on purpose.
        timeout: seconds of silence after which a request is given up.
        seed: of every draw.
    """

    base_url: str
    model: str
    rows: str
    concurrency: int = 1
    rate: float | None = None
    requests: int | None = None
    seconds: float | None = None
    window: float | None = None
    window_requests: int = 1
    window_most: float = 60.0
    open_ramp: float | None = None
    ramp_most: float = 180.0
    prepare: int = 256
    budgets: tuple[int, ...] = ()
    scenarios: dict[str, float] = field(default_factory=lambda: {"single": 1.0})
    questions_per_image: int = 3
    turns: int = 3
    system_characters: int = 300
    long_characters: int = 600
    repeat_share: float = 0.0
    distinct: bool = True
    label: str = "run"
    output_tokens: int = 16
    fixed_output: bool = True
    prompt_characters: int | None = None
    abort_share: float = 0.0
    abort_pieces: int | None = None
    malformed_share: float = 0.0
    timeout: float = 600.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses what no run can mean.

        Raises:
            SettingError: the first setting that is out of range.
        """
        if not self.base_url.startswith(("http://", "https://")):
            raise SettingError("base_url", self.base_url, "it is no web address", "give http://host:port")
        object.__setattr__(self, "budgets", tuple(self.budgets))
        for name in (
            *("concurrency", "output_tokens", "questions_per_image", "turns", "window_requests", "prepare"),
            *("system_characters", "long_characters"),
        ):
            at_least_one(name, getattr(self, name))
        for name in ("requests", "prompt_characters"):
            if getattr(self, name) is not None:
                at_least_one(name, getattr(self, name))
        for name in ("rate", "seconds", "timeout", "window", "window_most", "open_ramp", "ramp_most"):
            value = getattr(self, name)
            if value is not None:
                above_zero(name, value, "leave it out, or give a positive number")
        if self.window is not None and (self.requests is not None or self.seconds is not None):
            remedy = "give either a window, or requests or seconds"
            raise SettingError("window", self.window, "a steady state ends with its window", remedy)
        if self.window is not None and self.window_most < self.window:
            problem = f"it is below the least, {self.window:g} s"
            raise SettingError("window_most", self.window_most, problem, "give the window's length or more")
        for name in ("repeat_share", "abort_share", "malformed_share"):
            share(name, getattr(self, name))
        for budget in self.budgets:
            at_least_one("budgets", budget)
        unknown = sorted(set(self.scenarios) - set(SCENARIOS))
        if unknown:
            raise SettingError("scenarios", unknown[0], "no such scenario", f"choose from {', '.join(SCENARIOS)}")
        if any(weight < 0 for weight in self.scenarios.values()) or not sum(self.scenarios.values()) > 0:
            raise SettingError("scenarios", self.scenarios, "weights are 0 or more, one of them more", "e.g. single=1")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"budgets": list(self.budgets)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Workload":
        """The other way.

        Raises:
            SettingError: an unknown or missing field, or a value out of range.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise SettingError(unknown[0], values[unknown[0]], "no such setting", f"choose from {sorted(known)}")
        if missing := [name for name in ("base_url", "model", "rows") if name not in values]:
            raise SettingError(missing[0], None, "it is missing", "a run needs base_url, model and rows")
        return cls(**values)

    @classmethod
    def read(cls, path: Path) -> "Workload":
        """Reads a JSON file.

        Raises:
            SettingError: it cannot be read, or as :meth:`from_dict`.
        """
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except OSError as e:
            raise SettingError("workload", str(path), f"it cannot be read ({e.strerror})", "name a JSON file") from None
        except json.JSONDecodeError as e:
            raise SettingError("workload", str(path), f"it is no JSON ({e})", "see loadtests/settings.py") from None


def at_least_one(name: str, value: Any) -> None:
    """Refuses what is no whole number of 1 or more.

    Raises:
        SettingError: names the setting.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SettingError(name, value, "it must be a whole number of 1 or more", "give 1 or more")


def above_zero(name: str, value: float, remedy: str) -> None:
    """Refuses what is not above 0.

    Raises:
        SettingError: names the setting.
    """
    if not value > 0:
        raise SettingError(name, value, "it must be above 0", remedy)


def share(name: str, value: Any) -> None:
    """Refuses what is no share.

    Raises:
        SettingError: names the setting.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise SettingError(name, value, "a share lies between 0 and 1", "give 0 for none, 1 for all")


def parse_weights(text: str) -> dict[str, float]:
    """``single=3,text_only=1`` as a mapping.

    Raises:
        SettingError: an entry without a number.
    """
    weights = {}
    for entry in text.split(","):
        name, _, value = entry.partition("=")
        try:
            weights[name.strip()] = float(value or 1)
        except ValueError:
            raise SettingError("scenarios", entry, "its weight is no number", "e.g. single=3,text_only=1") from None
    return weights
