"""Each line of the contract: broken, it is named and the start refused; whole, nothing is said."""

import dataclasses
import importlib
import inspect
from typing import Any

import pytest

from eos_vllm.serving.contract import RELIANCES, Fields, Has, Overrides, Reliance, Takes, check_contract, find

LINES = [(process, line) for process, lines in RELIANCES.items() for line in lines]


def replaced(where: str, value: Any, patch: pytest.MonkeyPatch) -> None:
    """Puts ``value`` at ``module:name.name``."""
    module, _, path = where.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for step in owners:
        owner = getattr(owner, step)
    patch.setattr(owner, name, value)


def with_one_more(self: Any, surprise: Any) -> None:
    """A method that takes something new."""


def broken(line: Reliance, patch: pytest.MonkeyPatch) -> str:
    """Breaks what a line relies on as another version of vLLM might; what the refusal must name."""
    if isinstance(line, Takes):
        if not line.parameters:
            replaced(line.where, None, patch)
            return f"{line.where} is gone"
        replaced(line.where, lambda: None, patch)
        return f"{line.where} has no parameter {line.parameters[-1]!r}"
    if isinstance(line, Has):
        owner = find(line.where)
        if not line.where.partition(":")[2]:
            patch.delattr(owner, line.names[-1])
        else:
            replaced(line.where, type("Emptied", (), {}), patch)
        return f"{line.where} has no {line.names[-1]!r}"
    if isinstance(line, Overrides):
        name = next(name for name, _, ours in line.methods() if "kwargs" not in inspect.signature(ours).parameters)
        replaced(f"{line.where}.{name}", with_one_more, patch)
        return f"{line.where}.{name} has an unknown parameter 'surprise'"
    replaced(line.where, dataclasses.make_dataclass("Grown", [*line.names, "surprise"]), patch)
    return f"{line.where} has an unknown field 'surprise'"


@pytest.mark.parametrize("process", RELIANCES)
def test_the_installed_vllm_keeps_it(process: Any) -> None:
    check_contract(process)


@pytest.mark.parametrize(("process", "line"), LINES, ids=[line.where.split(":")[-1] for _, line in LINES])
def test_a_broken_line_is_named(process: Any, line: Reliance, monkeypatch: pytest.MonkeyPatch) -> None:
    named = broken(line, monkeypatch)
    with pytest.raises(RuntimeError, match="install a version of vLLM") as error:
        check_contract(process)
    assert named in str(error.value)


def test_what_is_gone_altogether() -> None:
    for line in (
        Takes("vllm.nowhere:f", ("a",)),
        Has("vllm.config:Nothing", ("a",)),
        Fields("vllm.config:Nothing", ()),
    ):
        assert len(list(line.problems())) == 1
    problems = list(Fields("vllm.v1.metrics.stats:SchedulerStats", ("current_wave", "lost")).problems())
    assert problems[0].endswith("has no field 'lost'")
