"""The relaxed forward pass: its value is the hard reduction, its gradients reach all seven kinds of parameter.

At an acting layer the server's own :func:`eos_vllm.core.reduction.reduce_tokens` runs, with tensors for the operator's
parameters. Everything else here adds exact zeros that carry gradients. What the paper leaves open is chosen so:

* **Where the keep probability of Eq. 12 enters.** As the weight of a kept token among the keys of all later layers: its
  logarithm is added to the attention logits. A kept token weighs 1, so nothing is added to the value. (As a factor on
  the hidden state it would mean little, since every layer normalises first.)
* **Unit of alpha.** Scores are divided by their mean, so that alpha depends neither on the number of tokens nor of
  heads. The threshold is detached, the scores are not: earlier reducers feel what they do to later choices.
* **A gate that acts** (g above the threshold, among the C highest) gets the gradient of Eq. 12, and that of its
  anchors on the straight line from untouched (0) to the operator's result (1).
* **A gate that doesn't act** is the identity, and gets the gradient at the other end of that line: for the layer as it
  would be if its gate were just above the threshold, would-be anchors move towards the operator's result, would-be
  discards fade as keys of later layers. Its operator's parameters get gradients weighted with g, so that they are
  prepared when the gate opens; its discard gets none. None of this reaches the parameters of other layers.
"""

import functools
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from eos_search.examples import Prepared
from eos_search.reference import rotated_queries_and_keys
from eos_search.structure import Rules, Structure
from eos_search.theta import KINDS, ThetaValues
from eos_vllm.core.importance import ScoreOptions
from eos_vllm.core.layout import BatchLayout, Entry, ReducerStep, build_layout
from eos_vllm.core.operator import OperatorParams
from eos_vllm.core.plan import ImageSpan, Planner, RequestPlan
from eos_vllm.core.reduction import reduce_tokens

Rotary = tuple[torch.Tensor, torch.Tensor]
# Where no query looks at the image at all, no score is above another.
_SCORE_FLOOR = 1e-12


@dataclass(frozen=True)
class States:
    """Hidden states behind one decoder layer (and its reducer): ``[kept, d]``, and unreduced positions ``[kept]``."""

    hidden: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True)
class RelaxedOutput:
    """Result of a forward pass.

    Attributes:
        logits: of the answer's tokens ``[answer, vocabulary]`` float32.
        states: behind the layers that were asked for.
        kept: unreduced positions left after each acting layer, ascending, text included.
    """

    logits: torch.Tensor
    states: dict[int, States]
    kept: list[torch.Tensor]


@dataclass(frozen=True)
class Relaxation:
    """Settings that leave the forward value alone.

    Attributes:
        boundary_sharpness: alpha of Eq. 12, for scores divided by their mean.
        explore: whether layers that don't act get gradients; off where gates are fixed.
        checkpointing: compute decoder layers again in the backward pass instead of keeping what they made.
        flash_reference: run the unreduced pass, which needs no mask, with flash-attn.
    """

    boundary_sharpness: float = 10.0
    explore: bool = True
    checkpointing: bool = False
    flash_reference: bool = False


@dataclass
class _Flow:
    """What goes from layer to layer: hidden states, positions, log-weight as keys ``[tokens]``, segment."""

    hidden: torch.Tensor
    positions: torch.Tensor
    presence: torch.Tensor
    segment: int = 0


