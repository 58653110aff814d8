"""Proofs of each step: what would serve wrong answers without a word ends the engine instead."""

from typing import Any

import numpy as np
import pytest
import torch

from eos_vllm.core.plan import ImageSpan, Planner, RequestPlan
from eos_vllm.models.images import sample_image
from eos_vllm.serving.batch import BatchState, StepEntry
from support.engines import Ask, answer_all, engine
from support.profiles import make_profile
from support.runner_v2 import is_wanted


def plan_of(tokens: int = 600) -> RequestPlan:
    return Planner(make_profile()).plan(tokens, [ImageSpan(5, 576)])


@pytest.fixture
def state() -> BatchState:
    found = BatchState(make_profile(), 8, torch.device("cpu"))
    found.allocate()
    return found


def metadata(*lengths: int) -> Any:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        num_reqs=len(lengths),
        num_actual_tokens=int(starts[-1]),
        max_query_len=max(lengths),
        max_seq_len=max(lengths),
        block_table_tensor=torch.zeros(len(lengths), 64, dtype=torch.int32),
        slot_mapping=torch.zeros(int(starts[-1]), dtype=torch.int64),
    )


def test_a_prompt_in_parts_is_never_run(state: BatchState) -> None:
    plan = plan_of()
    with pytest.raises(ValueError, match="cut an image"):
        state.begin([StepEntry("r", plan, 0, 300)])
    with pytest.raises(ValueError, match="cut an image"):
        state.begin([StepEntry("r", plan, 10, 590)])
    state.begin([StepEntry("r", plan, 0, 600)])
    assert state.prefills_images


def test_images_whose_reduction_did_not_run(state: BatchState) -> None:
    """What a replayed graph of the whole forward pass would leave behind."""
    state.begin([StepEntry("r", plan_of(), 0, 600)])
    state.geometry(0, metadata(600))
    with pytest.raises(RuntimeError, match="their reduction did not run"):
        state.begin([StepEntry("r", plan_of(), 600, 1)])


def test_images_whose_reduction_ran(state: BatchState) -> None:
    state.begin([StepEntry("r", plan_of(), 0, 600)])
    state.geometry(0, metadata(600))
    state.reduction_ran()
    state.begin([StepEntry("r", plan_of(), 600, 1)])
    assert not state.prefills_images


def test_metadata_of_other_lengths_than_announced(state: BatchState) -> None:
    state.begin([StepEntry("r", plan_of(), 0, 600)])
    with pytest.raises(RuntimeError, match="built for 601 tokens, 600 were announced"):
        state.geometry(0, metadata(601))


def test_a_step_goes_on_only_with_the_same_requests(state: BatchState) -> None:
    plan, first, second = plan_of(), object(), object()
    computed = np.array([600, 700])
    assert not state.goes_on([first], computed, 1)
    state.begin([StepEntry("a", plan, 0, 600)], [first])
    assert not state.goes_on([first], computed, 1)  # the image was not behind it
    state.begin([StepEntry("a", plan, 600, 1)], [first])
    step = state.step
    assert state.goes_on([first], computed, 1)
    assert state.step == step + 1
    assert not state.goes_on([second], computed, 1)  # another request of the same name
    assert not state.goes_on([first, second], computed, 2)
    assert not state.goes_on([first], np.array([0]), 600)  # preempted, and back in the same row


def test_nothing_on_the_device_is_made_with_the_model() -> None:
    """What is made there is taken for weights, and gone after the engine slept at level 2."""
    made = BatchState(make_profile(), 8, torch.device("cpu"))
    assert not [name for name, value in vars(made).items() if isinstance(value, torch.Tensor)]
    made.allocate()
    assert {name for name, value in vars(made).items() if isinstance(value, torch.Tensor)} == {
        "_removed_device",
        "_seq_lens",
        "_arange",
    }
    made.begin([StepEntry("a", plan_of(), 600, 1)], [object()])
    assert int(made._removed_device.sum()) > 0


def test_one_workspace_for_all_builders(state: BatchState) -> None:
    """FlashInfer's, of some 400 MiB each under V1."""
    from eos_vllm.serving.attention import _share_workspace

    class Builder:
        def __init__(self) -> None:
            self.workspace: torch.Tensor | None = None

        def _get_workspace_buffer(self) -> torch.Tensor:
            return torch.zeros(4)

        def set_workspace_buffer(self, buffer: torch.Tensor) -> None:
            self.workspace = buffer

    builders = [Builder() for _ in range(3)]
    for builder in builders:
        _share_workspace(builder, state)
    assert len({id(builder.workspace) for builder in builders}) == 1


def test_segments_share_what_is_built_where_nothing_is_gone(state: BatchState) -> None:
    keeps = Planner(make_profile()).plan(600, [])
    state.begin([StepEntry("a", None if not keeps.reduces else keeps, 600, 1)], [object()])
    assert state.uniform
    assert state.geometry(0, metadata(1)) is state.geometry(3, metadata(1))
    state.begin([StepEntry("a", plan_of(), 600, 1)], [object()])
    assert not state.uniform
    assert state.geometry(0, metadata(1)) is not state.geometry(3, metadata(1))


def test_a_step_that_nobody_announced(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path of vLLM that builds metadata and isn't hooked: lengths of an earlier step must not be used."""
    from eos_vllm.serving import runner_v1

    with engine(tiny_model, make_profile()) as llm:
        ask = Ask("USER: <image>\nWhat? ASSISTANT:", [sample_image(3)], max_tokens=4)
        assert answer_all(llm, [ask])
        monkeypatch.setattr(runner_v1, "_begin", lambda *_: None)
        if is_wanted():
            from eos_vllm.serving.runner_v2 import EosModelState

            monkeypatch.setattr(EosModelState, "_begin", lambda *_: None)
        with pytest.raises(RuntimeError, match="without a new step being announced"):
            answer_all(llm, [ask])


def test_a_forward_pass_that_skips_the_reduction(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from eos_vllm.serving.model import Reduction

    with engine(tiny_model, make_profile()) as llm:
        monkeypatch.setattr(Reduction, "is_needed", lambda self: False)
        with pytest.raises(RuntimeError, match="their reduction did not run"):
            answer_all(llm, [Ask("USER: <image>\nWhat? ASSISTANT:", [sample_image(3)], max_tokens=4)])
