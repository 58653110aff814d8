"""A server that cannot rehearse an image refuses to start. Each test breaks one thing that only images meet."""

from pathlib import Path
from typing import Any

import pytest
import torch

from eos_vllm.core.plan import Planner
from eos_vllm.serving.rehearsal import largest_step
from support.engines import answer_all, engine, free_blocks, mixed_asks
from support.profiles import make_profile


def start(model: Path) -> None:
    with engine(model, make_profile()):
        pass


def test_a_reducer_that_keeps_other_counts(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eos_vllm.serving import model

    def keep_all(hidden: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden, torch.arange(len(hidden))

    monkeypatch.setattr(model, "reduce_tokens", keep_all)
    with pytest.raises((RuntimeError, IndexError)):
        start(tiny_model)


def test_slots_of_unreduced_lengths(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eos_vllm.serving.batch import SegmentGeometry

    places = SegmentGeometry.places
    monkeypatch.setattr(
        SegmentGeometry, "places", lambda self, *a: (places(self, *a)[0], (places(self, *a)[1] + 1) % a[1])
    )
    with pytest.raises(RuntimeError, match=r"rehearsal: KV group 0 writes token 0 to slot .* planned"):
        start(tiny_model)


def test_a_layer_that_writes_nothing(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eos_vllm.serving import attention

    build = attention.segment_backend

    def silent(underlying: Any) -> Any:
        backend = build(underlying)
        monkeypatch.setattr(backend.get_impl_cls(), "do_kv_cache_update", lambda *_: None)
        return backend

    monkeypatch.setattr(attention, "segment_backend", silent)
    with pytest.raises(RuntimeError, match="eos"):
        start(tiny_model)


def test_decoder_layers_that_are_called_otherwise(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eos_vllm.serving import model

    monkeypatch.setattr(model, "image_query_weights", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        start(tiny_model)


def test_nothing_is_left_of_it(tiny_model: Path) -> None:
    with engine(tiny_model, make_profile()) as llm:
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        assert not runner.requests
        assert not runner.input_batch.req_ids
        assert not runner.encoder_cache
        assert llm.collective_rpc("eos_report")[0]["images"] == 0
        before = free_blocks(llm)
        answer_all(llm, mixed_asks(3))
        assert free_blocks(llm) == before
        # The memory profile, which CPUs leave out where the size of the KV cache is given.
        runner.profile_run()
        assert llm.collective_rpc("eos_report")[0]["images"] == 3
        assert answer_all(llm, mixed_asks(3))


@pytest.mark.parametrize(
    ("tokens", "requests", "longest", "lengths"),
    [
        (2048, 8, 2048, [585, 585, 878]),
        (2048, 2, 1000, [585, 1000]),
        (2048, 8, 585, [585, 585, 585]),
        (580, 8, 2048, [580]),
        (576, 8, 2048, []),
        (8192, 8, 500, []),
    ],
)
def test_the_largest_step(tokens: int, requests: int, longest: int, lengths: list[int]) -> None:
    made = largest_step(Planner(make_profile()), tokens, requests, longest)
    assert [request.tokens for request in made] == lengths
    assert sum(lengths) <= tokens
    assert all(request.plan.spans[0].length == 576 for request in made)
