"""The reducing pass: an explicit walk over a model's decoder layers where images are prefilled.

What belongs to a family of models is in :mod:`eos_vllm.serving.hosts`, whose classes call this one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.sequence import IntermediateTensors

from eos_vllm.core.importance import ScoreOptions
from eos_vllm.core.layout import ReducerStep
from eos_vllm.core.plan import Planner
from eos_vllm.core.reduction import image_query_weights, reduce_tokens
from eos_vllm.serving.attention import convert
from eos_vllm.serving.batch import BatchState
from eos_vllm.serving.cached_keys import read_keys
from eos_vllm.serving.clock import ReductionClock
from eos_vllm.serving.lora_rows import LoraRows
from eos_vllm.serving.metrics import Counters, WorkerLog
from eos_vllm.serving.preselection import mean_over_ranks
from eos_vllm.serving.stages import EMBEDDINGS, ORIGIN, pack
from eos_vllm.serving.stretches import Stretch, compiles, stretches
from eos_vllm.serving.trace import Recorder


class Reduction:
    """What a profile adds to a model: converted attention layers, the batch at hand, and the reducing forward pass.

    With pipeline stages it is that of the stage's own layers.
    """

    def __init__(
        self, planner: Planner, decoder: Any, vllm_config: VllmConfig, counters: Counters, added_to: int = 0
    ) -> None:
        """Converts the decoder's attention layers.

        Args:
            planner: the server's.
            decoder: vLLM's module with ``layers`` and ``norm``.
            vllm_config: the engine's.
            counters: of this worker.
            added_to: to the output of this many first layers something is added (deepstack).
        """
        self.planner = planner
        self.profile = planner.profile
        self.decoder = decoder
        self.device = torch.device(vllm_config.device_config.device_type)
        self.batch = BatchState(self.profile, vllm_config.scheduler_config.max_num_seqs, self.device)
        self.stages = get_pp_group().world_size
        self.is_last_stage = get_pp_group().is_last_rank
        self.sends_embeddings = self.profile.importance.queries == "relevant_text"
        self.layers = range(decoder.start_layer, decoder.end_layer)
        self.attention = {i: attention_of(decoder.layers[i]) for i in self.layers}
        for index, layer in self.attention.items():
            convert(layer, self.profile.segment_of_layer(index), self.batch)
        self.reducer_after = {layer: i for i, layer in enumerate(self.profile.layers)}
        # Of what the encoder cache holds of a token: beside its own features those that later layers add.
        self.row_width = (1 + added_to) * vllm_config.model_config.hf_text_config.hidden_size
        alone = {*self.profile.layers, *range(added_to)}
        self.parts = list(stretches(decoder.layers, self.layers, alone, compiles(vllm_config)))
        self.mrope = bool(vllm_config.model_config.uses_mrope)
        ranks = get_tensor_model_parallel_world_size()
        self.options = ScoreOptions.of(
            self.profile.importance,
            vllm_config.model_config.hf_text_config.num_attention_heads,
            self.device,
            get_tensor_model_parallel_rank(),
            mean_over_ranks if ranks > 1 else None,
            ranks,
        )
        self.counters, self.planned = counters, Counters(len(self.profile.reducers))
        self.clock = ReductionClock(self.device)
        self.recorder: Recorder | None = None  # of traces, where the server has any
        self.rehearsal = "not run"
        self.log = WorkerLog(tuple(reducer.layer for reducer in self.profile.reducers))
        self.first = len(self.profile.reducers) - len(self.profile.inside)

    def is_needed(self) -> bool:
        """Whether this step prefills an image that is reduced; never in vLLM's dummy runs."""
        return self.batch.prefills_images and get_forward_context().attn_metadata is not None

    def forward(
        self,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None,
        received: IntermediateTensors | None = None,
        added: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor | IntermediateTensors:
        """Runs the stage's decoder layers, with a reducer after each active one.

        Args:
            positions: rotary positions ``[padded tokens]``, ``[3, padded tokens]`` with M-RoPE.
            inputs_embeds: ``[padded tokens, d]``; None behind the first stage.
            received: of the stage before (:mod:`eos_vllm.serving.stages`).
            added: to the output of the first layers, before it is reduced ``[padded tokens, d]`` each (deepstack).

        Returns:
            Final hidden states in the rows of the unreduced batch ``[padded tokens, d]``, zero where discarded; before
            the last stage what it passes on.
        """
        profile, layout, padded = self.profile, self.batch.layout, positions.shape[-1]
        assert layout is not None
        tokens = sum(entry.num_tokens for entry in self.batch.entries)
        origin: torch.Tensor | None = None
        residual: torch.Tensor | None = None
        if received is None:
            assert inputs_embeds is not None
            hidden = embeddings = inputs_embeds[:tokens]
            positions = positions[..., :tokens]
        else:
            left = int(layout.segment_lengths[profile.segment_of_layer(self.layers.start)].sum())
            hidden, residual, origin = (received[name][:left] for name in ("hidden_states", "residual", ORIGIN))
            embeddings = received[EMBEDDINGS][:tokens] if self.sends_embeddings else hidden
            positions = positions.index_select(-1, origin)
        image_text = layout.image_text
        if image_text is not None and origin is not None:
            image_text = image_text.index_select(0, origin)
        weights = image_query_weights(profile.importance.queries, embeddings, layout)
        adapters = LoraRows.of(self.decoder, tokens)
        if adapters is not None and origin is not None:
            adapters.follow(origin)
        for part in self.parts:
            if isinstance(part, Stretch):
                hidden, residual = part(positions, hidden, residual)
                continue
            reducer = self.reducer_after.get(part)
            with queries_and_keys(None if reducer is None else self.attention[part]) as seen:
                hidden, residual = self.decoder.layers[part](positions, hidden, residual)
            if part < len(added):
                rows = added[part][:tokens]
                hidden = hidden + (rows if origin is None else rows.index_select(0, origin))
            if reducer is None:
                continue
            step = layout.steps[reducer]
            hidden, source = self._reduce(part, reducer, hidden + residual, seen, step, weights, positions, image_text)
            residual = None
            positions = positions.index_select(-1, source)
            if image_text is not None:
                image_text = image_text.index_select(0, source)
            origin = source if origin is None else origin.index_select(0, source)
            if adapters is not None:
                adapters.follow(source)
        if adapters is not None:
            adapters.restore()
        self.batch.reduction_ran()
        if not self.is_last_stage:
            return pack(hidden, residual, origin, embeddings if self.sends_embeddings else None, padded)
        hidden, _ = self.decoder.norm(hidden, residual)
        self.counters.images += layout.num_images
        self.log.maybe(self.counters)
        assert origin is not None
        return hidden.new_zeros(padded, hidden.shape[1]).index_copy_(0, origin, hidden)

    def _reduce(
        self,
        index: int,
        reducer: int,
        before: torch.Tensor,
        seen: dict[str, torch.Tensor],
        step: ReducerStep,
        weights: torch.Tensor | None,
        positions: torch.Tensor,
        image_text: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        key, attention = seen["key"], self.attention[index]
        if step.cached:
            table = self.batch.block_tables[attention.layer_name]
            key = torch.cat([key, *read_keys(attention, table, step.cached)])
        params, scale = self.profile.operator_params(reducer), attention.impl.scale
        observe = None
        if self.recorder is not None and self.recorder.images:
            observe = partial(self.recorder.reduced, reducer, params, before)
        with self.clock.measure():
            hidden, source = reduce_tokens(
                *(before, seen["query"], key, step, weights, params, scale, self.options, positions),
                image_text=image_text,
                observe=observe,
            )
        # What went in is the plan's; what is gone is counted on the tensors, so that the count proves something.
        self.counters.count_tokens(self.first + reducer, step.tokens_in, step.tokens_in - len(before) + len(hidden))
        return hidden, source


def attention_of(layer: nn.Module) -> Attention:
    """The one attention of a decoder layer.

    Raises:
        RuntimeError: there is none, or more than one.
    """
    found = [module for module in layer.modules() if isinstance(module, Attention)]
    if len(found) != 1:
        raise RuntimeError(f"decoder layer {type(layer).__name__} has {len(found)} attentions; reduction needs one")
    return found[0]


@contextmanager
def queries_and_keys(attention: Attention | None) -> Iterator[dict[str, torch.Tensor]]:
    """Catches the rotated queries and keys, ``[tokens, heads, D]``, that go into ``attention`` within the block."""
    seen: dict[str, torch.Tensor] = {}
    if attention is None:
        yield seen
        return

    def catch(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen["query"] = inputs[0].view(-1, attention.num_heads, attention.head_size)
        seen["key"] = inputs[1].view(-1, attention.num_kv_heads, attention.head_size)

    handle = attention.register_forward_pre_hook(catch)
    try:
        yield seen
    finally:
        handle.remove()
