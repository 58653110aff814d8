"""``make demo`` works: a real server, real requests, and figures that hold."""

import re

import pytest

from eos_vllm.cli.main import main

pytestmark = pytest.mark.serving


def test_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "all 30 requests answered, all budgets held" in out
    assert re.search(r"^stock \(576\) +(9|10) of 10 right$", out, re.MULTILINE)
    assert re.search(r"answer +truth$", out, re.MULTILINE)
    assert "eos: profile 'embedded-searched' reduces after layers" in out
