"""The V2 model runner with asynchronous scheduling, vLLM's default on GPUs: the parity, proof and load tests under it.

On a CPU its kernels run in Triton's interpreter, so these are few and short; they run in processes of their own, for
in others Triton must stay unavailable.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eos_vllm.models.tiny import write_tiny_model
from support.alone import answers_alone, asks_of, assert_same, assert_same_traces, traces_of
from support.engines import answer_all, engine
from support.profiles import make_profile
from support.runner_v2 import environment, is_wanted

pytestmark = pytest.mark.skipif(is_wanted(), reason="this is the test that runs the others so")
PROFILE = make_profile(
    schema="eos-profile/2", operator_values={"gamma": 0.3, "tau": 0.4, "theta": 0.1, "rho": 0.6, "nu": 0.35}
)
TESTS = Path(__file__).parents[1]


def test_answers_are_those_of_v1(tiny_model: Path, tmp_path: Path) -> None:
    asks = 9, 10
    run = answers_alone(tmp_path, tiny_model, PROFILE, asks, environment(), page=True)
    assert run.reports[0]["runner"].endswith("cpu.model_runner.CPUModelRunner")
    assert run.reports[0]["asynchronous"]
    with engine(tiny_model, PROFILE, page=True) as llm:
        assert_same_traces(run.facts["traces"], traces_of(llm))
        assert_same(run.answers, answer_all(llm, asks_of(*asks)))


def test_pipeline_parallel(tmp_path: Path) -> None:
    """Only the first stage has an encoder cache; both rehearse."""
    model = write_tiny_model(tmp_path / "even", vision_attention_heads=4)
    variables = environment() | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    settings: dict[str, Any] = {"pipeline_parallel_size": 2, "max_num_batched_tokens": 2048, "page": True}
    run = answers_alone(tmp_path, model, PROFILE, (5, 8), variables, **settings)
    assert [report["rehearsal"].split(":")[0] for report in run.reports] == ["passed"] * 2
    with engine(model, PROFILE, page=True) as llm:
        assert_same_traces(run.facts["traces"], traces_of(llm))
        assert_same(run.answers, answer_all(llm, asks_of(5, 8)))


@pytest.mark.parametrize(
    "chosen",
    [
        ["parity/test_parity.py", "-k", "preempted or ends_in_an_image or schedule"],
        ["parity/test_before_the_decoder.py", "-k", "topk-withdrawn"],
        ["parity/test_chats.py", "-k", "turn-relevant and (three_turns or other_questions or chunks)"],
        ["parity/test_many_requests.py", "-k", "empty"],
        ["serving/test_steps.py", "serving/test_proof.py", "serving/test_rehearsal.py", "-k", "not slots and not left"],
    ],
    ids=["parity", "before", "chats", "many", "proofs"],
)
def test_passes_under_v2(chosen: list[str], tmp_path: Path) -> None:
    command: list[Any] = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen]
    variables = {**os.environ, **environment()}
    done = subprocess.run(command, cwd=TESTS, env=variables, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout
