"""Plans of budgets, and measured points with whether a server can be asked for them: pure, no route and no engine."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from eos_vllm.analysis.advise import Catalogue
from eos_vllm.analysis.choices import Choices, Point, acts, choices
from eos_vllm.analysis.comparison import compare, held_reduced, held_stock
from eos_vllm.analysis.cost import Geometry, PromptCost
from eos_vllm.core.budget import RetainBudget, kept_counts, parse_budget, plain
from eos_vllm.core.errors import EosError, SettingError
from eos_vllm.core.plan import Planner
from eos_vllm.page.plan_documents import BudgetPlan, Cost, PlanRequest, Plans, PlanSegment, ServedPoint

MOST_PIXELS = 1 << 16


@dataclass
class PlanContext:
    """What the routes plan with.

    Attributes:
        planner: the server's; only its profile, budget, rounding and example are taken.
        geometry: sizes of the model.
        model: its name; ``embedded`` where it is the model that was measured.
        dtype: of the KV cache.
        block_size: tokens per KV block.
        size_tokens: visual tokens of an image of a width and height, where images have any number; None: not known.
    """

    planner: Planner
    geometry: Geometry
    model: str
    dtype: str = "float16"
    block_size: int = 16
    size_tokens: Callable[[int, int], int] | None = None
    measured: Choices = field(default_factory=choices)

    def planner_for(self, visual_tokens: int | None, size: tuple[int, int] | None) -> Planner:
        """A planner of its own, so that no request fills the server's memory of budgets.

        Raises:
            SettingError: tokens of an image that has another number, both, or a size that nobody can count.
        """
        profile = self.planner.profile
        if visual_tokens is not None and size is not None:
            raise SettingError("size", list(size), "visual_tokens says it already", "leave one of them out")
        if size is not None and not all(0 < pixels <= MOST_PIXELS for pixels in size):
            raise SettingError("size", list(size), "no image is of that size", f"give 1 to {MOST_PIXELS} pixels")
        if (fixed := profile.model.visual_tokens) is not None:
            if visual_tokens not in (None, fixed):
                problem = f"each image has {fixed} visual tokens, whatever its size"
                raise SettingError("visual_tokens", visual_tokens, problem, "leave it out")
            example: int | None = fixed
        elif size is not None:
            if self.size_tokens is None:
                raise SettingError("size", list(size), "its tokens are not known here", "give visual_tokens")
            example = self.size_tokens(*size)
        else:
            example = self.planner.example if visual_tokens is None else visual_tokens
        return Planner(profile, self.planner.budget, self.planner.block, example=example)

    @cached_property
    def catalogue(self) -> Catalogue:
        """The measured points, planned for this model. Raises as :class:`Catalogue`."""
        return Catalogue(self.measured, self.geometry, self.model, self.dtype, self.block_size)

    @cached_property
    def points(self) -> list[ServedPoint]:
        """The measured points, each with whether this server can be asked for it."""
        ours, fits = acts(self.planner.profile), self.geometry.visual_tokens == self.measured.visual_tokens
        same = {
            does: fits and acts(self.measured.profile(point)) == ours
            for does, point in {point.does: point for point in self.measured.points}.items()
        }
        found = []
        for point in self.measured.points:
            served = same[point.does] and self._means_the_same(point)
            here = list(self.planner.counts(point.budget)) if served else None
            found.append(ServedPoint(**point.model_dump(), served_here=served, counts_here=here))
        return found

    def _means_the_same(self, point: Point) -> bool:
        profile = self.planner.profile
        if profile.budget.measure != point.measure:
            return False
        try:
            return kept_counts(profile, point.budget) == point.counts
        except EosError:
            return False


def plan(context: PlanContext, wanted: PlanRequest) -> Plans:
    """Plans each budget.

    Raises:
        EosError: a budget or an image that cannot be planned.
    """
    planner = context.planner_for(wanted.visual_tokens, wanted.size)
    budgets = [None if value is None else parse_budget(value, "budgets") for value in wanted.budgets]
    found = [_plan_one(context, planner, wanted, budget) for budget in budgets]
    return Plans(
        profile=planner.profile.name,
        measure=planner.profile.budget.measure,
        visual_tokens=planner.visual_tokens,
        block_size=context.block_size,
        dtype=context.dtype,
        stock=found[0][1],
        plans=[plan for plan, _ in found],
    )


def _plan_one(
    context: PlanContext, planner: Planner, wanted: PlanRequest, budget: RetainBudget | None
) -> tuple[BudgetPlan, Cost]:
    kind = (context.dtype, context.block_size)
    prompt = compare(context.geometry, planner, wanted.text_tokens, wanted.images, budget, *kind)
    text = (wanted.text_tokens, wanted.output_tokens, wanted.images)
    held = held_reduced(context.geometry, planner, *text, budget, *kind)
    stock = held_stock(context.geometry, planner.visual_tokens, *text, *kind)
    mine = BudgetPlan(
        **_cost(held, prompt.reduced).model_dump(),
        budget=plain(planner.budget if budget is None else budget),
        counts=list(prompt.counts),
        layers=[-1] * (planner.profile.before is not None) + list(planner.profile.layers),
        layer_average=prompt.layer_average,
        final=prompt.final,
        kv_share=prompt.visual_kv_ratio,
        held_share=held.allocated_bytes / stock.allocated_bytes,
        flops_share=prompt.flops_ratio,
        segments=[
            PlanSegment(layer_from=s.first_layer, layers=s.layers, tokens=s.tokens, kv_blocks=s.blocks)
            for s in held.segments
        ],
    )
    return mine, _cost(stock, prompt.stock)


def _cost(held: PromptCost, prompt: PromptCost) -> Cost:
    return Cost(
        tokens=held.layer_tokens[0],
        layer_tokens=list(held.layer_tokens),
        kv_blocks=held.blocks,
        kv_bytes=held.allocated_bytes,
        prefill_flops=prompt.flops,
    )
