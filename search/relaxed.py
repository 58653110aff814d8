"""The relaxed forward pass: its value is the hard reduction, its gradients reach all seven kinds of parameter.

At an acting layer the server's own :func:`eos_vllm.core.reduction.reduce_tokens` runs, with tensors for the operator's
parameters. Everything else here adds exact zeros that carry gradients. What the paper leaves open is chosen so:

* **How counts matter** is estimated by one of several methods (:mod:`eos_search.estimators`). Eq. 12 enters as the
  weight of a kept token among the keys of all later layers: its logarithm is added to the attention logits. A kept
  token weighs 1, so nothing is added to the value. (As a factor on the hidden state it would mean little, since every
  layer normalises first.)
* **Unit of alpha.** Scores are divided by their mean, so that alpha depends neither on the number of tokens nor of
  heads. The threshold is detached, the scores are not: earlier reducers feel what they do to later choices.
* **A gate that acts** (g above the threshold, among the C highest) gets the estimated gradient of its counts, and that
  of its anchors on the straight line from untouched (0) to the operator's result (1).
* **A gate that doesn't act** is the identity, and gets the gradient at the other end of that line: for the layer as it
  would be if its gate were just above the threshold, would-be anchors move towards the operator's result, would-be
  discards fade as keys of later layers. Its operator's parameters get gradients weighted with g, so that they are
  prepared when the gate opens; its discard gets none. None of this reaches the parameters of other layers.
"""

import functools
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from eos_search.counts import soft_counts
from eos_search.estimators.base import KeepEstimator
from eos_search.estimators.equation12 import Equation12
from eos_search.examples import Prepared
from eos_search.flow import Cut, Flow, Mark, Reduction, Rotary, Run, States, plan_steps, straight
from eos_search.reference import rotated_queries_and_keys
from eos_search.structure import Rules, Structure
from eos_search.theta import KINDS, ThetaValues
from eos_vllm.core.importance import ScoreOptions
from eos_vllm.core.layout import Entry, ReducerStep, build_layout
from eos_vllm.core.operator import OperatorParams
from eos_vllm.core.plan import ImageSpan, Planner, RequestPlan
from eos_vllm.core.reduction import reduce_tokens


@dataclass(frozen=True)
class RelaxedOutput:
    """Result of a forward pass.

    Attributes:
        logits: of the answer's tokens ``[answer, vocabulary]`` float32.
        states: behind the layers that were asked for.
        kept: unreduced positions left after each acting layer, ascending, text included.
        run: what the pass was, for :meth:`RelaxedModel.recount`.
    """

    logits: torch.Tensor
    states: dict[int, States]
    kept: list[torch.Tensor]
    run: Run | None = None


@dataclass(frozen=True)
class Relaxation:
    """Settings that leave the forward value alone.

    Attributes:
        boundary_sharpness: alpha of Eq. 12, for scores divided by their mean, where ``keep`` is left out.
        explore: whether layers that don't act get gradients; off where gates are fixed.
        checkpointing: compute decoder layers again in the backward pass instead of keeping what they made.
        flash_reference: run the unreduced pass, which needs no mask, with flash-attn.
        keep: how the loss learns what counts do to it; Eq. 12 where left out.
    """

    boundary_sharpness: float = 10.0
    explore: bool = True
    checkpointing: bool = False
    flash_reference: bool = False
    keep: KeepEstimator | None = None


