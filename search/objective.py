"""What the search minimises: Eq. 13 with the task loss of Eq. 14 (text states) or Eq. 23 (visual states).

What the paper leaves open is chosen so:

* The squared norms of Eq. 14 and 23 are means over tokens and hidden dimensions: the weight then depends neither on the
  length of a text nor on the width of a model. Text means all of it, prompt and answer.
* ``H_l`` is what leaves decoder layer ``l``, counted from 0, its reducer included.
* N_final counts acting gates at their soft g c and all others as closed, as the forward pass does, with the gradient
  of Eq. 13's product for every gate. With ``budget_gates="all"`` it is Eq. 13 to the letter: gates that are closed in
  the forward pass count with what they are above 0, and the count is below what is deployed.
* ``budget_measure`` holds what layers see against B (``layer_average``, ``kv_bytes``, ``flops``) instead of N_final,
  which alone gives no reason to reduce early: reducing everything at the last place meets it.
* A third term, with a weight of 0 unless asked for: the divergence of the answer's distribution from the unreduced
  model's, which says more than the right answer alone and nothing of what the unreduced model gets wrong.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from eos_search.examples import Prepared
from eos_search.flow import straight
from eos_search.measures import SearchMeasure, tokens_of
from eos_search.relaxed import RelaxedOutput
from eos_search.theta import ThetaValues

AlignOn = Literal["text", "visual"]
BudgetGates = Literal["acting", "all"]


@dataclass(frozen=True)
class Objective:
    """Weights and targets of Eq. 13 and 14.

    Attributes:
        budget: B.
        max_reducers: C.
        visual_tokens: N0.
        align_layers: the set A of Eq. 14.
        align_on: which states are aligned.
        lambda_align: weight of the alignment.
        lambda_budget: weight of the token budget.
        lambda_cost: weight of the number of active layers.
        cross_entropy: whether the answers count; without, alignment alone is the task.
        budget_measure: what is held against B.
        budget_gates: which gates count in it.
        crossover: of :func:`eos_search.measures.tokens_of`, where the measure is flops.
        lambda_kl: weight of the divergence from the unreduced model's answers.
        withdraw: layer behind which no visual token goes on.
    """

    budget: int
    max_reducers: int
    visual_tokens: int
    align_layers: tuple[int, ...]
    align_on: AlignOn = "text"
    lambda_align: float = 0.1
    lambda_budget: float = 1.0
    lambda_cost: float = 1.0
    cross_entropy: bool = True
    budget_measure: SearchMeasure = "final"
    budget_gates: BudgetGates = "acting"
    crossover: int | None = None
    lambda_kl: float = 0.0
    withdraw: int | None = None

    @property
    def aligned(self) -> tuple[int, ...]:
        """Layers whose states are needed: none where the alignment has no weight."""
        return self.align_layers if self.lambda_align > 0 else ()


@dataclass(frozen=True)
class TaskTerms:
    """Terms of the task loss of one example, unweighted scalars; ``total`` is their weighted sum."""

    cross_entropy: torch.Tensor
    alignment: torch.Tensor
    total: torch.Tensor
    divergence: torch.Tensor | None = None


@dataclass(frozen=True)
class Penalties:
    """The two constraints of Eq. 13, weighted; ``tokens`` and ``gates`` are what they hold against B and C.

    C counts reducers inside the decoder.
    """

    budget: torch.Tensor
    cost: torch.Tensor
    tokens: torch.Tensor
    gates: torch.Tensor


def task_terms(
    objective: Objective,
    example: Prepared,
    output: RelaxedOutput,
    reference: dict[int, torch.Tensor],
    answers: torch.Tensor | None = None,
) -> TaskTerms:
    """Eq. 14 (or 23) for one example.

    Args:
        objective: weights.
        example: with the answer's tokens.
        output: of the reduced pass.
        reference: aligned rows of the unreduced pass by layer.
        answers: logits of the unreduced pass at the answer ``[answer, vocabulary]``, for ``lambda_kl`` above 0.
    """
    answer = F.cross_entropy(output.logits, example.targets)
    alignment = answer.new_zeros(())
    for layer in objective.aligned:
        alignment = alignment + _deviation(objective, example, output, layer, reference[layer])
    alignment = alignment / max(1, len(objective.aligned))
    total = objective.lambda_align * alignment + (answer if objective.cross_entropy else 0.0)
    if objective.lambda_kl == 0:
        return TaskTerms(answer, alignment, total)
    assert answers is not None
    given = (output.logits.log_softmax(dim=-1), answers.float().log_softmax(dim=-1))
    divergence = F.kl_div(*given, reduction="batchmean", log_target=True)
    return TaskTerms(answer, alignment, total + objective.lambda_kl * divergence, divergence)


def reference_rows(objective: Objective, example: Prepared, states: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """The rows of the unreduced states ``[tokens, d]`` that are aligned: all that has to be remembered of them."""
    wanted = example.is_text if objective.align_on == "text" else ~example.is_text
    return {layer: states[layer][wanted] for layer in objective.aligned}


def _deviation(
    objective: Objective, example: Prepared, output: RelaxedOutput, layer: int, reference: torch.Tensor
) -> torch.Tensor:
    state = output.states[layer]
    is_text = example.is_text[state.positions]
    if objective.align_on == "text":
        return F.mse_loss(state.hidden[is_text].float(), reference.float())
    place = (~example.is_text).cumsum(dim=0) - 1
    kept = state.positions[~is_text]
    return F.mse_loss(state.hidden[~is_text].float(), reference[place[kept]].float())


def penalties(objective: Objective, values: ThetaValues, acting: Collection[int]) -> Penalties:
    """The one-sided constraints: 0 with gradient 0 inside the feasible region."""
    tokens = tokens_left(objective, values, acting)
    gates = values.gate[: values.depth].sum()
    return Penalties(
        budget=objective.lambda_budget * one_sided(tokens / objective.budget - 1),
        cost=objective.lambda_cost * one_sided(gates - objective.max_reducers),
        tokens=tokens,
        gates=gates,
    )


def one_sided(excess: torch.Tensor) -> torch.Tensor:
    """``[excess]_+ ** 2`` of Eq. 13."""
    return torch.clamp(excess, min=0).square()


def tokens_left(objective: Objective, values: ThetaValues, acting: Collection[int]) -> torch.Tensor:
    """N_final of Eq. 13 (of a withdrawal: what it withdraws), or the mean over layers of the tokens that each sees;
    unrounded, differentiable."""
    gate = values.gate
    if objective.budget_gates == "acting":
        acts = torch.zeros_like(gate, dtype=torch.bool)
        acts[list(acting)] = True
        gate = torch.where(acts, gate, straight(gate))
    share, entering = 1 - gate * values.discard, torch.tensor(float(objective.visual_tokens)).to(gate)
    if values.before:
        share, entering = share[:-1], entering * share[-1]
    left = entering * torch.cumprod(share, dim=0)
    if objective.withdraw is not None and objective.budget_measure != "final":
        goes_on = torch.arange(len(left), device=left.device) < objective.withdraw
        left = torch.where(goes_on, left, 0.0)
    return tokens_of(entering, left, objective.budget_measure, objective.crossover)
