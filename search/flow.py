"""What goes from layer to layer in the relaxed forward pass, and how rows that are not there can have gradients.

A row that the pass has discarded may go on as a *ghost*: later layers see it as a key of weight ``exp(-48)``, which
changes no value (that is below the rounding of float32 and float64), and whose gradient is scaled back to that of a
weight of 0.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from eos_search.counts import SoftCounts, neighbours
from eos_search.examples import Prepared
from eos_search.structure import Structure
from eos_search.theta import ThetaValues
from eos_vllm.core.layout import Entry, ReducerStep, build_layout
from eos_vllm.core.plan import RequestPlan
from eos_vllm.core.profile import QueryRule

Rotary = tuple[torch.Tensor, torch.Tensor]
# Log-weight of a ghost: exact in bfloat16, and its exponential is a normal number of float32.
_GHOST_LOGIT = -48.0


@dataclass(frozen=True)
class States:
    """Hidden states behind one decoder layer (and its reducer): ``[kept, d]``, and unreduced positions ``[kept]``."""

    hidden: torch.Tensor
    positions: torch.Tensor


@dataclass
class Neighbour:
    """The pass with one other count at one reducer, followed to first order beside the pass itself.

    Attributes:
        share: how much of it is there: 0 in value, a scalar with a gradient.
        steps: layout of each of its reducers.
        positions: unreduced positions of all of its rows, ascending.
        ghosts: positions of those that the pass lacks ``[ghosts]``.
        hidden: their hidden states ``[ghosts, d]``.
        entered: what entered the last layer for them.
        missing: by unreduced position, rows of the pass that it lacks ``[T] bool``.
    """

    share: torch.Tensor
    steps: tuple[ReducerStep, ...]
    positions: torch.Tensor
    ghosts: torch.Tensor
    hidden: torch.Tensor
    entered: torch.Tensor
    missing: torch.Tensor


@dataclass
class Flow:
    """What goes from layer to layer: hidden states, positions, log-weight as keys ``[tokens]``, segment, neighbours."""

    hidden: torch.Tensor
    positions: torch.Tensor
    presence: torch.Tensor
    segment: int = 0
    neighbours: list[Neighbour] = field(default_factory=list)

    @classmethod
    def start(cls, embeddings: torch.Tensor) -> "Flow":
        """In front of layer 0: ``embeddings`` ``[tokens, d]``."""
        tokens, device = len(embeddings), embeddings.device
        return cls(embeddings, torch.arange(tokens, device=device), torch.zeros(tokens, device=device))

    @property
    def rows(self) -> torch.Tensor:
        """Hidden states of the pass, then of all ghosts."""
        return torch.cat([self.hidden, *(n.hidden for n in self.neighbours)]) if self.neighbours else self.hidden

    @property
    def row_positions(self) -> torch.Tensor:
        """Positions of :attr:`rows`."""
        return torch.cat([self.positions, *(n.ghosts for n in self.neighbours)]) if self.neighbours else self.positions

    def mask(self) -> torch.Tensor | None:
        """Additive attention mask ``[1, 1, rows, rows]``; None where plain causal attention does."""
        dtype, device, tokens = self.hidden.dtype, self.hidden.device, len(self.positions)
        if not any(len(n.ghosts) for n in self.neighbours):
            if not self.presence.requires_grad:
                return None
            causal = torch.full((tokens, tokens), -torch.inf, dtype=dtype, device=device).triu_(1)
            return (causal + self.presence.to(dtype))[None, None]
        positions = self.row_positions
        hidden_from = positions[None, :] > positions[:, None]
        # A ghost sees the pass and itself, no other ghost.
        hidden_from[:, tokens:] |= torch.arange(len(positions), device=device)[:, None] >= tokens
        hidden_from[tokens:, tokens:].fill_diagonal_(False)
        weight = [self.presence, *(ghost_logits(n.share, len(n.ghosts)).to(self.presence) for n in self.neighbours)]
        seen = torch.cat(weight).to(dtype).expand(len(positions), -1)
        seen = torch.cat([seen[:tokens], torch.where(_own(positions, tokens), 0.0, seen[tokens:].detach())])
        return seen.masked_fill(hidden_from, -torch.inf)[None, None]

    def take(self, rows: torch.Tensor) -> None:
        """Takes the result of a layer for :attr:`rows` apart; ghosts carry no gradient of their own."""
        if not self.neighbours:
            self.hidden = rows
            return
        sizes = [len(self.positions), *(len(n.ghosts) for n in self.neighbours)]
        self.hidden, *ghosts = rows.split(sizes)
        for neighbour, hidden in zip(self.neighbours, ghosts, strict=True):
            neighbour.entered, neighbour.hidden = neighbour.hidden, hidden.detach()


@dataclass(frozen=True)
class Cut:
    """A layer that has run and behind which a reducer acts, or might.

    Attributes:
        index: of the layer.
        layer: the model's own.
        entered: what entered it ``[tokens, d]``.
        query: the layer's rotated queries of these tokens ``[tokens, H, D]``, which scores are made of.
        key: its keys ``[tokens, Hk, D]``.
        step: layout of the reducer.
        weights: query weights of each image ``[images, T]``.
    """

    index: int
    layer: Any
    entered: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    step: ReducerStep
    weights: torch.Tensor


@dataclass(frozen=True)
class Mark:
    """The pass behind a layer and in front of its reducer, without gradients: others can go on from here.

    Attributes:
        index: of the layer.
        entered: what entered it ``[tokens, d]``.
        hidden: what left it.
        positions: unreduced positions of these tokens.
        segment: of these tokens.
    """

    index: int
    entered: torch.Tensor
    hidden: torch.Tensor
    positions: torch.Tensor
    segment: int


@dataclass
class Run:
    """One example on its way through the decoder.

    Attributes:
        example: what enters layer 0.
        values: Theta.
        structure: its hard reading.
        plan: the request's, with the counts of ``structure``.
        steps: layout of each reducer that acts.
        rule: query rule.
        align: layers whose states are wanted.
        soft: the counts as functions of Theta.
        minimum: Kmin.
        total: visual tokens of an image before any reduction.
        whole: the example before any reduction.
        row: its number in the data.
        marks: in front of each reducer inside the decoder.
    """

    example: Prepared
    values: ThetaValues
    structure: Structure
    plan: RequestPlan
    steps: tuple[ReducerStep, ...]
    rule: QueryRule
    align: Collection[int]
    soft: SoftCounts
    minimum: int
    total: int
    whole: Prepared
    row: int = 0
    marks: list[Mark] = field(default_factory=list)

    @property
    def first(self) -> int:
        """Index of the first reducer inside the decoder among those that act: 1 behind one before it."""
        return int(self.structure.before)

    def steps_with(self, place: int, count: int) -> tuple[ReducerStep, ...]:
        """Layout of each reducer if the one at ``place``, inside the decoder, left ``count`` tokens of an image."""
        kept = [list(image) for image in self.plan.kept]
        for image in kept:
            image[place - self.first + 1] = count
        plan = replace(self.plan, kept=tuple(map(tuple, kept)))
        return plan_steps(self.example, plan, self.rule)

    def room(self, place: int, width: float) -> tuple[int, int]:
        """Counts next to that at ``place`` (:func:`eos_search.counts.neighbours`)."""
        return neighbours(self.structure.counts, place, self.total, width, self.minimum)


@dataclass(frozen=True)
class Reduction:
    """What a reducer did that acts, for estimators.

    Attributes:
        run: the example at hand.
        place: index of the reducer among those that act.
        mark: the pass in front of it.
        step: its layout.
        source: row in front of the reducer that each row behind it came from.
        scores: importance of the images of each group ``[B, N]``.
        again: the same reducer with another layout, on other rows and without gradients, from ``(step, entered, hidden,
            positions)``; gives rows that go on and where each came from.
    """

    run: Run
    place: int
    mark: Mark
    step: ReducerStep
    source: torch.Tensor
    scores: list[torch.Tensor]
    again: Callable[
        [ReducerStep, torch.Tensor, torch.Tensor, torch.Tensor],
        tuple[torch.Tensor, torch.Tensor],
    ]

    @property
    def inside(self) -> int:
        """Index of the reducer among those inside the decoder."""
        return self.place - self.run.first


def plan_steps(example: Prepared, plan: RequestPlan, rule: QueryRule) -> tuple[ReducerStep, ...]:
    """Layout of each reducer of a plan, for an example's prompt and answer."""
    tokens = example.embeddings
    return build_layout([Entry(len(tokens), plan)], plan.num_segments, rule, tokens.device).steps


def ghost_logits(share: torch.Tensor, count: int) -> torch.Tensor:
    """Log-weights ``[count]`` of keys whose weight is ``share``: as good as 0 in value, with its gradient."""
    scaled = straight(share) * math.exp(-_GHOST_LOGIT)
    return (_GHOST_LOGIT + scaled).expand(count)


def _own(positions: torch.Tensor, tokens: int) -> torch.Tensor:
    own = torch.zeros(len(positions) - tokens, len(positions), dtype=torch.bool, device=positions.device)
    own[:, tokens:].fill_diagonal_(True)
    return own


def straight(x: torch.Tensor) -> torch.Tensor:
    """Zero in value, ``x`` in gradient."""
    return x - x.detach()
