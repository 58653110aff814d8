"""Which ``vllm`` is started: that of the interpreter's environment, else that of PATH."""

import sys
from pathlib import Path

import pytest

from eos_vllm.cli.server_process import ServerError, vllm_command


def script(folder: Path) -> Path:
    folder.mkdir()
    file = folder / "vllm"
    file.write_text("#!/bin/sh\n", encoding="utf-8")
    file.chmod(0o755)
    return file


def test_beside_the_interpreter_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, own = script(tmp_path / "path"), script(tmp_path / "own")
    monkeypatch.setenv("PATH", str(other.parent))
    monkeypatch.setattr(sys, "executable", str(own.with_name("python3")))
    assert vllm_command("serve", "model") == [str(own), "serve", "model"]
    own.unlink()
    assert vllm_command("serve") == [str(other), "serve"]
    other.unlink()
    with pytest.raises(ServerError, match="no command vllm beside"):
        vllm_command("serve")
