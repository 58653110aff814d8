"""One optimiser step of the search: gradients over a batch, one example at a time, averaged over processes."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch.utils.data import Sampler
from transformers import get_cosine_schedule_with_warmup

from eos_search.examples import Broken
from eos_search.lagrangian import BudgetMultiplier, band, project
from eos_search.moves import Move, best_gain, carry_out, moved, moves_of
from eos_search.objective import Objective, Penalties, TaskTerms, penalties
from eos_search.settings import SearchSettings
from eos_search.structure import Rules, Structure, acting_of, places, read_structure, unmet_budget
from eos_search.theta import KINDS, Theta, ThetaValues
from eos_vllm.core.errors import EosError, SettingError

Example = TypeVar("Example")
Task = Callable[[Example, ThetaValues, Structure], TaskTerms]


class DivergedError(EosError):
    """A loss or gradient that is no number."""


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Attributes:
        terms: means over the batch of ``loss``, ``cross_entropy`` and ``alignment``; the weighted ``budget`` and
            ``cost`` penalties; ``n_final`` (what is held against B), ``gates`` (held against C), ``gradient`` (its
            norm before clipping), ``learning_rate``; where they are asked for, ``divergence`` and ``multiplier``.
        structure: the hard reduction of this step, before the update.
        skipped: ids and problems of rows of this process that could not be decoded.
        stop: whether any process was asked to stop.
    """

    terms: dict[str, float]
    structure: Structure
    skipped: list[tuple[str, str]]
    stop: bool


