"""Proof while serving: what the scheduler planned against what a worker did, and a second look at its layers.

The scheduler puts the counts of each step that prefills images on board of what it sends to the workers; a worker adds
them up beside its own, which it takes from the tensors. Between two steps both must be the same, to the token: a worker
answers calls between steps only, so nothing is ever under way when they are compared.
"""

import functools
from typing import Any

from eos_vllm.core.profile import Profile
from eos_vllm.serving.attention import SegmentAttention, builds_for_segments
from eos_vllm.serving.metrics import Counters

# Attribute of a scheduler's output: the counts planned for the step, where it prefills images.
PLANNED = "eos_planned"


def follow_plans(runner_class: Any) -> None:
    """Adds up in ``reduction.planned`` what steps announce.

    Symptom without it: a worker knows what it did, and nobody whether that was all. Cause: vLLM's runners have no hook
    for what a plugin's scheduler sends along. Why safe: the step is read, and passed on with the very arguments; other
    steps cost one look. Can go when a scheduler's output carries plugin fields to a hook.
    """
    execute = runner_class.execute_model

    @functools.wraps(execute)
    def followed(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        planned = getattr(scheduler_output, PLANNED, None)
        if planned is not None and (reduction := getattr(self.get_model(), "eos", None)) is not None:
            reduction.planned.join(planned)
        return execute(self, scheduler_output, *args, **kwargs)

    runner_class.execute_model = followed


def layer_problem(layer: Any, segment: int) -> str | None:
    """What keeps an attention layer from caching and attending for its segment; None where nothing does."""
    if not isinstance(layer, SegmentAttention) or layer.eos_segment != segment:
        found = getattr(layer, "eos_segment", "none")
        return f"layer {layer.layer_name} caches for segment {found}, its place is segment {segment}"
    if not builds_for_segments(layer):
        return f"layer {layer.layer_name} attends with metadata of unreduced lengths"
    return None


def count_problem(profile: Profile, layers: range, last_stage: bool, planned: Counters, done: Counters) -> str | None:
    """Where a worker's counts are not those of the scheduler; None where they agree.

    Args:
        profile: the operator profile.
        layers: decoder layers that the worker runs; with pipeline stages it counts only what is reduced after these.
        last_stage: whether it runs the last ones, and so counts images.
        planned: what the scheduler told.
        done: what the worker counted.
    """
    if last_stage and planned.images != done.images:
        return f"{planned.images} images were planned, {done.images} were reduced"
    for i, reducer in enumerate(profile.reducers):
        pairs = (planned.tokens_in[i], planned.tokens_kept[i]), (done.tokens_in[i], done.tokens_kept[i])
        if reducer.layer in layers and pairs[0] != pairs[1]:
            steps = [f"{tokens_in} -> {kept}" for tokens_in, kept in pairs]
            return f"after layer {reducer.layer} {steps[0]} visual tokens were planned, {steps[1]} came of it"
    return None


def what_is_lost(reduction: Any, attention: dict[int, Any]) -> list[str]:
    """All that proves a worker's reduction and no longer does; nothing where it is in place.

    Args:
        reduction: of the worker's model.
        attention: the attention layers that its decoder has now, by index.
    """
    problems = [
        f"layer {known.layer_name} was replaced"
        if attention[i] is not known
        else layer_problem(known, reduction.profile.segment_of_layer(i))
        for i, known in reduction.attention.items()
    ]
    counts = (reduction.planned, reduction.counters)
    problems.append(count_problem(reduction.profile, reduction.layers, reduction.is_last_stage, *counts))
    return [problem for problem in problems if problem]
