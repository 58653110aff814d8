"""Rehearsal: before the first request, one made-up step with images goes through the real path, and is checked.

The reducing pass is none of vLLM's dummy runs. Without a rehearsal it would be missing from the memory profile, the
first image would pay for what is compiled at first use, and a contract that vLLM no longer keeps would be found out by
the first user with an image, or never.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed import get_pp_group
from vllm.forward_context import set_forward_context
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.sequence import IntermediateTensors
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

from eos_vllm.core.plan import ImageSpan, RequestPlan
from eos_vllm.serving.batch import StepEntry
from eos_vllm.serving.clock import ReductionClock
from eos_vllm.serving.kv_cache import planned_blocks, segments_of_groups
from eos_vllm.serving.metrics import Counters

_IMAGE = "eos-rehearsal"
_BEFORE, _BEHIND = 1, 8  # text tokens around an image


@dataclass(frozen=True)
class MadeUp:
    """One request of a rehearsal.

    Attributes:
        name: of the request.
        prompt: its tokens.
        plan: what is kept of its one image.
        blocks: its blocks by KV group; empty where none are needed.
    """

    name: str
    prompt: list[int]
    plan: RequestPlan
    blocks: tuple[list[int], ...] = field(default=())

    @property
    def tokens(self) -> int:
        return len(self.prompt)


def largest_step(planner: Any, tokens: int, requests: int, longest: int) -> list[MadeUp]:
    """Requests of one image each that fill a step, the last one with text to the step's end.

    Args:
        planner: the server's.
        tokens: that a step can hold.
        requests: that a step can hold.
        longest: tokens of a request at most.

    Returns:
        None of them where no image fits.
    """
    visual = planner.image_tokens()
    each = min(_BEFORE + visual + _BEHIND, tokens, longest)
    if each <= visual:
        return []
    count = min(requests, tokens // each)
    last = min(longest, tokens - (count - 1) * each)
    made = []
    for i, length in enumerate([*[each] * (count - 1), last]):
        span = ImageSpan(min(_BEFORE, length - visual - 1), visual)
        prompt = planner.trial_prompt(length, span)
        made.append(MadeUp(f"{_IMAGE}-{i}", prompt, planner.plan(prompt, [span])))
    return made


def rehearse_memory(runner: Any, reduction: Any) -> None:
    """Runs the reducing pass of the largest step without a KV cache, within vLLM's memory profile."""
    scheduler = runner.scheduler_config
    made = largest_step(reduction.planner, runner.max_num_tokens, scheduler.max_num_seqs, runner.max_model_len)
    if not any(request.plan.reduces for request in made):
        return
    batch, width = reduction.batch, runner.model_config.get_hidden_size()
    tokens, like = sum(request.tokens for request in made), {"dtype": runner.dtype, "device": runner.device}
    batch.take_images([StepEntry(r.name, r.plan, 0, r.tokens) for r in made])
    with (
        _counted_apart(reduction),
        torch.inference_mode(),
        set_forward_context(None, runner.vllm_config, num_tokens=tokens),
    ):
        embeds = received = None
        if reduction.layers.start:  # what the stage before would send
            received = runner.get_model().make_empty_intermediate_tensors(tokens, **like)
        else:
            embeds = torch.zeros(tokens, width, **like)
        positions = torch.arange(tokens, device=runner.device)
        reduction.forward(positions.expand(3, -1) if reduction.mrope else positions, embeds, received)
    batch.take_images([])


def rehearse(runner: Any, reduction: Any, encoder_outputs: dict[str, torch.Tensor]) -> None:
    """Prefills made-up images through the runner as requests would be, and checks what came of it.

    Args:
        runner: the worker's model runner, its KV cache made.
        reduction: of its model.
        encoder_outputs: where the runner finds an image's embeddings, by identifier.

    Raises:
        RuntimeError: tokens, lengths, slots or KV blocks are not as planned; vLLM then ends the worker and the server.
    """
    made = _with_blocks(
        largest_step(
            reduction.planner, runner.max_num_tokens, runner.scheduler_config.max_num_seqs, runner.max_model_len
        ),
        runner.kv_cache_config,
    )
    if not any(request.plan.reduces for request in made):
        reduction.rehearsal = "left out: the server's own budget reduces no image that fits a step"
        return
    visual = reduction.planner.image_tokens()
    # As if the vision tower had run: vLLM profiles that itself.
    encoder_outputs[_IMAGE] = torch.zeros(visual, reduction.row_width, dtype=runner.dtype, device=runner.device)
    step = SchedulerOutput.make_empty()
    step.scheduled_new_reqs = [_request(request) for request in made]
    step.num_scheduled_tokens = {request.name: request.tokens for request in made}
    step.total_num_scheduled_tokens = sum(request.tokens for request in made)
    step.num_common_prefix_blocks = [0] * len(runner.kv_cache_config.kv_cache_groups)
    with _counted_apart(reduction):
        _stage(runner, step)
        _check(runner, reduction, made)
        runner.sample_tokens(None)
    encoder_outputs.pop(_IMAGE)
    done = SchedulerOutput.make_empty()
    done.finished_req_ids = {request.name for request in made}
    runner.execute_model(done)
    reduction.rehearsal = f"passed: {len(made)} images in a step of {step.total_num_scheduled_tokens} tokens"


