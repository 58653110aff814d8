"""A prompt under a profile against the same prompt without one: both measures, KV memory, FLOPs and the ceiling."""

from dataclasses import dataclass, replace
from typing import Any

from eos_vllm.analysis.cost import Geometry, PromptCost, flops_crossover, prompt_cost
from eos_vllm.core.budget import RetainBudget, cost, layer_average, plain
from eos_vllm.core.errors import SettingError
from eos_vllm.core.plan import ImageSpan, Planner, RequestPlan
from eos_vllm.core.profile import SCHEMA, BudgetMeasure, Profile, check_fits, parse_profile


@dataclass(frozen=True)
class CostComparison:
    """A prompt under a plan against the same prompt without one; ``final`` and ``layer_average`` are per image.

    ``budget`` is tokens, or a share.
    """

    budget: int | float | str
    counts: tuple[int, ...]
    final: int
    layer_average: float
    stock: PromptCost
    reduced: PromptCost

    @property
    def flops_ratio(self) -> float:
        """Prefill FLOPs of the language model, reduced by stock."""
        return self.reduced.flops / self.stock.flops

    @property
    def prefill_ceiling(self) -> float:
        """Speed-up of the language model's prefill if time followed FLOPs and reducing were free."""
        return 1.0 / self.flops_ratio

    @property
    def visual_kv_ratio(self) -> float:
        """KV bytes of visual tokens, reduced by stock, not rounded to blocks."""
        return self.reduced.visual_kv_bytes / self.stock.visual_kv_bytes

    @property
    def kv_ratio(self) -> float:
        """KV memory held, reduced by stock, in whole blocks: 1 / it is how many times the requests fit."""
        return self.reduced.allocated_bytes / self.stock.allocated_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``eos-vllm plan --json``."""
        return {
            "budget": self.budget,
            "counts": list(self.counts),
            "layer_average": self.layer_average,
            "visual_kv_ratio": self.visual_kv_ratio,
            "final": self.final,
            "flops_ratio": self.flops_ratio,
            "prefill_ceiling": self.prefill_ceiling,
            "kv_ratio": self.kv_ratio,
            "stock": self.stock.to_dict(),
            "reduced": self.reduced.to_dict(),
        }


def compare(
    geometry: Geometry,
    planner: Planner,
    text_tokens: int = 88,
    images: int = 1,
    budget: RetainBudget | None = None,
    dtype: str = "float16",
    block_size: int = 16,
) -> CostComparison:
    """Cost of ``text_tokens`` of text and ``images`` images under the planner's profile, against stock.

    Where the images stand makes no difference to the cost. ``budget`` is per image, the planner's own where None.

    Raises:
        ProfileError: the profile was made for another model.
        SettingError: no image, negative text, or as :func:`prompt_cost`.
        BudgetError: as :func:`eos_vllm.core.budget.kept_counts`.
    """
    profile = planner.profile
    check_fits(profile, geometry)
    if text_tokens < 0:
        raise SettingError("text-tokens", text_tokens, "there is no negative text", "give 0 or more")
    if images < 1:
        raise SettingError("images", images, "without an image nothing is reduced", "give 1 or more")
    visual, entering = planner.visual_tokens, planner.image_tokens(budget)
    spans, whole = ([ImageSpan(i * n, n) for i in range(images)] for n in (entering, visual))
    counts = planner.counts(budget)
    unreduced = RequestPlan(images * visual + text_tokens, tuple(whole), ((visual,),) * images)
    return CostComparison(
        budget=plain(planner.budget if budget is None else budget),
        counts=counts,
        final=int(cost(profile, counts, "final", visual)),
        layer_average=layer_average(profile, counts, visual),
        stock=prompt_cost(geometry, unreduced, (geometry.num_decoder_layers,), dtype, block_size),
        reduced=prompt_cost(
            geometry,
            planner.plan(range(images * entering + text_tokens), spans, budget),
            profile.segment_layers(),
            dtype,
            block_size,
        ),
    )


def held_reduced(
    geometry: Geometry,
    planner: Planner,
    text_tokens: int,
    output_tokens: int,
    images: int,
    budget: RetainBudget | None = None,
    dtype: str = "float16",
    block_size: int = 16,
) -> PromptCost:
    """What a request holds under the planner's profile once ``output_tokens`` tokens are generated; as :func:`compare`.

    KV and blocks are of prompt and answer. FLOPs are no prefill's then; without an answer they are :func:`compare`'s.
    """
    entering = planner.image_tokens(budget)
    spans = [ImageSpan(i * entering, entering) for i in range(images)]
    plan = planner.plan(range(images * entering + text_tokens), spans, budget)
    plan = replace(plan, prompt_length=plan.prompt_length + output_tokens)
    return prompt_cost(geometry, plan, planner.profile.segment_layers(), dtype, block_size)


def held_stock(
    geometry: Geometry,
    visual_tokens: int,
    text_tokens: int,
    output_tokens: int,
    images: int,
    dtype: str = "float16",
    block_size: int = 16,
) -> PromptCost:
    """The same without a profile, of images of ``visual_tokens`` each."""
    spans = tuple(ImageSpan(i * visual_tokens, visual_tokens) for i in range(images))
    plan = RequestPlan(images * visual_tokens + text_tokens + output_tokens, spans, ((visual_tokens,),) * images)
    return prompt_cost(geometry, plan, (geometry.num_decoder_layers,), dtype, block_size)


def measured_by(profile: Profile, measure: BudgetMeasure, geometry: Geometry) -> Profile:
    """The profile with its budgets read by ``measure``, and no published schedule: to compare it at equal cost.

    Raises:
        ProfileError: the profile cannot be measured so.
    """
    data = profile.to_dict()
    data |= {"schema": SCHEMA, "schedules": {}}
    data["importance"] |= {} if profile.window == "image" else {"window": profile.window}
    data["model"]["flops_crossover"] = flops_crossover(geometry)
    data["budget"]["measure"] = measure
    return parse_profile(data, profile.name)
