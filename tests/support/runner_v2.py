"""vLLM's V2 model runner with asynchronous scheduling on a CPU: the environment, and the one line in the way."""

import os
from pathlib import Path

VARIABLE = "EOS_TEST_RUNNER_V2"
_TESTS = Path(__file__).parents[1]


def environment() -> dict[str, str]:
    """Variables of a process whose engines run so."""
    return {
        VARIABLE: "1",
        "PYTHONPATH": os.pathsep.join(map(str, (_TESTS, Path(__file__).parent / "triton_cpu"))),
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
    }


def is_wanted() -> bool:
    """Whether this process is one of them."""
    return os.environ.get(VARIABLE) == "1"


def allow_asynchronous_scheduling() -> None:
    """vLLM's CPU platform switches it off as not required; the V2 runner has it, and so have GPUs by default."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def keeping(cls: type, vllm_config: object) -> None:
        check(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True  # type: ignore[attr-defined]

    CpuPlatform.check_and_update_config = classmethod(keeping)  # type: ignore[assignment,method-assign]
