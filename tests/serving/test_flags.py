"""Bad flags and profiles: one line that names field, value and remedy, exit code 2, no traceback."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eos_vllm.cli.server_process import vllm_command
from eos_vllm.core.errors import EosError, SettingError
from eos_vllm.models.tiny import write_tiny_model
from support.flags import BASE, configure, refused
from support.profiles import make_profile


@pytest.fixture(scope="module")
def profile_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profiles") / "theta.json"
    path.write_text(json.dumps(make_profile().to_dict()))
    return path


def test_good_flags_reach_every_process_by_one_place(tiny_model: Path, profile_file: Path) -> None:
    config = configure(tiny_model, ["--eos-profile", str(profile_file), "--eos-retain", "32"])
    options = config.additional_config["eos"]
    assert options["profile"] == make_profile().to_dict()
    assert options["retain"] == 32
    assert config.scheduler_config.scheduler_cls == "eos_vllm.serving.scheduler.EosScheduler"
    assert config.parallel_config.worker_extension_cls == "eos_vllm.serving.worker.EosWorkerExtension"
    assert config.cache_config.enable_prefix_caching is True
    assert config.scheduler_config.enable_chunked_prefill is True
    assert config.scheduler_config.max_num_batched_tokens >= config.model_config.max_model_len
    assert config.cache_config.block_size == 32
    assert options["marker"] is None  # all later text asks in schema 1
    assert not config.use_v2_model_runner


def test_the_end_of_a_turn_is_found_in_the_template(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    file = tmp_path / "turn.json"
    file.write_text(json.dumps(make_profile(schema="eos-profile/2").to_dict()), encoding="utf-8")
    marker = configure(tiny_model, ["--eos-profile", str(file)]).additional_config["eos"]["marker"]
    assert AutoTokenizer.from_pretrained(str(tiny_model)).decode(marker).strip() == "ASSISTANT:"


def test_further_api_servers_get_the_profile_from_the_arguments(tiny_model: Path, profile_file: Path) -> None:
    """vLLM hands them the parsed arguments, which they turn into engine arguments before any plugin is loaded."""
    from dataclasses import fields

    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    args = parser.parse_args(["--model", str(tiny_model), *BASE, "--eos-profile", str(profile_file)])
    AsyncEngineArgs.from_cli_args(args)
    names = [f.name for f in fields(AsyncEngineArgs)]
    elsewhere = AsyncEngineArgs(**{name: getattr(args, name) for name in names if hasattr(args, name)})
    config = elsewhere.create_engine_config()
    assert config.additional_config["eos"]["profile"] == make_profile().to_dict()
    assert config.scheduler_config.scheduler_cls == "eos_vllm.serving.scheduler.EosScheduler"


def test_without_a_profile_no_statistics_are_turned_on() -> None:
    from importlib.metadata import entry_points

    assert not [e for e in entry_points(group="vllm.stat_logger_plugins") if e.name == "eos"]


def test_plugins_loaded_before_anything_else() -> None:
    """A program may load plugins first and make engine arguments later."""
    program = (
        "from vllm.plugins import load_general_plugins; load_general_plugins()\n"
        "from vllm.engine.arg_utils import EngineArgs; raise SystemExit(not EngineArgs.eos_installed)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_a_profile_nothing_changes(tiny_model: Path) -> None:
    config = configure(tiny_model, [])
    assert "eos" not in (config.additional_config or {})
    assert config.scheduler_config.scheduler_cls is None
    assert not config.model_config.model_class_overrides
    assert config.cache_config.enable_prefix_caching is True
    assert not config.parallel_config.worker_extension_cls


def test_a_profile_after_the_same_model_without(tiny_model: Path, profile_file: Path) -> None:
    """In one process, as in a notebook that compares: vLLM must not remember the model's class."""
    from vllm.model_executor.model_loader import utils
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration

    utils.get_model_architecture(configure(tiny_model, []).model_config)
    for key, (_, architecture) in utils._MODEL_ARCH_BY_HASH.items():
        utils._MODEL_ARCH_BY_HASH[key] = LlavaForConditionalGeneration, architecture
    config = configure(tiny_model, ["--eos-profile", str(profile_file)])
    assert utils.get_model_architecture(config.model_config)[0].__name__ == "EosLlavaForConditionalGeneration"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--kv-cache-dtype", "fp8", "--enable-prefix-caching"], "enable-prefix-caching"),
        (["--long-prefill-token-threshold", "100"], "long-prefill-token-threshold"),
        (["--speculative-config", '{"method": "draft_model", "num_speculative_tokens": 2}'], "speculative-config"),
        (["--spec-method", "eagle"], "spec-method"),
        (["--decode-context-parallel-size", "2"], "decode-context-parallel-size"),
        (["--runner", "pooling"], "runner"),
        (["--convert", "embed"], "runner='pooling'"),
        (["--kv-transfer-config", '{"kv_connector": "ExampleConnector", "kv_role": "kv_both"}'], "kv-transfer-config"),
        (["--kv-offloading-size", "1"], "kv-offloading-size"),
        (["--disable-hybrid-kv-cache-manager"], "disable-hybrid-kv-cache-manager"),
        (["--scheduler-cls", "vllm.v1.core.sched.scheduler.Scheduler"], "scheduler-cls"),
        (["--eos-retain", "0"], "eos-retain='0'"),
        (["--eos-retain", "-4"], "eos-retain='-4'"),
        (["--eos-retain", "many"], "eos-retain='many'"),
        (["--eos-retain", "1.5"], "eos-retain='1.5'"),
    ],
)
def test_bad_flags(
    flags: list[str], named: str, tiny_model: Path, profile_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(tiny_model, ["--eos-profile", str(profile_file), *flags], capsys)
    assert named in line
    assert ";" in line  # the remedy


def test_a_compiler_that_would_take_the_whole_forward_pass(
    tiny_model: Path, profile_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("support.flags.BASE", [flag for flag in BASE if flag != "--enforce-eager"])
    flags = ["--eos-profile", str(profile_file), "--compilation-config", '{"mode": 1}']
    assert "compilation-config.mode" in refused(tiny_model, flags, capsys)


@pytest.mark.parametrize(
    ("variable", "value"), [("VLLM_USE_BREAKABLE_CUDAGRAPH", "1"), ("VLLM_USE_RUST_FRONTEND", "1")]
)
def test_bad_environment(
    variable: str,
    value: str,
    tiny_model: Path,
    profile_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, value)
    assert variable in refused(tiny_model, ["--eos-profile", str(profile_file)], capsys)


def test_retain_without_a_profile(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--eos-profile" in refused(tiny_model, ["--eos-retain", "64"], capsys)


def _changed(**changes: Any) -> Callable[[], str]:
    return lambda: json.dumps(make_profile().to_dict() | changes)


def _model(**changes: Any) -> Callable[[], str]:
    return _changed(model=make_profile().to_dict()["model"] | changes)


def _reducer(**changes: Any) -> Callable[[], str]:
    return _changed(reducers=[make_profile().to_dict()["reducers"][0] | changes])


def _layers(*layers: int) -> Callable[[], str]:
    return _changed(reducers=[make_profile().to_dict()["reducers"][0] | {"layer": layer} for layer in layers])


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (lambda: "{not json", "no JSON"),
        (lambda: " " * (1 << 20) + "{}", "1048576"),
        (_changed(surprise=1), "surprise"),
        (_reducer(gamma=1.5), "reducers.0.gamma"),
        (_reducer(tau=0), "reducers.0.tau"),
        (_layers(3, 1), "strictly increase"),
        (_layers(7), "too deep"),
        (_layers(-1), "needs schema eos-profile/2"),
        (_model(num_decoder_layers=32), "num_decoder_layers"),
        (_model(visual_tokens=729), "visual_tokens"),
        (_model(architecture="Qwen2VLForConditionalGeneration"), "architecture"),
    ],
)
def test_bad_profiles(
    content: Callable[[], str], named: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "theta.json"
    path.write_text(content())
    line = refused(tiny_model, ["--eos-profile", str(path)], capsys)
    assert named in line
    assert ";" in line


@pytest.mark.parametrize(
    "source",
    [
        "/nowhere/theta.json",
        "https://127.0.0.1:9/theta.json",
        "http://127.0.0.1:9/x",
        "https://exa mple/x",
        "nobody/nothing",
        "nope",
    ],
)
def test_profiles_that_are_not_there(source: str, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(tiny_model, ["--eos-profile", source], capsys)
    assert source in line


def test_a_model_that_is_no_llava(tmp_path: Path, profile_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_tiny_model(tmp_path / "text")
    config = json.loads((model / "config.json").read_text())["text_config"]
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (model / "config.json").write_text(json.dumps(config))
    line = refused(model, ["--eos-profile", str(profile_file)], capsys)
    assert "LlamaForCausalLM" in line


def test_offline_settings_raise_the_same_line(tiny_model: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    arguments = {"model": str(tiny_model), "dtype": "float32", "enforce_eager": True}
    with pytest.raises(EosError, match="eos-retain"):
        EngineArgs(**arguments, additional_config={"eos": {"retain": 5}}).create_engine_config()
    with pytest.raises(SettingError, match="surprise"):
        EngineArgs(**arguments, additional_config={"eos": {"surprise": 5}}).create_engine_config()


def test_the_command_says_one_line_and_no_traceback(tiny_model: Path, profile_file: Path) -> None:
    command = vllm_command("serve", str(tiny_model), "--eos-profile", str(profile_file), "--enable-dbo", *BASE)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert "eos-vllm: error: enable-dbo=True" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_the_page_is_off_without_its_flag(tiny_model: Path, profile_file: Path) -> None:
    options = configure(tiny_model, ["--eos-profile", str(profile_file)]).additional_config["eos"]
    assert options["page"] is False
    with_page = configure(tiny_model, ["--eos-profile", str(profile_file), "--eos-page"])
    assert with_page.additional_config["eos"]["page"] is True


def test_a_page_needs_a_profile(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(tiny_model, ["--eos-page"], capsys)
    assert "eos-page" in line
    assert "--eos-profile" in line