def _stage(runner: Any, step: SchedulerOutput) -> None:
    """Runs a step, between the stages in front of this one and behind it: all of them rehearse at the same time."""
    stages = get_pp_group()
    received = None
    if not stages.is_first_rank:
        tensors = stages.recv_tensor_dict()
        assert tensors is not None
        received = IntermediateTensors(tensors)
    sent = runner.execute_model(step, received)
    if isinstance(sent, IntermediateTensors):
        stages.send_tensor_dict(sent.tensors)


@contextmanager
def _counted_apart(reduction: Any) -> Iterator[None]:
    """Within the block the worker counts, and takes the time, for the rehearsal alone."""
    counters, clock = reduction.counters, reduction.clock
    reduction.counters, reduction.clock = Counters(len(reduction.profile.reducers)), ReductionClock(reduction.device)
    try:
        yield
    finally:
        reduction.counters, reduction.clock = counters, clock


def _with_blocks(made: list[MadeUp], kv_cache_config: Any) -> list[MadeUp]:
    """As many of the requests as have room in the KV cache, with blocks of their own."""
    found, next_block = [], 1  # block 0 is vLLM's null block
    for request in made:
        counts = planned_blocks(kv_cache_config, request.plan, request.tokens)
        if next_block + sum(counts) > kv_cache_config.num_blocks:
            break
        blocks = []
        for count in counts:
            blocks.append(list(range(next_block, next_block + count)))
            next_block += count
        found.append(MadeUp(request.name, request.prompt, request.plan, tuple(blocks)))
    return found


def _request(made: MadeUp) -> NewRequestData:
    (span,) = made.plan.spans
    image = MultiModalFeatureSpec(None, "image", _IMAGE, PlaceholderRange(span.start, span.length))
    return NewRequestData(
        req_id=made.name,
        prompt_token_ids=made.prompt,
        mm_features=[image],
        sampling_params=SamplingParams(temperature=0, max_tokens=1),
        pooling_params=None,
        block_ids=made.blocks,
        num_computed_tokens=0,
        lora_request=None,
        prefill_token_ids=made.prompt,
    )


def _check(runner: Any, reduction: Any, made: list[MadeUp]) -> None:
    counters, plans = reduction.counters, [r.plan for r in made]
    done = counters.images, counters.tokens_in[reduction.first :], counters.tokens_kept[reduction.first :]
    # A stage counts for its own reducers, the last one counts the images.
    own = [layer in reduction.layers for layer in reduction.profile.layers]
    kept = [sum(p.kept[0][i] - len(p.spans[0].text) for p in plans) for i in range(len(own) + 1)]
    before, after = ([n * here for n, here in zip(counts, own, strict=True)] for counts in (kept[:-1], kept[1:]))
    if done != (len(made) * reduction.is_last_stage, before, after):
        raise RuntimeError(f"eos: rehearsal: {kept} visual tokens were planned, the reducers did {counters.to_dict()}")
    config = runner.kv_cache_config
    for group, segment in enumerate(segments_of_groups(config)):
        if not config.kv_cache_groups[group].layer_names:
            continue  # its layers are another stage's
        lengths = [r.plan.segment_length(segment, r.tokens) for r in made]
        if (built := reduction.batch.geometry_of(segment).num_tokens) != sum(lengths):
            raise RuntimeError(f"eos: rehearsal: segment {segment} attends to {built} tokens, planned {sum(lengths)}")
        size = config.kv_cache_groups[group].kv_cache_spec.block_size
        want = [
            r.blocks[group][place // size] * size + place % size
            for r, length in zip(made, lengths, strict=True)
            for place in range(length)
        ]
        for attention_group in runner.attn_groups[group]:
            slots = attention_group.get_metadata_builder().eos_slots[: len(want)].tolist()
            if slots != want:
                wrong = next(i for i, pair in enumerate(zip(slots, want, strict=True)) if pair[0] != pair[1])
                problem = f"KV group {group} writes token {wrong} to slot {slots[wrong]}, planned {want[wrong]}"
                raise RuntimeError(f"eos: rehearsal: {problem}")
        for name in config.kv_cache_groups[group].layer_names:
            cache = runner.vllm_config.compilation_config.static_forward_context[name].kv_cache
            last = [r.blocks[group][-1] for r in made if r.blocks[group]]
            if not bool(cache[last].view(torch.uint8).flatten(1).any(dim=1).all()):
                raise RuntimeError(f"eos: rehearsal: layer {name} left the last block of a request empty")
