"""Which requests a run sends: visits of one or more requests, a pure function of the workload and its rows."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from eos_vllm.core.errors import SettingError
from loadtests.images import Picture
from loadtests.questions import Row
from loadtests.settings import Workload

FAULTS = ("no_json", "no_messages", "unknown_model", "broken_image", "too_long", "bad_budget")
_RECENT = 64


@dataclass(frozen=True)
class Ask:
    """One request before it is sent.

    Attributes:
        number: place in the run, from 0.
        scenario: kind of its visit.
        prompt: the question.
        pictures: shown with it.
        answer: what would be right, None where nobody knows.
        budget: retain budget that it names.
        abort_after: pieces of the answer after which the client leaves, None to stay.
        fault: what is wrong with it on purpose.
        question: place in its visit, from 1.
        system: system prompt in front of it; empty for none.
        starter: the first of a user of a steady closed loop; it is shorter than the others, and no figure's.
        output_tokens: length of its answer where it is not the run's.
    """

    number: int
    scenario: str
    prompt: str
    pictures: tuple[Picture, ...] = ()
    answer: str | None = None
    budget: int | None = None
    abort_after: int | None = None
    fault: str | None = None
    question: int = 1
    system: str = ""
    starter: bool = False
    output_tokens: int | None = None


@dataclass(frozen=True)
class Visit:
    """Requests that one user sends one after the other; a conversation if each carries what was said before."""

    asks: tuple[Ask, ...]
    conversation: bool = False


def visits(workload: Workload, rows: Sequence[Row]) -> Iterator[Visit]:
    """The visits of a run in order: endless, or ending with request ``workload.requests``.

    Two runs with equal seeds, rows and weights ask the same questions about the same pictures in the same order,
    whatever their budgets, servers and speeds are; only stamps differ with the label.

    Raises:
        SettingError: a scenario with images, and rows without any.
    """
    planner = _Planner(workload, rows)
    sent = 0
    while workload.requests is None or sent < workload.requests:
        asks, conversation = planner.visit(sent)
        if workload.requests is not None:
            asks = asks[: workload.requests - sent]
        sent += len(asks)
        yield Visit(tuple(asks), conversation)


class _Planner:
    """Draws visits; each kind of draw has its own stream of random numbers, so that one share leaves others alone."""

    def __init__(self, workload: Workload, rows: Sequence[Row]) -> None:
        self.workload = workload
        self.draws = {
            name: random.Random(f"{workload.seed}/{name}")
            for name in ("scenario", "order", "repeat", "budget", "abort", "fault")
        }
        groups: dict[tuple, list[Row]] = {}
        for row in rows:
            groups.setdefault(row.image_files, []).append(row)
        text_only = groups.pop((), [])
        needs_images = any(weight for name, weight in workload.scenarios.items() if name != "text_only")
        if needs_images and not groups:
            raise SettingError("rows", workload.rows, "no row has an image", "or give scenarios text_only=1")
        self.groups = self._shuffled([group for _, group in sorted(groups.items())])
        self.texts = self._shuffled(text_only or [row for group in groups.values() for row in group])
        self.long_texts = self._shuffled([row.prompt for row in rows])
        self.system = _fitted(
            "Answer as a careful observer would, " + next(self.long_texts), workload.system_characters
        )
        self.shown: list[tuple[list[Row], tuple[Picture, ...]]] = []
        self.copies, self.numbers = itertools.count(), itertools.count()

    def _shuffled(self, items: list) -> Iterator:
        items = list(items)
        self.draws["order"].shuffle(items)
        return itertools.cycle(items)

    def visit(self, number: int) -> tuple[list[Ask], bool]:
        """The next visit, whose first request is the run's ``number``-th."""
        weights = self.workload.scenarios
        scenario = self.draws["scenario"].choices(list(weights), list(weights.values()))[0]
        budgets = self.workload.budgets
        budget = self.draws["budget"].choice(budgets) if budgets else None
        if scenario == "text_only":
            parts: list[tuple[str, tuple[Picture, ...], str | None]] = [(next(self.texts).prompt, (), None)]
        else:
            parts = self._with_images(scenario)
        asks = []
        for i, (prompt, pictures, answer) in enumerate(parts):
            fault = self._fault()
            asks.append(
                Ask(
                    number=number + i,
                    scenario=scenario,
                    prompt=self._long_text(scenario) + _fitted(prompt, self.workload.prompt_characters),
                    pictures=pictures,
                    # A question that was padded, or asked within a conversation, is no longer the benchmark's.
                    answer=None if self.workload.prompt_characters else answer,
                    budget=budget,
                    abort_after=None if fault else self._abort(),
                    fault=fault,
                    question=i + 1,
                    system=self.system if scenario == "shared_system" else "",
                )
            )
        return asks, scenario == "multi_turn"

    def _long_text(self, scenario: str) -> str:
        """Text of a ``long_text`` question: other questions in ever new order, so that no cache knows it."""
        if scenario != "long_text":
            return ""
        text, wanted = f"Text {next(self.numbers)}.", self.workload.long_characters
        while len(text) < wanted:
            text += " " + next(self.long_texts)
        return text[: wanted - 1] + " "

    def _with_images(self, scenario: str) -> list[tuple[str, tuple[Picture, ...], str | None]]:
        group, pictures = self._pictures()
        if scenario == "two_images":
            _, others = self._pictures()
            return [(group[0].prompt, pictures + others, None)]
        if scenario == "several":
            chosen = list(itertools.islice(itertools.cycle(group), self.workload.questions_per_image))
            return [(row.prompt, pictures, row.answer) for row in chosen]
        if scenario == "multi_turn":
            chosen = list(itertools.islice(itertools.cycle(group), self.workload.turns))
            first, *rest = chosen
            return [(first.prompt, pictures, first.answer), *((row.prompt, (), None) for row in rest)]
        row = self.draws["order"].choice(group)
        return [(row.prompt, pictures, row.answer)]

    def _pictures(self) -> tuple[list[Row], tuple[Picture, ...]]:
        """Rows about one image (or set of images) and its pictures: new ones, or some that were shown before."""
        if self.draws["repeat"].random() < self.workload.repeat_share and self.shown:
            return self.draws["repeat"].choice(self.shown)
        group = next(self.groups)
        stamp = f"{self.workload.label}/{self.workload.seed}/{next(self.copies)}" if self.workload.distinct else ""
        shown = group, tuple(Picture(path, stamp) for path in group[0].image_files)
        self.shown = [*self.shown[1 - _RECENT :], shown]
        return shown

    def _abort(self) -> int | None:
        draw = self.draws["abort"]
        most = self.workload.abort_pieces
        most = self.workload.output_tokens // 2 if most is None else most
        leaves, after = draw.random() < self.workload.abort_share, draw.randint(0, most)
        return after if leaves else None

    def _fault(self) -> str | None:
        draw = self.draws["fault"]
        broken, fault = draw.random() < self.workload.malformed_share, draw.choice(FAULTS)
        return fault if broken else None


def starter(visit: Visit, user: int, users: int, output_tokens: int) -> Visit:
    """The first visit of a closed loop's user: shorter, so that users are spread over the loop and not in step.

    User 0 asks one question, user 1 two, and so on in turn; first answers have from 1 to all tokens.
    """
    asks = list(visit.asks[: 1 + user % len(visit.asks)])
    length = max(1, round(output_tokens * (user + 1) / users))
    asks[0] = replace(asks[0], starter=True, output_tokens=length)
    return replace(visit, asks=tuple(asks))


def _fitted(prompt: str, characters: int | None) -> str:
    if characters is None:
        return prompt
    return ((prompt + " ") * (characters // (len(prompt) + 1) + 1))[:characters]
