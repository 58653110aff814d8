"""What vLLM's model classes gain: the reducing pass, and selection before the decoder."""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.sequence import IntermediateTensors
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from eos_vllm.serving.contract import check_contract
from eos_vllm.serving.hosts import host_of
from eos_vllm.serving.metrics import Counters
from eos_vllm.serving.model import Reduction
from eos_vllm.serving.options import has_page, planner_of
from eos_vllm.serving.preselection import Preselection
from eos_vllm.serving.row_selection import RowSelection
from eos_vllm.serving.runner_v1 import hook_v1_runner
from eos_vllm.serving.stages import extend_intermediate_tensors, fill
from eos_vllm.serving.trace import Recorder, follow_traces


class EosHostMixin:
    """In front of vLLM's class of the same architecture (``model_class_overrides``).

    Text-only batches and decode steps take vLLM's forward pass, compiled and replayed as ever; without a profile all
    do. What a family does otherwise it says by overriding the methods named ``eos_...``.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        planner = planner_of(vllm_config)
        self.eos: Reduction | None = None
        self.eos_before: Preselection | RowSelection | None = None
        self.eos_recorder: Recorder | None = None
        if planner is None:
            return
        check_contract("worker", host_of(vllm_config.model_config).reliances)
        counters = Counters(len(planner.profile.reducers))
        if planner.profile.before is not None and self.eos_takes_images():
            self.eos_before = self.eos_selection(planner, vllm_config, counters)
        hook_v1_runner()
        if planner.profile.inside:
            decoder = self.language_model.model  # type: ignore[attr-defined]
            self.eos = Reduction(planner, decoder, vllm_config, counters, self.eos_layers_added_to())
            self.eos.row_width += self.eos_channels if self.eos_before is not None else 0
            if self.eos.stages > 1:
                extend_intermediate_tensors(self, self.eos.sends_embeddings)
        if has_page(vllm_config):
            self.eos_record_traces()

    def eos_record_traces(self) -> None:
        """Makes a recorder, and gives it to all that chooses."""
        recorder = self.eos_recorder = Recorder(stores=get_tensor_model_parallel_rank() == 0)
        if self.eos_before is not None:
            self.eos_before.recorder = recorder
        if self.eos is not None:
            self.eos.recorder = self.eos.batch.recorder = recorder
        follow_traces(GPUModelRunner)

    # What a family may do otherwise.

    # Numbers behind the features of a selected row that say where it stands (:meth:`eos_places`).
    eos_channels = 0

    def eos_takes_images(self) -> bool:
        """Whether this process has a vision tower."""
        return True

    def eos_selection(self, planner: Any, vllm_config: VllmConfig, counters: Counters) -> Preselection | RowSelection:
        """What selects before the decoder."""
        return RowSelection(planner, self, vllm_config, counters)

    def eos_layers_added_to(self) -> int:
        """To the output of this many first decoder layers the vision tower adds features (deepstack)."""
        return 0

    def eos_take_added(self, tokens: int) -> Sequence[torch.Tensor]:
        """What it adds in this step, ``[tokens, d]`` for each of those layers."""
        return ()

    def eos_places(self, kwargs: dict[str, Any]) -> list[torch.Tensor] | None:
        """Where the rows of each image of ``embed_multimodal``'s arguments stand, ``[N, channels]`` each.

        None where positions say all there is. Selected rows carry these channels behind their features.
        """
        return None

    def eos_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """The step's positions, where a selection decides on some."""
        return positions

    def eos_images(self, kwargs: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
        """The part of ``embed_multimodal``'s arguments that belongs to images ``start`` to ``stop - 1``.

        As it is, for processors whose fields all hold one entry per image.
        """
        return {name: value[start:stop] for name, value in kwargs.items()}

    # vLLM's interface.

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """As vLLM's; with a reducer before the decoder an image has as many rows as its prompt has placeholders."""
        embed = super().embed_multimodal  # type: ignore[misc]
        return embed(**kwargs) if self.eos_before is None else self.eos_before.embed(kwargs, embed)

    def load_weights(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's; what other weights chose of an image is forgotten."""
        if self.eos_before is not None:
            self.eos_before.choices.clear()
        return super().load_weights(*args, **kwargs)  # type: ignore[misc]

    @staticmethod
    def get_model_state_cls() -> type:
        """The V2 runner's hook; imported late, for it needs Triton."""
        from eos_vllm.serving.runner_v2 import EosModelState

        return EosModelState

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | IntermediateTensors:
        """As vLLM's; hidden states of discarded tokens are zero, and no one reads them."""
        positions = self.eos_positions(positions)
        if self.eos is None or not self.eos.is_needed():
            out = super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)  # type: ignore
            if self.eos is not None and isinstance(out, IntermediateTensors):
                return fill(out, self.eos.sends_embeddings)
            return out
        if intermediate_tensors is not None:
            return self.eos.forward(positions, None, intermediate_tensors)
        if inputs_embeds is None:
            raise RuntimeError("a step that prefills images came without inputs_embeds")
        return self.eos.forward(positions, inputs_embeds, None, self.eos_take_added(len(inputs_embeds)))
