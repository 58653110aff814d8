"""The small model of the search's tests: 6 decoder layers and 36 visual tokens, loaded once."""

import copy
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from search_cases import LAYERS, VISUAL, make_example, make_row, make_rules

from eos_search.examples import Prepared


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


@pytest.fixture
def exact(small: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Prepared]:
    """The model and an example in float64, with nothing on the way rounded to float32."""
    model = copy.deepcopy(small[0]).double()
    example = make_example(small, make_row(4), make_rules())
    example = replace(example, embeddings=example.embeddings.double(), weights=example.weights.double())

    def norm(module: Any, hidden: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(hidden.square().mean(dim=-1, keepdim=True) + module.variance_epsilon)
        return module.weight * hidden * scale

    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = functools.partial(norm, module)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    return model, example
