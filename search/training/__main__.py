"""``python -m eos_search.training --out DIRECTORY``: trains the embedded model and writes all its files."""

import argparse
import json
import os
import sys
from pathlib import Path

import torch

from eos_search.training.checkpoint import write_model
from eos_search.training.recipe import CLUTTER1, RECIPES, recipe_of, settings
from eos_search.training.train import Run
from eos_vllm.core.errors import EosError
from eos_vllm.models.model_files import prepare_directory
from eos_vllm.provenance import provenance


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m eos_search.training", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="new or empty directory for the model")
    parser.add_argument("--recipe", default=CLUTTER1.name, help=f"{', '.join(RECIPES)} (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path(".cache/embedded-model"), help="checkpoints and log")
    parser.add_argument(
        "--behind", type=Path, default=None, help="checkpoints of the recipe that this one shares its first stages with"
    )
    parser.add_argument("--record", type=Path, default=None, help="file for provenance, settings, times and log")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    else:
        torch.set_float32_matmul_precision("high")
    origin = provenance(seed=args.seed, device=args.device, threads=torch.get_num_threads())
    try:
        recipe = recipe_of(args.recipe)
        prepare_directory(args.out)
        run = Run(args.work, device_of(args.device), args.seed, recipe)
        if run.begin(origin, args.behind):
            print(f"going on from {run.checkpoint}: stage {run.stage}, step {run.step}", flush=True)
        try:
            run.train()
        except KeyboardInterrupt:
            print(f"\nstopped; the same command goes on from {run.checkpoint}", file=sys.stderr)
            return 130
        write_model(run.trainee.model, args.out, recipe)
    except EosError as error:
        print(f"eos-vllm training: {error}", file=sys.stderr)
        return 2
    if args.record:
        record = {
            "recipe": recipe.name,
            "provenance": run.origins[0],
            "resumed": [other["git"] for other in run.origins[1:]],
            "stages": settings(run.stages),
            "seconds": {name: round(value, 1) for name, value in run.seconds.items()},
            "log": [json.loads(line) for line in run.log.read_text().splitlines()],
        }
        args.record.parent.mkdir(parents=True, exist_ok=True)
        args.record.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def device_of(name: str) -> torch.device:
    """The device of that name.

    Raises:
        EosError: there is none.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise EosError("--device", name, "is not there", "give cpu or cuda") from error


if __name__ == "__main__":
    sys.exit(main())