class RelaxedModel:
    """A frozen Hugging Face LLaVA, with reducers that gradients flow through. One example at a time: no padding."""

    def __init__(self, model: Any, rules: Rules, relaxation: Relaxation | None = None) -> None:
        """Freezes ``model``, whose language model is of the Llama family."""
        self.model = model.eval().requires_grad_(False)
        self.decoder: Any = model.model.language_model
        self.rules = rules
        self.relaxation = relaxation or Relaxation()
        self.keep = self.relaxation.keep or Equation12(self.relaxation.boundary_sharpness)
        device = self.decoder.norm.weight.device
        self.options = ScoreOptions.of(rules.importance, model.config.text_config.num_attention_heads, device)

    def forward(
        self, example: Prepared, values: ThetaValues, structure: Structure, align: Collection[int] = ()
    ) -> RelaxedOutput:
        """The reduced pass over prompt and answer.

        Args:
            example: what enters layer 0.
            values: Theta.
            structure: :func:`eos_search.structure.read_structure` of the same values.
            align: layers whose states are wanted.
        """
        plan = self._plan(example, structure)
        rule = self.rules.importance.queries
        steps = plan_steps(example, plan, rule) if structure.profile is not None else ()
        soft = soft_counts(values, structure, self.rules)
        run = Run(example, values, structure, plan, steps, rule, align, soft, self.rules.minimum)
        output = RelaxedOutput(torch.empty(0), {}, [], run)
        return self._go_on(run, Flow.start(example.embeddings), output, 0)

    @torch.no_grad()
    def recount(self, output: RelaxedOutput, place: int, count: int) -> RelaxedOutput:
        """The hard pass in which one reducer leaves another count, all others theirs; begins where the two part.

        Args:
            output: of :meth:`forward`.
            place: index of the reducer among those that act.
            count: tokens of each image that it leaves.
        """
        run = output.run
        assert run is not None
        mark = run.marks[place]
        other = replace(run, steps=run.steps_with(place, count), marks=run.marks[:place])
        states = {layer: state for layer, state in output.states.items() if layer < mark.index}
        flow = Flow(mark.hidden, mark.positions, torch.zeros_like(mark.positions, dtype=torch.float32), mark.segment)
        return self._go_on(
            other, flow, RelaxedOutput(output.logits, states, output.kept[:place], other), mark.index, mark
        )

    def _go_on(
        self, run: Run, flow: Flow, output: RelaxedOutput, first: int, mark: Mark | None = None
    ) -> RelaxedOutput:
        """All layers from ``first``, of which that of ``mark`` has run."""
        values, structure = run.values, run.structure
        explores = self.relaxation.explore and torch.is_grad_enabled() and values.table.requires_grad
        for index, layer in list(enumerate(self.decoder.layers))[first:]:
            at_mark = mark is not None and index == first
            entered = mark.entered if mark is not None and at_mark else flow.hidden
            rotary = self.decoder.rotary_emb(entered[None], flow.positions[None])
            if not at_mark:
                self._layer(flow, layer, rotary)
            acts = index in structure.acting and bool(run.steps)
            if acts or (explores and index in structure.candidates):
                count = 0 if acts else structure.candidates[index]
                step = run.steps[flow.segment] if acts else self._candidate_step(run.plan, flow, count)
                cut = Cut(index, layer, entered, rotary, step, run.example.weights)
                if acts:
                    self._reduce(run, flow, cut)
                    output.kept.append(flow.positions)
                else:
                    self._try(flow, cut, values)
            if index in run.align:
                output.states[index] = States(flow.hidden, flow.positions)
        answer = self.decoder.norm(flow.hidden[-len(run.example.targets) :])
        return replace(output, logits=self.model.lm_head(answer).float())

    @torch.no_grad()
    def reference(self, example: Prepared, align: Collection[int]) -> dict[int, torch.Tensor]:
        """Hidden states ``[tokens, d]`` of the unreduced pass behind the layers ``align``."""
        hidden, states = example.embeddings, {}
        rotary = self.decoder.rotary_emb(hidden[None], torch.arange(len(hidden), device=hidden.device)[None])
        with self._reference_attention():
            for index, layer in enumerate(self.decoder.layers[: max(align, default=-1) + 1]):
                hidden = layer(hidden[None], position_embeddings=rotary)[0]
                if index in align:
                    states[index] = hidden
        return states

    @torch.no_grad()
    def answers(self, example: Prepared, last: torch.Tensor) -> torch.Tensor:
        """Logits at the answer ``[answer, vocabulary]`` from the unreduced states behind the last layer."""
        logits: torch.Tensor = self.model.lm_head(self.decoder.norm(last[-len(example.targets) :]))
        return logits.float()

    @contextmanager
    def _reference_attention(self) -> Iterator[None]:
        config = self.decoder.config
        before = config._attn_implementation
        if self.relaxation.flash_reference:
            config._attn_implementation = "flash_attention_2"
        try:
            yield
        finally:
            config._attn_implementation = before

    def _plan(self, example: Prepared, structure: Structure) -> RequestPlan:
        """The plan that the server would make."""
        if structure.profile is None:
            none = tuple((span.length,) for span in example.spans)
            return RequestPlan(example.prompt_length, tuple(example.spans), none)
        return Planner(structure.profile).plan(range(example.prompt_length), example.spans)

    def _candidate_step(self, plan: RequestPlan, flow: Flow, count: int) -> ReducerStep:
        """Layout of a reducer that isn't there, seen from the tokens that are left."""
        segment = flow.segment
        images = range(len(plan.spans))
        left = [plan.kept[i][segment] for i in images]
        spans = tuple(ImageSpan(plan.segment_start(i, segment), left[i]) for i in images)
        length = plan.segment_length(segment, plan.prompt_length)
        would = RequestPlan(length, spans, tuple((tokens, min(count, tokens)) for tokens in left))
        row = Entry(len(flow.hidden), would)
        return build_layout([row], 2, self.rules.importance.queries, flow.hidden.device).steps[0]

    def _layer(self, flow: Flow, layer: Any, rotary: Rotary) -> None:
        if flow.neighbours:
            rotary = self.decoder.rotary_emb(flow.hidden[None], flow.row_positions[None])
        run = functools.partial(layer, position_embeddings=rotary, attention_mask=flow.mask())
        if self.relaxation.checkpointing and torch.is_grad_enabled():
            flow.take(checkpoint(run, flow.rows[None], use_reentrant=False)[0])
        else:
            flow.take(run(flow.rows[None])[0])

    def _params(self, values: ThetaValues, index: int) -> OperatorParams:
        row = dict(zip(KINDS, values.table[index].unbind(), strict=True))
        operator = self.rules.operator
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

    def _reduce(self, run: Run, flow: Flow, cut: Cut) -> None:
        """A reducer that acts: the server's step, then zeros with gradients of its counts and of the anchors' line."""
        query, key = rotated_queries_and_keys(cut.layer, cut.entered, cut.rotary)
        scores: list[torch.Tensor] = []

        def remember(group_scores: torch.Tensor) -> torch.Tensor:
            scores.append(group_scores)
            return group_scores

        values, scale = run.values, cut.layer.self_attn.scaling
        params, weights = self._params(values, cut.index), cut.weights
        reduced, source = reduce_tokens(
            flow.hidden, query, key, cut.step, weights, params, scale, self.options, flow.positions, remember
        )
        mark = Mark(cut.index, cut.entered.detach(), flow.hidden.detach(), flow.positions, flow.segment)
        run.marks.append(mark)
        moved = (reduced - flow.hidden.index_select(0, source)).detach()
        flow.hidden = reduced + (straight(values.gate[cut.index]) * moved).to(reduced.dtype)
        flow.presence = flow.presence.index_select(0, source)
        flow.positions = flow.positions.index_select(0, source)
        if torch.is_grad_enabled() and values.table.requires_grad:
            again = functools.partial(self._again, run, cut)
            place = len(run.marks) - 1
            self.keep.at_reducer(flow, Reduction(run, place, mark, cut.step, source, scores, again))
        flow.segment += 1

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
        rotary = self.decoder.rotary_emb(entered[None], positions[None])
        query, key = rotated_queries_and_keys(cut.layer, entered, rotary)
        params, scale = self._params(run.values, cut.index), cut.layer.self_attn.scaling
        return reduce_tokens(hidden, query, key, step, cut.weights, params, scale, self.options, positions)

    def _try(self, flow: Flow, cut: Cut, values: ThetaValues) -> None:
        """A reducer that doesn't act: zeros with the gradients of what it would do."""
        if not cut.step.groups:
            return
        here = flow.hidden.detach()
        with torch.no_grad():
            query, key = rotated_queries_and_keys(cut.layer, cut.entered, cut.rotary)
        params, scale = self._params(values, cut.index), cut.layer.self_attn.scaling
        reduced, source = reduce_tokens(
            here, query, key, cut.step, cut.weights, params, scale, self.options, flow.positions
        )
        gate = values.gate[cut.index]
        would_move = gate * (reduced - here.index_select(0, source))
        flow.hidden = flow.hidden.index_add(0, source, straight(would_move).to(here.dtype))
        discarded = torch.ones_like(flow.presence).index_fill_(0, source, 0.0)
        flow.presence = flow.presence - straight(gate) * discarded
