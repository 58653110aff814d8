"""Requests, images and kept tokens by retain budget, counted where they are scheduled."""

from eos_vllm.core.budget import RetainBudget
from eos_vllm.core.errors import BudgetError
from eos_vllm.core.plan import Planner, RequestPlan
from eos_vllm.serving.metrics import Counters
from eos_vllm.serving.requests import budget_of

# Time series of one metric and engine, whatever clients ask for, beside that of all others.
MOST = 32
OTHER = "other"


class BudgetCounts:
    """Adds to an engine's :class:`Counters` by budget. Clients choose budgets, so labels are bounded."""

    def __init__(self, counters: Counters, planner: Planner) -> None:
        self.counters, self.planner = counters, planner
        self.labels = {str(planner.budget)}

    def label(self, budget: RetainBudget | None) -> str:
        """The budget in words, the server's own where None; the first :data:`MOST` have labels of their own."""
        label = str(self.planner.budget if budget is None else budget)
        if label not in self.labels:
            if len(self.labels) >= MOST:
                return OTHER
            self.labels.add(label)
        return label

    def label_of(self, sampling_params: object) -> str:
        """Of a request; a budget that is none falls back to the server's, as its plan does."""
        try:
            return self.label(budget_of(sampling_params))  # type: ignore[arg-type]
        except BudgetError:
            return self.label(None)

    def request(self, sampling_params: object) -> None:
        """Counts a request with images."""
        self.counters.add("requests", self.label_of(sampling_params), 1)

    def images(self, sampling_params: object, images: int, kept: int) -> None:
        """Counts images of a request that a step reduces, and their visual tokens behind the last reducer."""
        label = self.label_of(sampling_params)
        self.counters.add("budget_images", label, images)
        self.counters.add("budget_kept", label, kept)

    def planned(self, sampling_params: object, plan: RequestPlan, images: range) -> None:
        """As :meth:`images`, by the request's plan."""
        self.images(sampling_params, len(images), sum(plan.kept[i][-1] - len(plan.spans[i].text) for i in images))
