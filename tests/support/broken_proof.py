"""A plugin of the tests: lets a worker be broken and mended by ``collective_rpc``, as a mistake of another might do."""

import os
from pathlib import Path
from typing import Any


def install(folder: Path) -> dict[str, str]:
    """Makes vLLM find :func:`register` as a general plugin; the variables that a server needs for it."""
    info = folder / "broken_proof-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-proof\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nbroken_proof = support.broken_proof:register\n")
    paths = [str(Path(__file__).parents[1]), str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), "VLLM_SERVER_DEV_MODE": "1"}


def register() -> None:
    """Gives workers :func:`eos_break` and :func:`eos_mend`."""
    from eos_vllm.serving.worker import EosWorkerExtension

    EosWorkerExtension.eos_break = eos_break  # type: ignore[attr-defined]
    EosWorkerExtension.eos_mend = eos_mend  # type: ignore[attr-defined]


def eos_break(worker: Any, what: str) -> None:
    """Breaks ``attention`` (one layer writes and attends as vLLM's own) or ``reduction`` (nothing is removed)."""
    reduction = worker.model_runner.get_model().eos
    if what == "attention":
        implementation = reduction.attention[4].impl
        implementation.eos_was = type(implementation)
        implementation.__class__ = type(implementation).__mro__[1]
    else:
        import torch

        from eos_vllm.serving import model

        model.reduce_tokens = lambda hidden, *_, **__: (hidden, torch.arange(len(hidden)))


def eos_mend(worker: Any) -> None:
    """Undoes the break of ``attention``."""
    implementation = worker.model_runner.get_model().eos.attention[4].impl
    implementation.__class__ = implementation.eos_was
