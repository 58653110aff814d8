"""What all commands of the load tests share: exit codes, and an end in order."""

import os
import signal
import time

import pytest

from loadtests.commands import command


@pytest.mark.parametrize(("resumable", "words"), [(True, "the same command goes on"), (False, "x: stopped.")])
def test_sigterm_unwinds(resumable: bool, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What was started within ends with it: a soak's servers had stayed."""
    ended = []

    @command("x", resumable)
    def main() -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            ended.append(True)
        return 0

    before = signal.getsignal(signal.SIGTERM)
    assert main() == 130
    assert ended
    assert words in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
