"""Trains the embedded model in stages and writes it: ``python -m eos_search.training --out DIRECTORY``.

Each stage starts with a fresh optimizer, warm-up and cosine decay. A run that is stopped goes on from its last
checkpoint; batches depend on stage and step only, so that it sees the same data as one that never stopped.
"""

import json
import math
import pickle
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from eos_search.training.batches import QUESTIONS, Batch, collate, loader
from eos_search.training.growth import build, grow
from eos_search.training.network import Trainee
from eos_search.training.recipe import CLUTTER1, Recipe, Stage, settings
from eos_vllm.cluttervqa import make_sample
from eos_vllm.core.errors import EosError

_WARM_UP = 60
_LOG_EVERY = 20
_CHECKPOINT_EVERY = 100
_VALIDATION_IMAGES = 96


class Run:
    """State of a training run: model, stage, step, and where it is kept."""

    def __init__(self, folder: Path, device: torch.device, seed: int, recipe: Recipe = CLUTTER1) -> None:
        self.folder, self.device, self.seed, self.recipe = folder, device, seed, recipe
        self.stage = self.step = 0
        self.seconds: dict[str, float] = {}
        # What made the weights: the revisions under which it ran, the first one first.
        self.origins: list[dict[str, Any]] = []
        torch.manual_seed(seed)
        self.trainee = Trainee(build(recipe.shallow, recipe), recipe=recipe).to(device)
        self.optimizer = self._optimizer()
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The recipe's."""
        return self.recipe.stages

    @property
    def checkpoint(self) -> Path:
        """File of the latest state."""
        return self.folder / "checkpoint.pt"

    @property
    def log(self) -> Path:
        """File of the training's log."""
        return self.folder / "log.jsonl"

    def begin(self, origin: dict[str, Any], behind: Path | None = None) -> bool:
        """Goes on from the checkpoint if there is one, else starts anew; returns whether it goes on.

        Args:
            origin: provenance of this process, which runs the code that is loaded now.
            behind: folder of a training of the recipe that this one ``begins`` with: where there is no checkpoint yet,
                its last stage before the model grows is gone on from.

        Raises:
            EosError: the checkpoint cannot be read, or is of another seed, another recipe or other stages.
        """
        self.origins = [origin]
        file, recipe, shared = self.checkpoint, self.recipe.name, None
        if not file.exists():
            self.log.unlink(missing_ok=True)
            if behind is None:
                return False
            if self.recipe.begins is None:
                raise EosError("--behind", str(behind), f"{recipe} begins with no other recipe", "leave it out")
            recipe, shared = self.recipe.begins, [stage.layers < self.recipe.depth for stage in self.stages].count(True)
            file = behind / f"after-{self.stages[shared - 1].name}.pt"
        try:
            if file != self.checkpoint:
                shutil.copyfile(file.parent / self.log.name, self.log)
            state = torch.load(file, map_location=self.device, weights_only=True)
            held = {name: state[name] for name in ("seed", "recipe")}
            held["stages"] = json.loads(state["stages"])[:shared]
            # What it did is the same where its recipe had fewer stages in the end.
            shared = len(held["stages"]) if shared is None else shared
            origins = json.loads(state["origins"])
        except (OSError, RuntimeError, KeyError, ValueError, pickle.UnpicklingError) as error:
            problem = f"cannot be gone on from ({type(error).__name__})"
            raise EosError("checkpoint", str(file), problem, "remove it to train from nothing") from error
        stages = json.loads(json.dumps(settings(self.stages[:shared])))
        for name, value in {"seed": self.seed, "recipe": recipe, "stages": stages}.items():
            if held[name] != value:
                problem = f"holds a training of other {name}"
                raise EosError("checkpoint", str(file), problem, "remove it to train from nothing")
        self.stage, self.step, self.seconds = state["stage"], state["step"], state["seconds"]
        self.origins = [*origins, origin]
        self._cut_log()
        if state["depth"] != self.trainee.depth:
            self._grow()
        self.trainee.load_state_dict(state["trainee"])
        self.optimizer = self._optimizer()
        if state["optimizer"] is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        return True

    def _cut_log(self) -> None:
        """Drops from the log what will be done again."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        order = {stage.name: number for number, stage in enumerate(self.stages)}
        done = (self.stage, self.step)
        records = [json.loads(line) for line in lines]
        # What has no step was told at the end of its stage.
        kept = [record for record in records if (order[record["stage"]], record.get("step", math.inf)) <= done]
        self.log.write_text("".join(json.dumps(record) + "\n" for record in kept))

    def save(self, path: Path | None = None) -> None:
        """Writes the state, whole or not at all."""
        path = path or self.checkpoint
        state = {
            "stage": self.stage,
            "step": self.step,
            "seconds": self.seconds,
            "seed": self.seed,
            "recipe": self.recipe.name,
            "stages": json.dumps(settings(self.stages)),
            "origins": json.dumps(self.origins),
            "depth": self.trainee.depth,
            "trainee": self.trainee.state_dict(),
            "optimizer": self.optimizer.state_dict() if self.step else None,
        }
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def train(self) -> None:
        """Runs every stage that is left."""
        while self.stage < len(self.stages):
            stage = self.stages[self.stage]
            if stage.layers > self.trainee.depth:
                torch.manual_seed(self.seed + 1)
                self._grow()
            if self.step == 0:
                self.optimizer = self._optimizer()
            self._train_stage(stage)
            self.stage, self.step = self.stage + 1, 0
            self.save()
            self.save(self.folder / f"after-{stage.name}.pt")

    def _grow(self) -> None:
        model = grow(self.trainee.model, self.recipe)
        self.trainee = Trainee(model, self.trainee.heads, self.recipe).to(self.device)

    def _optimizer(self) -> torch.optim.Optimizer:
        matrices = [p for p in self.trainee.parameters() if p.ndim > 1]
        others = [p for p in self.trainee.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.97), fused=True)

    def _train_stage(self, stage: Stage) -> None:
        bar = tqdm(total=stage.steps, initial=self.step, desc=stage.name, smoothing=0.05)
        meter = Meter(self.recipe.benchmark.kinds)
        begun = time.monotonic() - self.seconds.get(stage.name, 0.0)
        recipe = self.recipe
        for parts in loader(self.stage, stage.parts, self.step, stage.steps, recipe.mix_in(stage), recipe.version):
            self._one_step(stage, [part.to(self.device) for part in parts], meter)
            self.seconds[stage.name] = time.monotonic() - begun
            bar.update()
            if self.step % _LOG_EVERY == 0 or self.step == stage.steps:
                record = {"stage": stage.name, "step": self.step, "seconds": round(self.seconds[stage.name], 1)}
                record |= meter.flush()
                bar.set_postfix_str(" ".join(f"{k[:4]} {v:.2f}" for k, v in record.items() if isinstance(v, float)))
                self._log(record)
            if self.step % _CHECKPOINT_EVERY == 0:
                self.save()
        bar.close()
        if stage.layers:
            self._log({"stage": stage.name, "validation": validate(self.trainee, self.device)})
        if self.recipe.pointers:
            self._log({"stage": stage.name, "looking": round(looking(self.trainee, self.device), 2)})

    def _one_step(self, stage: Stage, parts: list[Batch], meter: "Meter") -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate(stage, self.step)
        # Which steps are blind is a function of the step, as the data is.
        blind = (self.step * 0.6180339887) % 1.0 < stage.blind
        asking = sum(part.images for part in stage.parts if part.questions)
        everything = sum(part.images for part in stage.parts)
        for number, (part, batch) in enumerate(zip(stage.parts, parts, strict=True)):
            questions = part.questions and stage.layers > 0
            thinning = self.recipe.thinning(stage, self.step, number) if questions else None
            losses, right = self.trainee(batch, questions, blind, thinning)
            share = {name: part.images / (everything if name in _TOWER_LOSSES else asking) for name in losses}
            torch.stack([share[name] * loss for name, loss in losses.items()]).sum().backward()
            meter.add({name: share[name] * loss.detach() for name, loss in losses.items()}, batch, right)
        torch.nn.utils.clip_grad_norm_(self.trainee.parameters(), stage.clip)
        self.optimizer.step()
        self.step += 1
        self.optimizer.zero_grad(set_to_none=True)
        meter.steps += 1

    def _log(self, record: dict[str, Any]) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if "validation" in record:
            tqdm.write(f"{record['stage']}: " + ", ".join(f"{k} {v:.3f}" for k, v in record["validation"].items()))


_TOWER_LOSSES = ("colour", "kind", "order", "middle", "place", "words", "whole")


class Meter:
    """Mean losses, and accuracy per kind, since it was last read."""

    def __init__(self, kinds: tuple[str, ...]) -> None:
        self.steps = 0
        self.kinds = kinds
        self._losses: dict[str, torch.Tensor] = {}
        self._right = torch.zeros(len(kinds))
        self._asked = torch.zeros(len(kinds))

    def add(self, losses: dict[str, torch.Tensor], batch: Batch, right: torch.Tensor | None) -> None:
        """Adds one part of a step."""
        for name, loss in losses.items():
            self._losses[name] = self._losses.get(name, torch.zeros(())) + loss.cpu()
        if right is not None:
            kind = batch.kind.cpu()
            self._right.index_add_(0, kind, right.float().cpu())
            self._asked.index_add_(0, kind, torch.ones(len(kind)))

    def flush(self) -> dict[str, float]:
        """The means, by name of loss and of kind; starts anew."""
        found = {name: round(float(loss) / max(self.steps, 1), 4) for name, loss in self._losses.items()}
        for kind, right, asked in zip(self.kinds, self._right.tolist(), self._asked.tolist(), strict=True):
            if asked:
                found[kind] = round(right / asked, 4)
        self.__init__(self.kinds)  # type: ignore[misc]
        return found


def rate(stage: Stage, step: int) -> float:
    """Learning rate of a step: linear warm-up, then a cosine down to ``final_rate``."""
    if step < _WARM_UP:
        return stage.rate * (step + 1) / _WARM_UP
    done = (step - _WARM_UP) / max(1, stage.steps - _WARM_UP)
    return stage.final_rate + (stage.rate - stage.final_rate) * (1 + math.cos(math.pi * done)) / 2


@torch.no_grad()
def validate(trainee: Trainee, device: torch.device, images: int = _VALIDATION_IMAGES) -> dict[str, float]:
    """Accuracy per kind on whole frames of the validation split, and their mean."""
    version = trainee.recipe.version
    meter = Meter(trainee.recipe.benchmark.kinds)
    for start in range(0, images, 8):
        numbers = range(start, min(start + 8, images))
        batch = collate([make_sample("validation", i, QUESTIONS, version=version) for i in numbers])
        batch = batch.to(device)
        meter.add({}, batch, trainee(batch)[1])
    found = meter.flush()
    return found | {"mean": sum(found.values()) / len(found)}


def looking(trainee: Trainee, device: torch.device, images: int = 16) -> float:
    """:meth:`Trainee.looking` on whole frames of the validation split."""
    version = trainee.recipe.version
    return trainee.looking(
        collate([make_sample("validation", i, 1, version=version) for i in range(images)]).to(device)
    )
