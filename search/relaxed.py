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
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from eos_search.acting import Reducers, operator_params
from eos_search.before import entering
from eos_search.counts import soft_counts
from eos_search.estimators.base import KeepEstimator
from eos_search.estimators.differences import Differences
from eos_search.estimators.equation12 import Equation12
from eos_search.examples import Prepared
from eos_search.flow import Cut, Flow, Mark, Rotary, Run, States, plan_steps
from eos_search.reference import rotated, rotated_queries_and_keys
from eos_search.structure import Rules, Structure
from eos_search.theta import ThetaValues
from eos_vllm.core.importance import ScoreOptions
from eos_vllm.core.layout import Entry, ReducerStep, build_layout
from eos_vllm.core.plan import ImageSpan, Planner, RequestPlan
from eos_vllm.core.profile import BEFORE

# What a layer's projections gave, by name.
_Seen = dict[str, torch.Tensor]


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
        before: the same for the count of a reducer before the decoder, where ``keep`` says nothing of it.
        tries: layers that don't act and are tried for gradients in each example, in turn, each standing for those that
            are not; 0: all.
    """

    boundary_sharpness: float = 10.0
    explore: bool = True
    checkpointing: bool = False
    flash_reference: bool = False
    keep: KeepEstimator | None = None
    before: Differences | None = None
    tries: int = 0


class RelaxedModel:
    """A frozen Hugging Face LLaVA, with reducers that gradients flow through. One example at a time: no padding."""

    def __init__(self, model: Any, rules: Rules, relaxation: Relaxation | None = None) -> None:
        """Freezes ``model``, whose language model is of the Llama family."""
        self.model = model.eval().requires_grad_(False)
        self.decoder: Any = model.model.language_model
        self.rules = rules
        self.relaxation = relaxation or Relaxation()
        self.keep = self.relaxation.keep or Equation12(self.relaxation.boundary_sharpness)
        self.before = self.relaxation.before or Differences()
        device = self.decoder.norm.weight.device
        options = ScoreOptions.of(rules.importance, model.config.text_config.num_attention_heads, device)
        self.reducers = Reducers(rules, options, self.keep, self.decoder.rotary_emb)

    def forward(
        self, example: Prepared, values: ThetaValues, structure: Structure, align: Collection[int] = (), row: int = 0
    ) -> RelaxedOutput:
        """The reduced pass over prompt and answer.

        Args:
            example: what enters layer 0.
            values: Theta.
            structure: :func:`eos_search.structure.read_structure` of the same values.
            align: layers whose states are wanted.
            row: the example's number in the data, by which gates that don't act take turns.
        """
        total = max(span.length for span in example.spans)
        whole, example = example, self._enter(example, values, structure.counts) if structure.before else example
        plan = self._plan(example, structure)
        rule = self.rules.importance.queries
        steps = plan_steps(example, plan, rule) if structure.profile is not None else ()
        soft = soft_counts(values, structure, self.rules)
        run = Run(example, values, structure, plan, steps, rule, align, soft, self.rules.minimum, total, whole, row)
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
        if place < run.first:
            counts = (count, *run.structure.counts[1:])
            return self.forward(run.whole, run.values, replace(run.structure, counts=counts), run.align)
        inside = place - run.first
        mark = run.marks[inside]
        other = replace(run, steps=run.steps_with(place, count), marks=run.marks[:inside])
        states = {layer: state for layer, state in output.states.items() if layer < mark.index}
        flow = Flow(mark.hidden, mark.positions, torch.zeros_like(mark.positions, dtype=torch.float32), mark.segment)
        return self._go_on(
            other, flow, RelaxedOutput(output.logits, states, output.kept[:inside], other), mark.index, mark
        )

    def _enter(self, example: Prepared, values: ThetaValues, counts: tuple[int, ...]) -> Prepared:
        """What a reducer before the decoder leaves of an example."""
        select = self.rules.select
        assert select is not None
        params = operator_params(values, self.rules, BEFORE)
        return entering(example, select, params, counts[0], self.rules.importance.queries)

    def _go_on(
        self, run: Run, flow: Flow, output: RelaxedOutput, first: int, mark: Mark | None = None
    ) -> RelaxedOutput:
        """All layers from ``first``, of which that of ``mark`` has run."""
        tried, weight = self._tried(run)
        for index, layer in list(enumerate(self.decoder.layers))[first:]:
            at_mark = mark is not None and index == first
            entered = mark.entered if mark is not None and at_mark else flow.hidden
            rotary = self.decoder.rotary_emb(entered[None], flow.positions[None])
            acts = index in run.structure.acting and bool(run.steps)
            withdraws = index == self.rules.withdraw and bool(run.steps)
            seen: _Seen | None = None
            if not at_mark:
                seen = self._layer(flow, layer, rotary, catch=acts or withdraws or index in tried)
            if acts or withdraws or index in tried:
                query, key = self._scored(layer, entered, rotary, seen, gradients=acts)
                count = run.structure.candidates.get(index, 0)
                step = self._candidate_step(run.plan, flow, count) if index in tried else run.steps[flow.segment]
                cut = Cut(index, layer, entered, query, key, step, run.example.weights)
                if acts:
                    self.reducers.reduce(run, flow, cut)
                    output.kept.append(flow.positions)
                elif withdraws:
                    self.reducers.withdraw(run, flow, cut)
                else:
                    self.reducers.attempt(flow, cut, run.values, weight)
            if index in run.align:
                output.states[index] = States(flow.hidden, flow.positions)
        answer = self.decoder.norm(flow.hidden[-len(run.example.targets) :])
        return replace(output, logits=self.model.lm_head(answer).float())

    def _tried(self, run: Run) -> tuple[Collection[int], float]:
        """Layers that don't act and whose reducers are tried for gradients, and for how many each of them stands."""
        explores = self.relaxation.explore and torch.is_grad_enabled() and run.values.table.requires_grad
        closed = sorted(run.structure.candidates) if explores else []
        few = self.relaxation.tries
        if not few or few >= len(closed):
            return closed, 1.0
        return {closed[(run.row * few + turn) % len(closed)] for turn in range(few)}, len(closed) / few

    def _scored(
        self, layer: Any, entered: torch.Tensor, rotary: Rotary, seen: _Seen | None, gradients: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated queries and keys that a layer's reducer scores with: the layer's own where they were caught."""
        with torch.set_grad_enabled(gradients and torch.is_grad_enabled()):
            if seen is None or "key" not in seen:
                return rotated_queries_and_keys(layer, entered, rotary)
            query, key = (seen[name] if gradients else seen[name].detach() for name in ("query", "key"))
            return rotated(layer, query, key, rotary)

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

    def _layer(self, flow: Flow, layer: Any, rotary: Rotary, catch: bool) -> _Seen:
        """Runs a layer; gives what its projections made of the rows, where that is to be caught and can be."""
        if flow.neighbours:
            rotary = self.decoder.rotary_emb(flow.hidden[None], flow.row_positions[None])
        run = functools.partial(layer, position_embeddings=rotary, attention_mask=flow.mask())
        if self.relaxation.checkpointing and torch.is_grad_enabled():
            # What is computed a second time for the gradients is none of what would be caught here.
            flow.take(checkpoint(run, flow.rows[None], use_reentrant=False)[0])
            return {}
        seen: _Seen = {}
        # With ghosts among the rows the projections' last bits need not be those of the pass alone.
        with caught(layer, seen) if catch and not flow.neighbours else nullcontext():
            flow.take(run(flow.rows[None])[0])
        return seen


@contextmanager
def caught(layer: Any, seen: _Seen) -> Iterator[None]:
    """Catches what a layer's projections give: ``query`` ``[1, tokens, H D]`` and ``key`` ``[1, tokens, Hk D]``."""

    def catch(name: str) -> Any:
        return lambda _module, _inputs, out: seen.__setitem__(name, out)

    attention = layer.self_attn
    hooks = [
        attention.q_proj.register_forward_hook(catch("query")),
        attention.k_proj.register_forward_hook(catch("key")),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
