"""The small model of the search's tests: 6 decoder layers and 36 visual tokens, loaded once."""

from pathlib import Path
from typing import Any

import pytest
from search_cases import LAYERS, VISUAL


@pytest.fixture(scope="session")
def small_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small LLaVA of random weights."""
    from eos_vllm.models.tiny import write_tiny_model

    directory = tmp_path_factory.mktemp("models") / "small"
    return write_tiny_model(directory, num_decoder_layers=LAYERS, image_size=4 * int(VISUAL**0.5))


@pytest.fixture(scope="session")
def small(small_path: Path) -> tuple[Any, Any]:
    """The model and its processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return AutoModelForImageTextToText.from_pretrained(small_path), AutoProcessor.from_pretrained(small_path)
