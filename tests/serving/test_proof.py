"""A worker that cannot prove its reduction refuses to start. Each test breaks one thing."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support.engines import answer_all, engine, mixed_asks
from support.profiles import make_profile


def start(model: Path) -> None:
    with engine(model, make_profile()):
        pass


def test_a_layer_that_was_not_converted(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eos_vllm.serving import model

    convert = model.convert
    monkeypatch.setattr(
        model, "convert", lambda layer, s, b: None if "layers.5" in layer.layer_name else convert(layer, s, b)
    )
    with pytest.raises(RuntimeError, match="no SegmentSpec"):
        start(tiny_model)


def test_a_layer_in_the_wrong_segment(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eos_vllm.serving import model

    convert = model.convert
    monkeypatch.setattr(
        model, "convert", lambda layer, s, b: convert(layer, 2 if "layers.7" in layer.layer_name else s, b)
    )
    with pytest.raises(RuntimeError, match=r"layers\.7.* its place is segment 3"):
        start(tiny_model)


def test_a_layer_with_vllms_own_backend(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eos_vllm.serving import attention

    monkeypatch.setattr(attention, "segment_backend", lambda underlying: underlying)
    with pytest.raises(RuntimeError, match="unreduced lengths"):
        start(tiny_model)


def test_a_manager_that_allocates_for_all_tokens(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eos_vllm.serving.kv_cache import SegmentManager

    monkeypatch.setattr(SegmentManager, "tokens_of", lambda self, request_id, num_tokens: num_tokens)
    with pytest.raises(RuntimeError, match=r"planned .* promised"):
        start(tiny_model)


def test_no_one_writes_by_vllms_own_slots(tiny_model: Path) -> None:
    """They are for unreduced lengths; they stay padding, through prefill and decode."""
    with engine(tiny_model, make_profile()) as llm:
        answer_all(llm, mixed_asks(4))
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        tables = runner.input_batch.block_table.block_tables
        assert len(tables) == len(runner.kv_cache_config.kv_cache_groups)
        assert all((table.slot_mapping.gpu == -1).all() for table in tables)


def test_an_argument_is_found_by_keyword_and_by_position() -> None:
    from eos_vllm.serving.runner_v1 import argument_reader

    def build(self: Any, tokens: int, scheduled: dict[str, int] | None = None) -> None: ...

    read = argument_reader(build, "scheduled")
    assert read((None, 3, {"a": 1}), {}) == read((None, 3), {"scheduled": {"a": 1}}) == {"a": 1}
    assert read((None, 3), {}) is None
    with pytest.raises(RuntimeError, match="build takes no computed"):
        argument_reader(build, "computed")


def test_a_scheduler_that_plans_nothing(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eos_vllm.serving import engine_args

    finish = engine_args.finish

    def replaced(config: Any) -> None:
        finish(config)
        config.scheduler_config.scheduler_cls = None

    monkeypatch.setattr(engine_args, "finish", replaced)
    with (
        engine(tiny_model, make_profile()) as llm,
        pytest.raises(RuntimeError, match="something replaced scheduler_cls"),
    ):
        answer_all(llm, mixed_asks(2))


def test_an_offline_engine_without_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with ``VLLM_PLUGINS`` that names others: vLLM takes the settings, and nobody reads them."""
    import vllm

    import eos_vllm
    from eos_vllm.core.errors import SettingError

    class Unplugged:
        def __init__(self, *_: Any, **settings: Any) -> None:
            assert settings["additional_config"]["eos"] == {"profile": "embedded-eos", "retain": 64}
            parallel = SimpleNamespace(worker_extension_cls="")
            core = SimpleNamespace(shutdown=lambda: None)
            self.llm_engine = SimpleNamespace(vllm_config=SimpleNamespace(parallel_config=parallel), engine_core=core)

    monkeypatch.setattr(vllm, "LLM", Unplugged)
    with pytest.raises(SettingError, match="VLLM_PLUGINS"):
        eos_vllm.LLM("model", "embedded-eos", 64)


def test_an_offline_engine_with_it(tiny_model: Path) -> None:
    import eos_vllm

    llm = eos_vllm.LLM(
        str(tiny_model),
        make_profile().to_dict(),
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        kv_cache_memory_bytes=64 << 20,
    )
    try:
        assert answer_all(llm, mixed_asks(2))
        assert llm.collective_rpc("eos_report")[0]["images"] == 1
    finally:
        llm.llm_engine.engine_core.shutdown()
