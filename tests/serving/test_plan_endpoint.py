"""Plans and choices in a real server: mounted by ``--eos-page``, behind the key, of that server's own sizes."""

import json
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from eos_vllm.cli.main import main
from eos_vllm.cli.server_process import Server, serve
from eos_vllm.core.errors import SettingError
from eos_vllm.models import embedded
from eos_vllm.serving.options import KEY as OPTIONS
from eos_vllm.serving.options import resolve_options
from eos_vllm.serving.plan_endpoint import kv_dtype, plan_context
from support.flags import BASE
from support.profiles import make_profile
from support.servers import fetch

KEY, PROFILE = "right-key", "embedded-searched"
FLAGS = [*BASE, "--block-size", "32", "--api-key", KEY, "--eos-profile", PROFILE, "--eos-page"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("plans")
    with serve(embedded.path(), FLAGS, folder / "log", {}) as running:
        yield running


@pytest.mark.serving
def test_a_servers_plans_are_those_of_the_command_line(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", str(embedded.path()), "--dtype", "float32", "--block-size", "32"]
    assert main(["plan", "--profile", PROFILE, *model, "--retain", "64", "192", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["plans"]
    code, found = fetch(server, "/eos/plan", KEY, {"budgets": [64, 192]})
    assert code == 200
    assert (found["dtype"], found["block_size"]) == ("float32", 32)
    assert [plan["counts"] for plan in found["plans"]] == [plan["counts"] for plan in told]
    for name, theirs in (("kv_bytes", "allocated_bytes"), ("prefill_flops", "flops"), ("kv_blocks", "blocks")):
        assert [plan[name] for plan in found["plans"]] == [plan["reduced"][theirs] for plan in told]
        assert found["stock"][name] == told[0]["stock"][theirs]


@pytest.mark.serving
def test_a_server_recommends_for_itself(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = fetch(server, "/eos/choices?kv_gib=1&concurrency=64&accuracy_floor=0.95", KEY)
    assert code == 200
    assert {p["profile"] for p in found["points"] if p["served_here"]} == {PROFILE}
    asked = ["--kv-gib", "1", "--concurrency", "64", "--accuracy-floor", "0.95", "--dtype", "float32", "--json"]
    assert main(["advise", *asked, "--block-size", "32"]) == 0
    assert found["recommendation"]["choice"] == json.loads(capsys.readouterr().out)["choice"]


@pytest.mark.serving
def test_a_server_asks_for_the_key(server: Server) -> None:
    for key in (None, "other"):
        for found in (fetch(server, "/eos/choices", key), fetch(server, "/eos/plan", key, {"budgets": [64]})):
            assert found == (401, {"error": "Unauthorized"})
    code, found = fetch(server, "/eos/plan", KEY, {"budgets": [0]})
    assert code == 400
    assert found["error"].startswith("budgets=0: a retain budget is at least 1")


def test_what_plans_take_from_the_configuration() -> None:
    profile = make_profile()
    config = SimpleNamespace(
        additional_config={OPTIONS: resolve_options({"profile": profile.to_dict(), "page": True})},
        cache_config=SimpleNamespace(block_size=32, cache_dtype="auto"),
        model_config=SimpleNamespace(
            model=str(embedded.path()),
            dtype="torch.bfloat16",
            hf_config=json.loads((embedded.path() / "config.json").read_text()),
        ),
    )
    context = plan_context(config)  # type: ignore[arg-type]
    assert (context.model, context.dtype, context.block_size) == ("embedded", "bfloat16", 32)
    assert context.size_tokens is None
    config.model_config.model = "elsewhere"
    assert plan_context(config).model == "elsewhere"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cache", "model", "name"),
    [("auto", "torch.float32", "float32"), ("fp8_e4m3", "torch.float16", "fp8"), ("bfloat16", "x", "bfloat16")],
)
def test_the_type_of_the_cache(cache: str, model: str, name: str) -> None:
    assert kv_dtype(cache, model) == name


def test_a_cache_of_an_unknown_type_is_one_line() -> None:
    with pytest.raises(SettingError, match="leave --eos-page out"):
        kv_dtype("nvfp4", "torch.float16")
