"""How decoder layers are cut between reducers; what a stretch computes does not depend on its being compiled."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

stretches_module = pytest.importorskip("eos_vllm.serving.stretches")
Stretch, stretches, compiles = stretches_module.Stretch, stretches_module.stretches, stretches_module.compiles


class Layer(torch.nn.Module):
    """A decoder layer in vLLM's form: hidden states and residual in, both out."""

    def __init__(self, size: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(size, size, generator=generator) / size**0.5)

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None) -> Any:
        residual = hidden if residual is None else hidden + residual
        return torch.tanh(residual @ self.weight + positions.unsqueeze(1) / 100), residual


@given(st.integers(1, 12), st.data())
def test_every_layer_runs_once_and_in_order(count: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, count - 1))
    last = data.draw(st.integers(first + 1, count))
    reducing = sorted(data.draw(st.sets(st.integers(0, count - 1))))
    layers = list(range(count))
    ran: list[int] = []
    for part in stretches(layers, range(first, last), reducing, compiled=False):
        if isinstance(part, Stretch):
            assert not set(part.layers) & set(reducing)
            ran += part.layers
        else:
            assert part in reducing
            ran.append(part)
    assert ran == layers[first:last]


def test_compiled_as_eager_for_any_number_of_tokens() -> None:
    layers = [Layer(8, seed) for seed in range(3)]
    eager, compiled = Stretch(layers, compiled=False), Stretch(layers, compiled=True)
    with torch.no_grad():
        for tokens in (2, 7, 64, 3):
            positions, hidden = torch.arange(tokens), torch.randn(tokens, 8)
            for ours, theirs in zip(compiled(positions, hidden, None), eager(positions, hidden, None), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "backend", "lora", "expected"),
    [
        ("VLLM_COMPILE", "", None, True),
        ("DYNAMO_TRACE_ONCE", "inductor", None, True),
        ("NONE", "inductor", None, False),
        ("VLLM_COMPILE", "eager", None, False),
        ("VLLM_COMPILE", "inductor", object(), False),
    ],
)
def test_compiled_where_vllm_compiles_and_no_adapters_are_served(
    mode: str, backend: str, lora: object, expected: bool
) -> None:
    from vllm.config import CompilationMode

    compilation = SimpleNamespace(mode=CompilationMode[mode], backend=backend)
    assert compiles(SimpleNamespace(compilation_config=compilation, lora_config=lora)) is expected
