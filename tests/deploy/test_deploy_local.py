"""make up without starting it: supervisord takes the configuration, addresses agree, mistakes are one line."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from deploy_files import DEPLOY, load, supervisor

STACK = DEPLOY / "local" / "stack.py"
CONFIG = supervisor()
PROGRAMS = {n.removeprefix("program:"): CONFIG[n]["command"] for n in CONFIG.sections() if n.startswith("program:")}


def stack(action: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs stack.py with another folder and PATH."""
    command = [sys.executable, str(STACK), action]
    return subprocess.run(
        command, env={**os.environ, **variables}, capture_output=True, text=True, check=False, timeout=60
    )


def test_supervisord_takes_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = pytest.importorskip("supervisor.options", reason="supervisor is not installed")
    for name in ("EOS_BIN", "EOS_STACK", "EOS_BREAKING"):
        monkeypatch.setenv(name, str(tmp_path))
    parsed = options.ServerOptions()
    parsed.realize(["-c", str(DEPLOY / "local" / "supervisord.conf")])
    started = {group.name for group in parsed.process_group_configs if group.process_configs[0].autostart}
    assert started == {"replica-1", "replica-2", "router", "prometheus"}


def test_addresses_agree() -> None:
    replicas = {re.findall(r"--port (\d+)", PROGRAMS[name])[0] for name in ("replica-1", "replica-2")}
    scraped = load("local/prometheus.yml")["scrape_configs"]
    jobs = {job["job_name"]: job["static_configs"][0]["targets"] for job in scraped}
    assert {target.rpartition(":")[2] for target in jobs["eos-vllm"]} == replicas
    assert all(f"http://127.0.0.1:{port}" in PROGRAMS["router"] for port in replicas)
    assert f"--prometheus-port {jobs['vllm-router'][0].rpartition(':')[2]}" in PROGRAMS["router"]
    known = set(re.findall(r"http://127\.0\.0\.1:(\d+)", STACK.read_text(encoding="utf-8")))
    ports = set(re.findall(r"--port (\d+)|listen-address=127\.0\.0\.1:(\d+)", " ".join(PROGRAMS.values())))
    assert known == {port for pair in ports for port in pair if port}


def test_everything_listens_on_the_loopback_interface_alone() -> None:
    for name, command in PROGRAMS.items():
        assert "127.0.0.1" in command, name
        assert "0.0.0.0" not in command, name


def test_down_where_nothing_is_up(tmp_path: Path) -> None:
    done = stack("down", EOS_STACK=str(tmp_path))
    assert (done.returncode, done.stderr) == (1, "stack: it is not up\n")


def test_up_without_prometheus(tmp_path: Path) -> None:
    done = stack("up", EOS_STACK=str(tmp_path), PATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("stack: prometheus is not installed: ")
    assert done.stderr.count("\n") == 1
