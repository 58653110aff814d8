"""Runs of the command line for tests."""

import pytest

from eos_vllm.cli.main import main

V2 = "sparsevlm-v2-llava-1.5-7b"


def output(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> str:
    """Standard output of a run that must end in ``code`` and say nothing on stderr."""
    assert main(argv) == code
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr of a run that must be refused."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("eos-vllm: error: ")
    assert captured.err.count("\n") == 1
    return captured.err
