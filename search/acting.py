"""What reducers do in the relaxed forward pass: those that act, those that might, and the withdrawal of images."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from eos_search.estimators.base import KeepEstimator
from eos_search.flow import Cut, Flow, Mark, Reduction, Run, straight
from eos_search.reference import rotated_queries_and_keys
from eos_search.structure import Rules
from eos_search.theta import KINDS, ThetaValues
from eos_vllm.core.importance import ScoreOptions
from eos_vllm.core.layout import ReducerStep
from eos_vllm.core.operator import OperatorParams
from eos_vllm.core.reduction import reduce_tokens


def operator_params(values: ThetaValues, rules: Rules, layer: int) -> OperatorParams:
    """Omega of a layer (-1: before the decoder), with gradients."""
    row = dict(zip(KINDS, values.table[layer].unbind(), strict=True))
    operator = rules.operator
    return OperatorParams(
        row["gamma"],
        row["tau"],
        row["theta"],
        row["rho"],
        row["nu"],
        operator.gate_sharpness,
        operator.norm,
        operator.aggregate,
    )


@dataclass(frozen=True)
class Reducers:
    """Carries out reducers on a :class:`~eos_search.flow.Flow`.

    Attributes:
        rules: what is not learned.
        options: how queries and heads are joined.
        keep: how the loss learns what counts do to it.
        rotary: the decoder's rotary embedding.
    """

    rules: Rules
    options: ScoreOptions
    keep: KeepEstimator
    rotary: Callable[[torch.Tensor, torch.Tensor], Any]

    def reduce(self, run: Run, flow: Flow, cut: Cut) -> None:
        """A reducer that acts: the server's step, then zeros with gradients of its counts and of the anchors' line."""
        scores: list[torch.Tensor] = []

        def remember(group_scores: torch.Tensor) -> torch.Tensor:
            scores.append(group_scores)
            return group_scores

        values = run.values
        params = operator_params(values, self.rules, cut.index)
        reduced, source = self._reduced(flow.hidden, flow, cut, params, remember)
        mark = Mark(cut.index, cut.entered.detach(), flow.hidden.detach(), flow.positions, flow.segment)
        run.marks.append(mark)
        moved = (reduced - flow.hidden.index_select(0, source)).detach()
        flow.hidden = reduced + (straight(values.gate[cut.index]) * moved).to(reduced.dtype)
        flow.presence = flow.presence.index_select(0, source)
        flow.positions = flow.positions.index_select(0, source)
        if torch.is_grad_enabled() and values.table.requires_grad:
            again = functools.partial(self._again, run, cut)
            place = run.first + len(run.marks) - 1
            self.keep.at_reducer(flow, Reduction(run, place, mark, cut.step, source, scores, again))
        flow.segment += 1

    def withdraw(self, run: Run, flow: Flow, cut: Cut) -> None:
        """No visual token goes on, and none that might have been kept."""
        profile = run.structure.profile
        assert profile is not None
        flow.hidden, source = self._reduced(flow.hidden, flow, cut, profile.params_of(profile.reducers[-1]))
        flow.presence = flow.presence.index_select(0, source)
        flow.positions = flow.positions.index_select(0, source)
        flow.neighbours.clear()
        flow.segment += 1

    def attempt(self, flow: Flow, cut: Cut, values: ThetaValues, weight: float = 1.0) -> None:
        """A reducer that doesn't act: zeros with the gradients of what it would do, times ``weight``."""
        if not cut.step.groups:
            return
        here = flow.hidden.detach()
        reduced, source = self._reduced(here, flow, cut, operator_params(values, self.rules, cut.index))
        gate = values.gate[cut.index]
        would_move = gate * (reduced - here.index_select(0, source))
        flow.hidden = flow.hidden.index_add(0, source, (weight * straight(would_move)).to(here.dtype))
        discarded = torch.ones_like(flow.presence).index_fill_(0, source, 0.0)
        flow.presence = flow.presence - weight * straight(gate) * discarded

    def _reduced(
        self,
        hidden: torch.Tensor,
        flow: Flow,
        cut: Cut,
        params: OperatorParams,
        scores: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scale = cut.layer.self_attn.scaling
        positions = flow.positions
        return reduce_tokens(
            hidden, cut.query, cut.key, cut.step, cut.weights, params, scale, self.options, positions, scores
        )

    @torch.no_grad()
    def _again(
        self,
        run: Run,
        cut: Cut,
        step: ReducerStep,
        entered: torch.Tensor,
        hidden: torch.Tensor,
        positions: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The reducer of ``cut`` on other rows; see :attr:`eos_search.flow.Reduction.again`."""
        rotary = self.rotary(entered[None], positions[None])
        query, key = rotated_queries_and_keys(cut.layer, entered, rotary)
        params, scale = operator_params(run.values, self.rules, cut.index), cut.layer.self_attn.scaling
        return reduce_tokens(hidden, query, key, step, cut.weights, params, scale, self.options, positions)
