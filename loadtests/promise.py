"""What a plan promises for the requests of a load test: KV blocks, requests that fit, the ceiling of the speed-up."""

from dataclasses import dataclass

from eos_vllm.core.comparison import CostComparison, compare
from eos_vllm.core.cost import Geometry, PromptCost, layer_flops
from eos_vllm.core.plan import ImageSpan, Planner
from eos_vllm.core.profile import Profile


@dataclass(frozen=True)
class Promise:
    """The plan of one image request with ``text_tokens`` of text that answers ``outputs`` tokens.

    Attributes:
        counts: visual tokens after each reducer.
        final: visual tokens after the last.
        layer_average: mean over layers of the visual tokens that a layer caches.
        blocks: KV blocks that it holds at its end.
        first_blocks: those that it holds when its prompt is in.
        block_bytes: bytes of one of them.
        stock_bytes: KV memory that the same request holds at its end in stock vLLM.
        by_tokens: speed-up if time followed the tokens of all layers, prompt and output.
        by_flops: speed-up if time followed the language model's FLOPs.
    """

    counts: tuple[int, ...]
    final: int
    layer_average: float
    blocks: int
    first_blocks: int
    block_bytes: int
    stock_bytes: int
    by_tokens: float
    by_flops: float

    @property
    def kv_bytes(self) -> int:
        """KV memory that the request holds at its end."""
        return self.blocks * self.block_bytes

    def fits(self, pool_bytes: int) -> int:
        """Requests that a KV cache of this size holds at their end; one block is vLLM's own."""
        return (pool_bytes // self.block_bytes - 1) // self.blocks


def promise(
    geometry: Geometry,
    profile: Profile,
    budget: int | None,
    text_tokens: int,
    outputs: int,
    dtype: str = "float32",
    block_size: int = 32,
) -> Promise:
    """The promise of a budget; of stock vLLM, one KV group and no reduction, where ``budget`` is None.

    Raises:
        EosError: as :func:`eos_vllm.core.comparison.compare`.
    """
    planner = Planner(profile)
    visual = profile.model.visual_tokens
    asked = visual if budget is None else budget
    start = compare(geometry, planner, text_tokens, 1, asked, dtype, block_size)
    end = compare(geometry, planner, text_tokens + outputs, 1, asked, dtype, block_size)
    held = _side(end, budget)
    by_tokens, by_flops = _ceilings(geometry, planner, start, text_tokens, outputs, budget)
    return Promise(
        counts=start.counts,
        final=start.final,
        layer_average=start.layer_average,
        blocks=held.blocks,
        first_blocks=_side(start, budget).blocks,
        block_bytes=held.block_bytes,
        stock_bytes=end.stock.allocated_bytes,
        by_tokens=by_tokens,
        by_flops=by_flops,
    )


def _side(comparison: CostComparison, budget: int | None) -> PromptCost:
    return comparison.stock if budget is None else comparison.reduced


def _ceilings(
    geometry: Geometry, planner: Planner, start: CostComparison, text: int, outputs: int, budget: int | None
) -> tuple[float, float]:
    """As ``benchmarks/throughput.py`` counts them: every output token passes all layers, in stock and eos alike."""
    if budget is None:
        return 1.0, 1.0
    profile = planner.profile
    visual = profile.model.visual_tokens
    prompt = visual + text
    plan = planner.plan(prompt, [ImageSpan(0, visual)], budget)
    layers = profile.segment_layers()
    ours = sum(n * (plan.segment_length(s, prompt) + outputs) for s, n in enumerate(layers))
    decode = outputs * geometry.num_decoder_layers * layer_flops(geometry, 1)
    by_flops = (start.stock.flops + decode) / (start.reduced.flops + decode)
    return sum(layers) * (prompt + outputs) / ours, by_flops