class Trainer:
    """Optimises Theta. The frozen model is behind ``task`` and not wrapped: only Theta's gradient goes between
    processes, in one message per step."""

    def __init__(
        self, theta: Theta, rules: Rules, objective: Objective, settings: SearchSettings, accelerator: Accelerator
    ) -> None:
        """Sets up AdamW with linear warm-up and cosine decay; state goes into the accelerator's checkpoints."""
        self.theta = theta.to(accelerator.device)
        self.rules, self.objective, self.settings, self.accelerator = rules, objective, settings, accelerator
        optimizer = torch.optim.AdamW(theta.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
        warmup = math.ceil(settings.warmup * settings.steps)
        self.scheduler = get_cosine_schedule_with_warmup(optimizer, warmup, settings.steps)
        self.optimizer = accelerator.prepare(optimizer)
        accelerator.register_for_checkpointing(self.theta, self.scheduler)
        self.multiplier = BudgetMultiplier(settings.lambda_budget) if settings.constraint == "lagrangian" else None
        if self.multiplier is not None:
            accelerator.register_for_checkpointing(self.multiplier)
        self._learns = torch.tensor([kind not in settings.frozen for kind in KINDS], device=accelerator.device)
        rates = [settings.gate_rate if kind == "gate" else 1.0 for kind in KINDS]
        self._rates = torch.tensor(rates, dtype=torch.float64, device=accelerator.device)

    def temper(self) -> None:
        """Sets the temperature of the gates for the step to come: from its start to its end, by equal factors.

        Harder gates keep other counts: a budget that is to be met is brought back into its band.
        """
        end = self.settings.gate_scale
        start = self.settings.gate_scale_start or end
        steps = self.settings.gate_settled * (self.settings.steps - 1)
        done = min(1.0, self.scheduler.last_epoch / steps) if steps > 0 else 1.0
        self.theta.gate_scale = end if done == 1.0 else start * (end / start) ** done
        if self.multiplier is not None:
            factor = band(self.scheduler.last_epoch - 1, self.settings.steps)
            project(self.theta, self.objective, self.rules, factor)

    def step(self, batch: Sequence[Any], task: Task, stop: bool = False) -> StepResult:
        """One update from one batch.

        Args:
            batch: this process's examples; broken ones are left out.
            task: the task loss of one example.
            stop: whether this process was asked to stop.

        Raises:
            DivergedError: a loss or gradient is no finite number; names the examples. Theta is as before the step.
            SettingError: not one example of the batch could be decoded.
        """
        self.temper()
        every, step = self.settings.move_every, self.scheduler.last_epoch
        if every and step and step % every == 0:
            self._move(batch, task)
        mapped = self.theta()
        values = replace(mapped, table=mapped.table.detach().requires_grad_())
        structure = read_structure(values, self.rules)
        taken = self._taken(batch, values, structure)
        examples = [example for example, _ in taken]
        done = [self._backward(task, example, values, hard) for example, hard in taken]
        self._check([example.id for example in examples], done)
        gradient = torch.zeros_like(values.table) if values.table.grad is None else values.table.grad
        sums = torch.tensor([*map(sum, zip(*done, strict=True))] or [0.0] * 4, dtype=torch.float64)
        shared = torch.cat([gradient.flatten(), sums.to(gradient), gradient.new_tensor([len(done), float(stop)])])
        shared = self.accelerator.reduce(shared, "sum")
        size = gradient.numel()
        loss, answer, alignment, divergence, count, stops = shared[size:].tolist()
        if count == 0:
            ids = ", ".join(example.id for example in batch)
            raise SettingError("data", ids, "no image of this batch can be decoded", "mend or leave out these rows")
        constraint = self._constraint(values, structure)
        pull = torch.autograd.grad(constraint.budget + constraint.cost, values.table)[0]
        norm = self._update(mapped, shared[:size].view_as(gradient) / count + pull, [e.id for e in examples])
        penalty = {"budget": constraint.budget.item(), "cost": constraint.cost.item()}
        terms = {
            "loss": loss / count + sum(penalty.values()),
            "cross_entropy": answer / count,
            "alignment": alignment / count,
            **penalty,
            "n_final": constraint.tokens.item(),
            "gates": constraint.gates.item(),
            "gradient": norm,
            "learning_rate": self.scheduler.get_last_lr()[0],
        }
        if self.objective.lambda_kl:
            terms["divergence"] = divergence / count
        if self.multiplier is not None:
            terms["multiplier"] = self.multiplier.value
            self.multiplier.update(terms["n_final"], self.objective.budget)
            factor = band(self.scheduler.last_epoch, self.settings.steps)
            project(self.theta, self.objective, self.rules, factor)
        self.scheduler.step()
        broken = [(example.id, example.problem) for example in batch if isinstance(example, Broken)]
        return StepResult(terms, structure, broken, stops > 0)

    def _taken(self, batch: Sequence[Any], values: ThetaValues, structure: Structure) -> list[tuple[Any, Structure]]:
        """Examples that are whole, each with the reduction whose turn it is.

        Budgets take turns over the examples of all steps and processes, in the order of the data.
        """
        served = [read_structure(values, self.rules, budget) for budget in self.settings.serve_budgets] or [structure]
        first = self.scheduler.last_epoch * self.settings.batch_size + self.accelerator.process_index
        apart = self.accelerator.num_processes
        return [
            (example, served[(first + apart * i) % len(served)])
            for i, example in enumerate(batch)
            if not isinstance(example, Broken)
        ]

    def _constraint(self, values: ThetaValues, structure: Structure) -> Penalties:
        constraint = penalties(self.objective, values, structure.acting)
        if self.multiplier is None:
            return constraint
        return replace(constraint, budget=self.multiplier.term(constraint.tokens, self.objective.budget))

    @torch.no_grad()
    def _move(self, batch: Sequence[Any], task: Task) -> None:
        """Puts one reducer elsewhere, if the hard loss of the batch is lower there (:mod:`eos_search.moves`)."""
        here = self.theta()
        allowed: list[Move] = []
        losses, pulls = [self._hard(here, batch, task)], [self._pull(here)]
        for move in moves_of(acting_of(here, self.rules), places(here.depth, self.rules)):
            there = replace(here, table=moved(here.table, move))
            if unmet_budget(there, self.rules, self.settings.serve_budgets) is None:
                allowed.append(move)
                losses.append(self._hard(there, batch, task))
                pulls.append(self._pull(there))
        add_up = functools.partial(self.accelerator.reduce, reduction="sum")
        best = best_gain(allowed, torch.stack(losses), pulls, add_up) if allowed else None
        if best is not None:
            carry_out(best, self.theta, self.optimizer)

    def _hard(self, values: ThetaValues, batch: Sequence[Any], task: Task) -> torch.Tensor:
        taken = self._taken(batch, values, read_structure(values, self.rules))
        return values.table.new_tensor([task(example, values, hard).total.item() for example, hard in taken])

    def _pull(self, values: ThetaValues) -> float:
        constraint = self._constraint(values, read_structure(values, self.rules))
        return (constraint.budget + constraint.cost).item()

    def _backward(
        self, task: Task, example: Any, values: ThetaValues, structure: Structure
    ) -> tuple[float, float, float, float]:
        terms = task(example, values, structure)
        if terms.total.requires_grad:
            terms.total.backward()
        divergence = 0.0 if terms.divergence is None else terms.divergence.item()
        return terms.total.item(), terms.cross_entropy.item(), terms.alignment.item(), divergence

    def _update(self, mapped: ThetaValues, gradient: torch.Tensor, ids: list[str]) -> float:
        self.optimizer.zero_grad()
        mapped.table.backward(gradient=gradient * self._learns)
        norm = torch.nn.utils.clip_grad_norm_(self.theta.parameters(), self.settings.clip).item()
        if not math.isfinite(norm):
            raise _diverged("gradient", norm, ids)
        before = self.theta.raw.detach().clone()
        self.optimizer.step()
        with torch.no_grad():
            if self.settings.gate_rate != 1:
                self.theta.raw.copy_(before + self._rates * (self.theta.raw - before))
            # Weight decay and moments don't move what is frozen.
            self.theta.raw.copy_(torch.where(self._learns, self.theta.raw, before))
        return norm

    def _check(self, ids: list[str], done: list[tuple[float, float, float, float]]) -> None:
        bad = [i for i, terms in zip(ids, done, strict=True) if not all(map(math.isfinite, terms))]
        if bad:
            raise _diverged("loss", next(t[0] for i, t in zip(ids, done, strict=True) if i == bad[0]), bad)


def _diverged(what: str, value: float, ids: list[str]) -> DivergedError:
    problem = f"no finite number, at {', '.join(ids)}"
    return DivergedError(what, value, problem, "look at these rows, lower the learning rate, or take dtype float32")


class StepSampler(Sampler[list[int]]):
    """Which examples each step takes: a function of seed and step, so that a search resumes where it was.

    Every pass over the data has its own order. Each process takes every so many of a step's examples.
    """

    def __init__(
        self, examples: int, batch: int, first_step: int, steps: int, seed: int, process: int = 0, processes: int = 1
    ) -> None:
        """Steps ``first_step`` to ``steps - 1``, ``batch`` examples each over all processes."""
        self.examples, self.batch, self.seed = examples, batch, seed
        self.range = range(first_step, steps)
        self.process, self.processes = process, processes

    def __len__(self) -> int:
        return len(self.range)

    def __iter__(self) -> Iterator[list[int]]:
        @functools.lru_cache(maxsize=2)
        def order(epoch: int) -> list[int]:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            return torch.randperm(self.examples, generator=generator).tolist()

        for step in self.range:
            places = range(step * self.batch, (step + 1) * self.batch)[self.process :: self.processes]
            yield [order(place // self.examples)[place % self.examples] for place in places]
