"""Flags of the servers: stock has its own defaults."""

from pathlib import Path

from eos_vllm import profiles
from loadtests.servers import ServerSpec

SPEC = ServerSpec("model", profiles.resolve("embedded-eos"), 1000, 2048, arguments=("--load-format", "dummy"))


def test_servers_differ_in_the_profile_alone() -> None:
    stock, eos = SPEC.flags("stock", Path("theta.json")), SPEC.flags("eos", Path("theta.json"))
    assert eos == [*stock, "--eos-profile", "theta.json"]
    assert {flag for flag in stock if flag.startswith("--")} == {
        "--served-model-name",
        "--dtype",
        "--kv-cache-memory-bytes",
        "--max-model-len",
        "--load-format",
    }


def test_restricted_stock_is_a_server_of_its_own() -> None:
    restricted = SPEC.flags("stock-restricted", Path("theta.json"))
    more = ["--no-enable-prefix-caching", "--no-enable-chunked-prefill"]
    assert restricted == [*SPEC.flags("stock", Path("theta.json")), *more]
