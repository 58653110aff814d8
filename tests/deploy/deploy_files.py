"""What deploy/ holds, as data: rendered manifests, command lines of servers, and the tools that check them."""

import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
from configparser import RawConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
OVERLAYS = ("cpu-demo", "gpu", "gpu-tp2")
# What kubectl kustomize takes: folder by a short name.
KUSTOMIZATIONS = {name: DEPLOY / "kubernetes" / "overlays" / name for name in OVERLAYS} | {
    "monitoring": DEPLOY / "monitoring"
}


def tool(name: str, remedy: str) -> str:
    """Path of a program, from this environment or from PATH; skips the test where it is missing."""
    path = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if path is None:
        pytest.skip(f"{name} is not installed ({remedy})")
    return path


def promtool() -> str:
    """Prometheus' own checker."""
    return tool("promtool", "apt-get install prometheus")


def checked(*command: str | Path) -> str:
    """Runs a checker and returns what it prints; the test fails with that where it is not content."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, f"{' '.join(map(str, command))}:\n{done.stdout}{done.stderr}"
    return done.stdout


@functools.cache
def _rendered(name: str) -> str:
    kubectl = shutil.which("kubectl")
    program = [kubectl, "kustomize"] if kubectl else [tool("kustomize", "or kubectl"), "build"]
    return checked(*program, KUSTOMIZATIONS[name])


def rendered(name: str) -> list[dict[str, Any]]:
    """Objects of a kustomization; skips the test where nothing can render it."""
    return list(yaml.safe_load_all(_rendered(name)))


def one(objects: list[dict[str, Any]], kind: str, name: str = "eos-vllm") -> dict[str, Any]:
    """The object of that kind and name."""
    found = [o for o in objects if (o["kind"], o["metadata"]["name"]) == (kind, name)]
    assert len(found) == 1, f"{len(found)} objects {kind} {name}"
    return found[0]


def container(objects: list[dict[str, Any]]) -> dict[str, Any]:
    """The server's container."""
    return one(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]


def load(path: str) -> Any:
    """A YAML file of deploy/."""
    return yaml.safe_load((DEPLOY / path).read_text(encoding="utf-8"))


def instructions(containerfile: str) -> list[tuple[str, str]]:
    """Instructions of a container file with their text, continued lines joined."""
    text = (DEPLOY / containerfile).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def image_command() -> list[str]:
    """What the CPU image serves if nothing is asked for."""
    return json.loads(dict(instructions("Containerfile.cpu"))["CMD"])


def supervisor() -> RawConfigParser:
    """The programs of make up."""
    config = RawConfigParser(inline_comment_prefixes=None)
    config.read(DEPLOY / "local" / "supervisord.conf", encoding="utf-8")
    return config


def _compose(file: str) -> dict[str, list[str]]:
    services = load(f"compose/{file}")["services"]
    return {f"compose/{file} {name}": s["command"] for name, s in services.items() if name.startswith("replica")}


def _local() -> dict[str, list[str]]:
    config = supervisor()
    commands = {name: shlex.split(config[name]["command"]) for name in config.sections() if "replica" in name}
    return {f"local {name}": command[2:] for name, command in commands.items()}


def server_commands() -> dict[str, list[str]]:
    """What stands behind ``vllm serve`` in each manifest that needs no rendering."""
    chart = load("production-stack/values.yaml")["servingEngineSpec"]["modelSpec"][0]
    kserve = load("kserve/llminferenceservice.yaml")["spec"]["template"]["containers"][0]
    variables = {v["name"]: v["value"] for v in kserve["env"]}
    return {
        "Containerfile.cpu": image_command(),
        **_compose("compose.yaml"),
        **_compose("gpu.yaml"),
        **_local(),
        "production-stack": [chart["modelURL"], *chart["vllmConfig"]["extraArgs"]],
        # KServe's own part of the command stands in front.
        "kserve": ["/mnt/models", *shlex.split(variables["VLLM_ADDITIONAL_ARGS"])],
    }
