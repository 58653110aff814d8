"""Decoder layers between two reducers, compiled where vLLM compiles.

vLLM compiles the forward pass of the whole model, which the reducing pass does not take. Where it does, it also leaves
norms, activations and rotary embeddings to the compiler, so that the same layers run eagerly are many small launches.
A reducing layer itself stays eager, for its queries and keys are read.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor | None]]


class Stretch:
    """Neighbouring layers, none of which reduces."""

    def __init__(self, layers: Sequence[Any], compiled: bool) -> None:
        self.layers = list(layers)
        self._run: Run = self._layer_by_layer
        if compiled and self.layers:
            # The number of tokens differs with every step; a graph for each would be compiled for ever.
            self._run = torch.compile(self._layer_by_layer, dynamic=True, fullgraph=True)

    def __call__(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Runs the layers.

        Args:
            positions: rotary positions ``[tokens]``.
            hidden: ``[tokens, d]``.
            residual: ``[tokens, d]``; None behind a reducer.
        """
        return self._run(positions, hidden, residual)

    def _layer_by_layer(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
        return hidden, residual


def stretches(layers: Sequence[Any], indices: range, alone: Collection[int], compiled: bool) -> Iterator[Any]:
    """Stretches and the indices of the layers between them, in order.

    Args:
        layers: all decoder layers.
        indices: those of this pipeline stage.
        alone: layers that are run by themselves: those with a reducer, or to whose output something is added.
        compiled: whether to compile stretches.
    """
    first = indices.start
    for index in indices:
        if index in alone:
            if index > first:
                yield Stretch(layers[first:index], compiled)
            yield index
            first = index + 1
    if first < indices.stop:
        yield Stretch(layers[first : indices.stop], compiled)


def compiles(vllm_config: Any) -> bool:
    """Whether stretches are compiled: where vLLM compiles with Inductor, but for adapters.

    LoRA kernels read the adapter of each row from the wrapper's own state, which changes behind every reducer; a graph
    that took it for constant would multiply by other requests' adapters.
    """
    from vllm.config import CompilationMode

    config = vllm_config.compilation_config
    modes = (CompilationMode.DYNAMO_TRACE_ONCE, CompilationMode.VLLM_COMPILE)
    return vllm_config.lora_config is None and config.mode in modes and config.backend in ("", "inductor")
