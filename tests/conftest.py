"""Shared by all tests: the small model, images, and engines that run in the test's own process."""

import os

# In-process engines start in seconds and can be looked into; the server tests start real processes all the same.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The models are small: a second thread gains nothing, and its barriers cost much where cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
from hypothesis import settings

from support.runner_v2 import allow_asynchronous_scheduling, is_wanted

# No timing in tests: a deadline fails on a busy machine.
settings.register_profile("eos", deadline=None)
settings.load_profile("eos")

if is_wanted():
    allow_asynchronous_scheduling()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaVA with random weights: 8 decoder layers, grouped-query attention, 576 visual tokens."""
    from eos_vllm.models.tiny import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