class RelaxedModel:
    """A frozen Hugging Face LLaVA, with reducers that gradients flow through. One example at a time: no padding."""

    def __init__(self, model: Any, rules: Rules, relaxation: Relaxation | None = None) -> None:
        """Freezes ``model``, whose language model is of the Llama family."""
        self.model = model.eval().requires_grad_(False)
        self.decoder: Any = model.model.language_model
        self.rules = rules
        self.relaxation = relaxation or Relaxation()
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
        plan, layout = self._plan(example, structure)
        device = example.embeddings.device
        flow = _Flow(
            example.embeddings,
            torch.arange(len(example.embeddings), device=device),
            torch.zeros(len(example.embeddings), device=device),
        )
        states: dict[int, States] = {}
        kept: list[torch.Tensor] = []
        explores = self.relaxation.explore and torch.is_grad_enabled() and values.table.requires_grad
        for index, layer in enumerate(self.decoder.layers):
            entered = flow.hidden
            rotary = self.decoder.rotary_emb(entered[None], flow.positions[None])
            flow.hidden = self._layer(layer, entered, rotary, flow.presence)
            if index in structure.acting and layout is not None:
                step = layout.steps[flow.segment]
                self._reduce(flow, layer, entered, rotary, step, example.weights, values, index)
                kept.append(flow.positions)
            elif explores and index in structure.candidates:
                step = self._candidate_step(plan, flow, structure.candidates[index])
                self._try(flow, layer, entered, rotary, step, example.weights, values, index)
            if index in align:
                states[index] = States(flow.hidden, flow.positions)
        answer = self.decoder.norm(flow.hidden[-len(example.targets) :])
        return RelaxedOutput(self.model.lm_head(answer).float(), states, kept)

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

    def _plan(self, example: Prepared, structure: Structure) -> tuple[RequestPlan, BatchLayout | None]:
        """The plan that the server would make, and its layout if it reduces anything."""
        if structure.profile is None:
            none = tuple((span.length,) for span in example.spans)
            return RequestPlan(example.prompt_length, tuple(example.spans), none), None
        plan = Planner(structure.profile).plan(range(example.prompt_length), example.spans)
        row = Entry(len(example.embeddings), plan)
        rule = self.rules.importance.queries
        return plan, build_layout([row], plan.num_segments, rule, example.embeddings.device)

    def _candidate_step(self, plan: RequestPlan, flow: _Flow, count: int) -> ReducerStep:
        """Layout of a reducer that isn't there, seen from the tokens that are left."""
        segment = flow.segment
        images = range(len(plan.spans))
        left = [plan.kept[i][segment] for i in images]
        spans = tuple(ImageSpan(plan.segment_start(i, segment), left[i]) for i in images)
        length = plan.segment_length(segment, plan.prompt_length)
        would = RequestPlan(length, spans, tuple((tokens, min(count, tokens)) for tokens in left))
        row = Entry(len(flow.hidden), would)
        return build_layout([row], 2, self.rules.importance.queries, flow.hidden.device).steps[0]

    def _layer(self, layer: Any, hidden: torch.Tensor, rotary: Rotary, presence: torch.Tensor) -> torch.Tensor:
        mask = None
        if presence.requires_grad:
            tokens = len(hidden)
            causal = torch.full((tokens, tokens), -torch.inf, dtype=hidden.dtype, device=hidden.device).triu_(1)
            mask = (causal + presence.to(hidden.dtype))[None, None]
        run = functools.partial(layer, position_embeddings=rotary, attention_mask=mask)
        if self.relaxation.checkpointing and torch.is_grad_enabled():
            return checkpoint(run, hidden[None], use_reentrant=False)[0]
        return run(hidden[None])[0]

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

    def _reduce(
        self,
        flow: _Flow,
        layer: Any,
        entered: torch.Tensor,
        rotary: Rotary,
        step: ReducerStep,
        weights: torch.Tensor,
        values: ThetaValues,
        index: int,
    ) -> None:
        """A reducer that acts: the server's step, then zeros with the gradients of Eq. 12 and of the anchors' line."""
        query, key = rotated_queries_and_keys(layer, entered, rotary)
        scores: list[torch.Tensor] = []

        def remember(group_scores: torch.Tensor) -> torch.Tensor:
            scores.append(group_scores)
            return group_scores

        params, scale = self._params(values, index), layer.self_attn.scaling
        reduced, source = reduce_tokens(
            flow.hidden, query, key, step, weights, params, scale, self.options, flow.positions, remember
        )
        gate, discard = values.gate[index], values.discard[index]
        moved = (reduced - flow.hidden.index_select(0, source)).detach()
        flow.hidden = reduced + (straight(gate) * moved).to(reduced.dtype)
        alpha = self.relaxation.boundary_sharpness
        keep = keep_probability(step, scores, gate * discard, alpha, len(flow.presence))
        flow.presence = flow.presence.index_select(0, source) + straight(keep.index_select(0, source))
        flow.positions = flow.positions.index_select(0, source)
        flow.segment += 1

    def _try(
        self,
        flow: _Flow,
        layer: Any,
        entered: torch.Tensor,
        rotary: Rotary,
        step: ReducerStep,
        weights: torch.Tensor,
        values: ThetaValues,
        index: int,
    ) -> None:
        """A reducer that doesn't act: zeros with the gradients of what it would do."""
        if not step.groups:
            return
        here = flow.hidden.detach()
        with torch.no_grad():
            query, key = rotated_queries_and_keys(layer, entered, rotary)
        params, scale = self._params(values, index), layer.self_attn.scaling
        reduced, source = reduce_tokens(here, query, key, step, weights, params, scale, self.options, flow.positions)
        gate = values.gate[index]
        would_move = gate * (reduced - here.index_select(0, source))
        flow.hidden = flow.hidden.index_add(0, source, straight(would_move).to(here.dtype))
        discarded = torch.ones_like(flow.presence).index_fill_(0, source, 0.0)
        flow.presence = flow.presence - straight(gate) * discarded


def keep_probability(
    step: ReducerStep, scores: Sequence[torch.Tensor], dropped: torch.Tensor, alpha: float, rows: int
) -> torch.Tensor:
    """Eq. 12: how surely each token is kept, with a path for gradients to the share that is dropped.

    Args:
        step: layout of the reducer.
        scores: importance of the images of each group ``[B, N]``.
        dropped: g c, a scalar.
        alpha: boundary sharpness for scores divided by their mean.
        rows: tokens in front of the reducer.

    Returns:
        ``[rows]`` float32; 0 for text and for images that are not reduced.
    """
    ratio = (1 - dropped) / (1 - dropped.detach())
    keep = torch.zeros(rows, device=dropped.device)
    for group, received in zip(step.groups, scores, strict=True):
        fixed = received.detach()
        threshold = fixed.topk(group.keep, dim=1).values[:, -1:]
        sharpness = alpha / fixed.mean(dim=1, keepdim=True).clamp(min=_SCORE_FLOOR)
        chance = torch.sigmoid(sharpness * (received - threshold)) * ratio
        places = group.first_visual.unsqueeze(1) + torch.arange(group.total, device=keep.device)
        keep = keep.index_put((places,), chance.to(keep.dtype))
    return keep


def straight(x: torch.Tensor) -> torch.Tensor:
    """Zero in value, ``x`` in gradient."""
    return x - x.detach()
