"""What ``vllm serve`` makes of flags, without a server."""

from pathlib import Path
from typing import Any

import pytest

BASE = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--kv-cache-memory-bytes", str(64 << 20)]


def configure(model: Path, flags: list[str]) -> Any:
    """What ``vllm serve model flags`` does up to the engine's configuration."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    args = parser.parse_args(["--model", str(model), *BASE, *flags])
    return AsyncEngineArgs.from_cli_args(args).create_engine_config()


def refused(model: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which the flags are refused."""
    with pytest.raises(SystemExit) as error:
        configure(model, flags)
    assert error.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("eos-vllm: error:")]
    assert len(lines) == 1
    return lines[0]
