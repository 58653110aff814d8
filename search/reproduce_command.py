"""``eos-search reproduce``: the paper's search and its Tables 4, 7 and 8, by one command on real data.

Each step is a command of its own, is printed, and goes on where it was stopped: ``eos-search run``, ``plot search``
(Fig. 8), ``lmms``, and the tables as one page. On the embedded model it is a rehearsal of minutes, with few steps and
:mod:`eos_search.lmms_local` in lmms-eval's place.
"""

import argparse
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eos_search.lmms import BENCHMARKS, HARNESS, LOCAL
from eos_vllm.core.errors import EosError

_EMBEDDED, _NONE = "embedded", "none"
_DATA = "llava_v1_5_mix665k.json"


@dataclass(frozen=True)
class Recipe:
    """What is reproduced on a kind of model.

    Attributes:
        config: settings of the search.
        profiles: rows of the tables beside the searched profile; none is the unreduced model.
        against: the one among them that Table 7 shows differences to.
        tasks: columns of the tables.
        harness: what answers them.
        serve: flags of the servers.
        budgets: of the tables.
        limit: questions of each task at most.
        search: settings of the search over those of the config.
    """

    config: str
    profiles: tuple[str, ...]
    against: str
    tasks: tuple[str, ...]
    harness: str
    serve: str
    budgets: str = "192,128,96,64,32,16"
    limit: int | None = None
    search: Mapping[str, Any] = field(default_factory=dict)


# Evaluation is in fp16 in the paper (Table 5). Its ToMe and Pool stand at SparseVLM's layers.
LLAVA = Recipe(
    "llava-1.5-7b",
    ("none", *(f"{name}-llava-1.5-7b" for name in ("sparsevlm-v1", "sparsevlm-v2", "tome-style", "pool", "eos"))),
    "sparsevlm-v2-llava-1.5-7b",
    tuple(BENCHMARKS),
    HARNESS,
    "--dtype float16",
)
REHEARSAL = Recipe(
    _EMBEDDED,
    ("none", "embedded-sparsevlm-v2"),
    "embedded-sparsevlm-v2",
    tuple(LOCAL),
    "eos_search.lmms_local",
    "--dtype float32 --enforce-eager --max-model-len 1024 --kv-cache-memory-bytes 134217728",
    "64,32,16",
    25,
    {"steps": 40, "samples": 320},
)


