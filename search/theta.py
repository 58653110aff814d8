"""Theta: seven unconstrained parameters for each decoder layer, their maps to ranges, and the starts (Eq. 9, 10, 2.6).

The numbers are float64: they are few, and what is exported is then to the last bit what the search used.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import nn

from eos_search.measures import SearchMeasure, tokens_of
from eos_vllm.analysis.scaling import scale_layers
from eos_vllm.core.errors import SettingError
from eos_vllm.core.profile import BEFORE

Kind = Literal["gate", "discard", "gamma", "tau", "theta", "rho", "nu"]
KINDS: tuple[Kind, ...] = get_args(Kind)
StartName = Literal["warm", "uniform"]

# The placement of the paper's Table 5 and the model that it belongs to. With fewer reducers the middle one goes first
# (the paper's Table 9 takes it out), then the earliest.
_PLACEMENTS = {1: (15,), 2: (2, 15), 3: (2, 6, 15)}
_PAPER_DEPTH = 32
# Sigmoids reach 0 only in the limit, where their gradient is 0 too: this stands for the paper's 0.
NEAR_ZERO = 0.02
_MEASURES = {"layer_average": "a layer average", "kv_bytes": "KV bytes of tokens", "flops": "FLOPs of tokens"}
GATE_ON = 0.95
GATE_OFF = 0.05
_MOST = 0.999
# Keeps 1 - g c above 0: profiles and Eq. 12 divide by it.
DISCARD_LIMIT = 1 - 1e-6


@dataclass(frozen=True)
class Ranges:
    """Constants of Eq. 10: factors on the raw gate (Tg) and discard (Tc), and the least temperature (epsilon)."""

    gate_scale: float = 5.0
    discard_scale: float = 1.0
    epsilon: float = 1e-4


@dataclass(frozen=True)
class ThetaValues:
    """Theta mapped to its ranges.

    Attributes:
        table: ``[L, 7]`` float64, a row per decoder layer, columns as in :data:`KINDS`.
        before: whether one more row, the last and so that of index -1, is of a reducer before the decoder.
    """

    table: torch.Tensor
    before: bool = False

    def column(self, kind: Kind) -> torch.Tensor:
        """One kind of parameter for all layers ``[L]``."""
        return self.table[:, KINDS.index(kind)]

    @property
    def gate(self) -> torch.Tensor:
        return self.column("gate")

    @property
    def discard(self) -> torch.Tensor:
        return self.column("discard")

    @property
    def depth(self) -> int:
        """Decoder layers of the model, L."""
        return self.table.shape[0] - self.before


class Theta(nn.Module):
    """The search variables ``raw`` ``[L, 7]``, a row more with a reducer before the decoder; called, they are mapped to
    their ranges.

    The last decoder layer has parameters but is no place for a reducer, which would change nothing there: its gate is
    fixed at 0, so that none of its parameters gets a gradient. So are gates behind a withdrawal. That of a reducer
    before the decoder is fixed at 1: how much it keeps is for its discard to say.
    """

    def __init__(
        self, raw: torch.Tensor, ranges: Ranges | None = None, before: bool = False, places: int | None = None
    ) -> None:
        """Theta at a point.

        Args:
            raw: the unconstrained numbers, taken as float64; rows as in :class:`ThetaValues`.
            ranges: constants of their maps.
            before: whether the last row is of a reducer before the decoder.
            places: so many of the first layers may reduce; all but the last where None.
        """
        super().__init__()
        self.before = before
        self.places = len(raw) - before - 1 if places is None else places
        self.raw = nn.Parameter(raw.detach().double().clone())
        self.ranges = ranges or Ranges()
        # Tg of the moment; a schedule may lead up to that of the ranges.
        self.gate_scale = self.ranges.gate_scale

    @classmethod
    def from_values(
        cls,
        values: torch.Tensor,
        ranges: Ranges | None = None,
        gate_scale: float | None = None,
        before: bool = False,
        places: int | None = None,
    ) -> Self:
        """Theta whose mapped values are ``values`` ``[L, 7]``; 0, 1 and the like are moved inside the open ranges.

        Args:
            values: what the maps of Eq. 10 are to give.
            ranges: their constants.
            gate_scale: Tg at which the gates have these values; that of ``ranges`` where left out.
            before: whether the last row is of a reducer before the decoder.
            places: so many of the first layers may reduce.
        """
        ranges = ranges or Ranges()
        gate_scale = gate_scale or ranges.gate_scale
        columns = dict(zip(KINDS, values.double().unbind(dim=1), strict=True))
        inside = {kind: column.clamp(1e-6, 1 - 1e-6) for kind, column in columns.items()}
        raw = {kind: inside[kind].logit() for kind in ("gamma", "rho", "nu")}
        raw["gate"] = inside["gate"].logit() / gate_scale
        raw["discard"] = inside["discard"].logit() / ranges.discard_scale
        raw["theta"] = ((columns["theta"] + 1) / 2).clamp(1e-6, 1 - 1e-6).logit()
        positive = (columns["tau"] - ranges.epsilon).clamp(min=1e-6)
        raw["tau"] = positive + torch.log(-torch.expm1(-positive))
        theta = cls(torch.stack([raw[kind] for kind in KINDS], dim=1), ranges, before, places)
        theta.gate_scale = gate_scale
        return theta

    def forward(self) -> ThetaValues:
        """Eq. 10."""
        raw = dict(zip(KINDS, self.raw.unbind(dim=1), strict=True))
        is_place, fixed = torch.ones_like(raw["gate"]), torch.zeros_like(raw["gate"])
        is_place[self.places :] = 0.0
        fixed[len(fixed) - self.before :] = 1.0
        mapped = {
            "gate": torch.sigmoid(raw["gate"] * self.gate_scale) * is_place + fixed,
            "discard": torch.sigmoid(raw["discard"] * self.ranges.discard_scale).clamp(max=DISCARD_LIMIT),
            "gamma": torch.sigmoid(raw["gamma"]),
            "tau": F.softplus(raw["tau"]) + self.ranges.epsilon,
            "theta": 2 * torch.sigmoid(raw["theta"]) - 1,
            "rho": torch.sigmoid(raw["rho"]),
            "nu": torch.sigmoid(raw["nu"]),
        }
        return ThetaValues(torch.stack([mapped[kind] for kind in KINDS], dim=1), self.before)


def layers_of(rows: int, acting: Sequence[int]) -> list[int]:
    """The layer of each row of recorded values: the last is -1 where a reducer acts before the decoder."""
    return [*range(rows - 1), BEFORE] if BEFORE in acting else list(range(rows))


def default_placement(depth: int, max_reducers: int) -> tuple[int, ...]:
    """Table 5's layers {2, 6, 15} of 32 at the same share of ``depth`` layers; fewer where C is below 3.

    Raises:
        ProfileError: the model has too few layers.
    """
    return scale_layers(_PLACEMENTS[min(max_reducers, len(_PLACEMENTS))], _PAPER_DEPTH, depth)


def start_values(
    name: StartName,
    depth: int,
    visual_tokens: int,
    budget: int,
    max_reducers: int,
    placement: Sequence[int],
    measure: SearchMeasure = "final",
    gate_on: float = GATE_ON,
    gate_off: float = GATE_OFF,
    crossover: int | None = None,
    before: bool = False,
    withdraw: int | None = None,
) -> torch.Tensor:
    """Values ``[L, 7]`` that the search starts from.

    ``warm`` is the paper's section 2.6 (active at a known placement, gamma near 0), ``uniform`` its Table 5 (gamma and
    tau 0.5). theta, rho and nu are 0 in both; rho and nu as near to it as leaves a gradient. The paper gives neither
    gates nor discards: here the active gates stand at ``gate_on``, all others share what then is left of C (at most
    ``gate_off`` each), and all discards are equal and meet the budget. So the start satisfies both constraints of
    Eq. 13.

    Args:
        name: which start.
        depth: decoder layers L.
        visual_tokens: N0.
        budget: B.
        max_reducers: C.
        placement: layers active at the start, at most C, ascending, each below L - 1.
        measure: what B counts (:func:`eos_search.measures.tokens_of`).
        gate_on: gates of the placement.
        gate_off: most that other gates begin with.
        crossover: for the measure flops.
        before: a reducer before the decoder has the last row, one more than there are layers.
        withdraw: layer behind which no visual token goes on; the placement lies in front of it.

    Raises:
        SettingError: a placement that is empty, too long, out of range, or not ascending; a layer average that it
            cannot reach.
    """
    layers, places = list(placement), depth - 1 if withdraw is None else withdraw
    if not 1 <= len(layers) <= max_reducers:
        problem = f"{len(layers)} layers active at the start, of max_reducers={max_reducers}"
        raise SettingError("placement", layers, problem, "give at least 1 and at most max_reducers")
    if withdraw is not None and max(layers, default=0) >= withdraw:
        remedy = f"give layers below {withdraw}, or withdraw later"
        raise SettingError("placement", layers, f"images are withdrawn behind layer {withdraw}", remedy)
    if layers != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= places:
        remedy = f"give ascending layers in 0..{places - 1}; behind the last layer nothing is left to reduce"
        raise SettingError("placement", layers, f"these are no places of a model of {depth} layers", remedy)
    left = max_reducers - gate_on * len(layers)
    off = min(gate_off, left / (places - len(layers))) if places > len(layers) else 0.0
    if measure == "final" and not before:
        discard = min((1 - (budget / visual_tokens) ** (1 / len(layers))) / gate_on, _MOST)
    else:
        seen: list[tuple[bool, int] | None]
        seen = [(before, sum(layer < index for layer in layers)) for index in range(depth + 1)]
        if withdraw is not None and measure != "final":
            seen[withdraw + 1 :] = [None] * (depth - withdraw)
        discard = _discard_for_cost(budget, visual_tokens, layers, seen, gate_on, measure, crossover)
    gamma = NEAR_ZERO if name == "warm" else 0.5
    start = {
        "gate": off,
        "discard": discard,
        "gamma": gamma,
        "tau": 0.5,
        "theta": 0.0,
        "rho": NEAR_ZERO,
        "nu": NEAR_ZERO,
    }
    values = torch.tensor([start[kind] for kind in KINDS], dtype=torch.float64).repeat(depth + before, 1)
    values[layers, KINDS.index("gate")] = gate_on
    return values


def _discard_for_cost(
    budget: int,
    visual_tokens: int,
    layers: Sequence[int],
    seen: Sequence[tuple[bool, int] | None],
    gate: float,
    measure: SearchMeasure,
    crossover: int | None,
) -> float:
    """The discard that all reducers share.

    ``seen``: for each layer, and behind the last, which reducers its tokens have passed: whether the one before the
    decoder, and how many inside; None behind a withdrawal.
    """

    def average(discard: float) -> float:
        passed = [(1 - discard) ** n[0] * (1 - gate * discard) ** n[1] if n is not None else 0.0 for n in seen]
        if measure in ("layer_average", "kv_bytes"):
            return visual_tokens * sum(passed[:-1]) / (len(passed) - 1)
        entering, *left = (torch.tensor(passed, dtype=torch.float64) * visual_tokens).unbind()
        return tokens_of(entering, torch.stack(left), measure, crossover).item()

    if (least := average(_MOST)) > budget:
        remedy = f"give {math.ceil(least)} or more, an earlier placement, or budget_measure final"
        problem = f"reducers at {list(layers)} leave {_MEASURES.get(measure, measure)} of {least:.1f} at least"
        raise SettingError("budget", budget, problem, remedy)
    low, high = 0.0, _MOST
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if average(middle) > budget else (low, middle)
    return high
