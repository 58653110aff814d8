"""Ghost keys: tokens next to the boundary, on both sides of it, as keys that come and go.

For each reducer two neighbours of the pass go along, one with a few more kept tokens and one with a few less. What a
neighbour keeps beyond the pass is a ghost: a key of weight 0 with a gradient. What it lacks fades. What its operator
makes of the common anchors is a straight line from the pass. At later reducers the neighbour chooses by its own rows.
All of it is to first order: gradients of the two neighbours' shares are one-sided differences of the loss, linearised.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from eos_search.flow import Flow, Neighbour, Reduction, Run, straight


@dataclass(frozen=True)
class Ghosts:
    """Ghost keys.

    Attributes:
        width: how many tokens a neighbour has more or less, as a share of the count; one at least.
    """

    width: float = 0.1

    def at_reducer(self, flow: Flow, did: Reduction) -> None:
        """See :class:`eos_search.estimators.base.KeepEstimator`."""
        for neighbour in flow.neighbours:
            self._follow(flow, did, neighbour)
        own = did.run.structure.counts[did.place]
        low, high = did.run.room(did.place, self.width)
        sides = [count for count in (low, high) if count != own]
        for count in sides:
            self._begin(flow, did, count, own / (count - own) / len(sides))

    def slopes(self, run: Run, row: int, loss: Callable[[int, int], float]) -> torch.Tensor | None:
        """See :class:`eos_search.estimators.base.KeepEstimator`."""
        return None

    def _begin(self, flow: Flow, did: Reduction, count: int, share: float) -> None:
        """A neighbour that leaves ``count`` tokens here: ``share`` of it per unit of the logarithm of the count."""
        steps, mark = did.run.steps_with(did.place, count), did.mark
        hidden, source = did.again(steps[did.inside], mark.entered, mark.hidden, mark.positions)
        tokens = len(did.run.example.embeddings)
        nothing = torch.zeros(tokens, dtype=torch.bool, device=hidden.device)
        neighbour = Neighbour(
            share=share * straight(did.run.soft.logs[did.place]),
            steps=steps,
            positions=mark.positions,
            ghosts=mark.positions[:0],
            hidden=hidden[:0],
            entered=hidden[:0],
            missing=nothing,
        )
        self._settle(flow, neighbour, hidden, mark.positions[source])
        flow.neighbours.append(neighbour)

    def _follow(self, flow: Flow, did: Reduction, neighbour: Neighbour) -> None:
        """The neighbour's own choice at a later reducer."""
        mark, tokens = did.mark, len(did.run.example.embeddings)

        def together(ours: torch.Tensor, ghosts: torch.Tensor) -> torch.Tensor:
            rows = ours.new_zeros(tokens, ours.shape[1])
            rows[mark.positions], rows[neighbour.ghosts] = ours, ghosts
            return rows[neighbour.positions]

        entered, hidden = together(mark.entered, neighbour.entered), together(mark.hidden, neighbour.hidden)
        hidden, source = did.again(neighbour.steps[did.inside], entered, hidden, neighbour.positions)
        self._settle(flow, neighbour, hidden, neighbour.positions[source])

    def _settle(self, flow: Flow, neighbour: Neighbour, hidden: torch.Tensor, positions: torch.Tensor) -> None:
        """Splits a neighbour's rows behind a reducer ``[rows, d]`` into ghosts, and changes of the pass."""
        theirs = torch.zeros_like(neighbour.missing).index_fill_(0, positions, True)
        ours = torch.zeros_like(neighbour.missing).index_fill_(0, flow.positions, True)
        rows = hidden.new_zeros(len(theirs), hidden.shape[1]).index_copy_(0, positions, hidden)
        common = theirs[flow.positions].unsqueeze(1)
        change = torch.where(common, rows[flow.positions] - flow.hidden.detach(), 0.0)
        flow.hidden = flow.hidden + (straight(neighbour.share) * change).to(flow.hidden.dtype)
        missing = ours & ~theirs
        fresh = (missing & ~neighbour.missing)[flow.positions]
        flow.presence = flow.presence - (straight(neighbour.share) * fresh).to(flow.presence.dtype)
        neighbour.ghosts = (theirs & ~ours).nonzero()[:, 0]
        neighbour.hidden = rows[neighbour.ghosts]
        neighbour.positions, neighbour.missing = positions, missing