def add_parser(subparsers: Any) -> None:
    """Registers ``reproduce``."""
    parser = subparsers.add_parser(
        "reproduce",
        help="search on real data, run the twelve benchmarks, and write the paper's Tables 4, 7 and 8",
        description="Search on LLaVA-1.5-7B and LLaVA-mix-665K, run the paper's twelve benchmarks with lmms-eval at "
        "six budgets, and write Tables 4, 7 and 8. With --model embedded: a rehearsal on the embedded model.",
    )
    parser.add_argument("--model", required=True, help="directory or name of LLaVA-1.5-7B, or embedded")
    parser.add_argument("--data", default=None, help=f"{_DATA}, with its images beside it; nothing for embedded")
    parser.add_argument("--config", default=None, help="of the search (default: llava-1.5-7b, or embedded)")
    parser.add_argument("--steps", type=int, default=None, help="of the search (default: the config's; 40 on embedded)")
    parser.add_argument("--profiles", default=None, help="rows beside the searched one (default: the paper's)")
    parser.add_argument("--budgets", default=None, help=f"visual tokens of an image (default: {LLAVA.budgets})")
    parser.add_argument("--tasks", default=None, help="columns of the tables (default: the paper's twelve)")
    parser.add_argument("--limit", type=int, default=None, metavar="N", help="at most N questions of each task")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has lmms-eval (default: this one)")
    parser.add_argument("--serve-args", default=None, metavar="TEXT", help="flags of the servers, in one text")
    parser.add_argument("--out", type=Path, default=None, help="folder (default: runs/reproduce-CONFIG)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs what is missing, and writes the page.

    Raises:
        EosError: no data for a real model, or a step that failed.
    """
    from eos_search.lmms_command import read_raw
    from eos_search.lmms_tables import paper_tables

    recipe = recipe_of(args.model)
    folder = args.out or Path("runs") / f"reproduce-{args.config or recipe.config}"
    names = args.profiles.split(",") if args.profiles else recipe.profiles
    baselines = comparable(names, folder)
    rows = [*[_NONE] * (_NONE in names), *map(str, baselines)]
    steps, page = commands(args, recipe, folder, rows), folder / "tables.md"
    if args.dry_run:
        print("\n".join(shlex.join(["eos-search", *words]) for words in steps), f"would write {page}", sep="\n")
        return 0
    write_profiles(baselines)
    for words in steps:
        print(shlex.join(["eos-search", *words]), flush=True)
        if run_step(words):
            raise EosError("step", words[0], "it failed", "see its output above; the same command goes on from there")
    result = read_raw(folder / "lmms.json")
    head = page_head(args.model, args.config or recipe.config, result)
    page.write_text(head + paper_tables(result, recipe.against) + "\n", encoding="utf-8")
    print(f"wrote {page}")
    return 0


def run_step(words: Sequence[str]) -> int:
    """Exit code of a step. Ctrl-C and SIGTERM end the step first: it ends its servers, or writes its checkpoint."""
    before = signal.signal(signal.SIGTERM, _terminate)
    process = subprocess.Popen([sys.executable, "-m", "eos_search.main", *words])
    try:
        return process.wait()
    except KeyboardInterrupt as stop:
        if isinstance(stop, _TerminatedError):
            process.send_signal(signal.SIGINT)  # a terminal's Ctrl-C has reached it already, and a second acts at once
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM came, to this process alone."""


def _terminate(_number: int, _frame: Any) -> None:
    raise _TerminatedError


def recipe_of(model: str) -> Recipe:
    """The rehearsal for the embedded model, the paper's recipe for every other."""
    return REHEARSAL if model == _EMBEDDED else LLAVA


def commands(args: argparse.Namespace, recipe: Recipe, folder: Path, rows: Sequence[str]) -> list[list[str]]:
    """The steps, each as words behind ``eos-search``; a search that has ended is not among them.

    Raises:
        EosError: no data for a real model; or the folder holds a search of other settings.
    """
    if args.model != _EMBEDDED and not args.data:
        raise EosError("--data", args.data, "there is nothing to search on", f"give the path of {_DATA}")
    search, raw, config = folder / "search", folder / "lmms.json", args.config or recipe.config
    given = {"model": args.model, "output": str(search), "data": args.data, "steps": args.steps}
    settings = {**recipe.search, **{name: value for name, value in given.items() if value is not None}}
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    begun = is_begun(search, config, settings)
    found = [] if (search / "theta.json").exists() else [["run", "--config", config, *flags, *["--resume"] * begun]]
    found.append(["plot", "search", "--run", str(search), "--out", str(folder / "search.png")])
    limit = args.limit or recipe.limit
    words = ["lmms", "--serve", args.model, f"--serve-args={args.serve_args or recipe.serve}"]
    words += ["--profiles", ",".join([*rows, str(search / "theta.json")]), "--budgets", args.budgets or recipe.budgets]
    words += ["--tasks", args.tasks or ",".join(recipe.tasks)]
    words += ["--python", args.python, "--harness", recipe.harness, "--folder", str(folder / "lmms"), "--out", str(raw)]
    words += ["--limit", str(limit)] if limit is not None else []
    return [*found, words]


def is_begun(search: Path, config: str, settings: Mapping[str, Any]) -> bool:
    """Whether a folder holds a search of these settings over a config's.

    Raises:
        SettingError: it holds another one.
    """
    if not (search / "settings.json").exists():
        return False
    from eos_search.run_folder import RunFolder
    from eos_search.settings import read_config, read_settings

    RunFolder(search, is_main=True).check_resumes(read_settings(read_config(config), settings))
    return True


def comparable(names: Sequence[str], folder: Path) -> dict[Path, dict[str, Any]]:
    """Baselines that can be had at every budget, as files in ``folder`` and what is in them.

    SparseVLM publishes counts for 192, 128, 96 and 64 and counts an average over layers, which its places cannot bring
    below 54. The paper shows it at 32 and 16, and does not say how: here the budget then is what is left in the end,
    as for the searched profile. Published counts stay.
    """
    from eos_vllm import profiles

    found = {}
    for name in (name for name in names if name != _NONE):
        data = profiles.resolve(name).to_dict()
        data["budget"]["measure"] = "final"
        found[folder / "profiles" / f"{data['name']}.json"] = data
    return found


def write_profiles(wanted: dict[Path, dict[str, Any]]) -> None:
    """Writes profiles to their files."""
    for file, data in wanted.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def page_head(model: str, config: str, result: dict[str, Any]) -> str:
    """Where the tables come from, as the page's first lines."""
    from eos_vllm.provenance import commit_line, machine_line

    source = result["provenance"]
    limit = f" At most {result['limit']} questions of each task." if result.get("limit") else ""
    return f"""\
# The paper's tables, run again

`eos-search reproduce` on {Path(model).name}, search config `{config}`, at commit {commit_line(source)}
on {machine_line(source)}.{limit}

Budgets are what is left of an image in the end, but for counts that SparseVLM publishes: compare rows with a look at
their layer average, at the end of this page. MME is the sum of perception and cognition; the average takes it as a
share of 2800.

"""
