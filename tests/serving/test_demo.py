"""``make demo`` works: a real server, real requests, and figures that hold (issue 2, item 7)."""

import pytest

from eos_vllm.cli.main import main

pytestmark = pytest.mark.serving


def test_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "all 12 requests answered, all budgets held" in out
    assert "eos: profile 'embedded-eos' reduces after layers" in out
