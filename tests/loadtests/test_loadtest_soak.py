"""What a soak must show, and memory that is flat or is not."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from load_builders import record
from stub_server import stub_server

from eos_vllm.cli.server_process import Server
from eos_vllm.models.geometry import geometry
from eos_vllm.models.model_files import write_model_files
from eos_vllm.models.tiny import EMBEDDED
from loadtests import soak, soak_chart
from loadtests.client import Reply
from loadtests.memory import MemoryWatch, growth, resident_bytes
from loadtests.records import Record, record_of
from loadtests.replicas import together
from loadtests.scenarios import Ask
from loadtests.server_metrics import Snapshot
from loadtests.servers import Servers
from loadtests.soak import counted
from loadtests.soak_checks import Check, checks
from loadtests.subjects import Subject, fitted_profile

DRAINED = {"running": 0.0, "waiting": 0.0, "kv_usage": 0.0, "eos_blocks_held": 0.0}
FLAT = [500 << 20] * 16
BROKEN = record_of(Ask(7, "single", "?", fault="no_json"), Reply(status=400, cause="http 400"), 0.0, 0.0, 0, 0)
SERVED = record_of(Ask(7, "single", "?", fault="no_json"), Reply(status=200), 0.0, 0.0, 0, 0)
WELL = [record(0), record(1), record(2, aborted=True), BROKEN]


def judged(records: list[Record] = WELL, **changes: Any) -> dict[str, Check]:
    settings: dict[str, Any] = {"alive": True, "drained": DRAINED, "sizes": FLAT, "last_answer": True}
    return {check.name: check for check in checks(records, **(settings | changes))}


def test_a_good_soak_holds() -> None:
    assert [check for check in judged().values() if not check.holds] == []


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({"alive": False}, ["the server lives"]),
        ({"last_answer": False}, ["the server lives"]),
        ({"drained": DRAINED | {"eos_blocks_held": 3.0}}, ["no KV block stays behind"]),
        ({"drained": DRAINED | {"kv_usage": 0.01}}, ["no KV block stays behind"]),
        ({"drained": {"running": 0.0}}, ["no KV block stays behind"]),
        ({"drained": {}}, ["no KV block stays behind"]),
        ({"sizes": [500 << 20] * 8 + [600 << 20] * 8}, ["memory is flat"]),
        ({"sizes": [1, 2]}, ["memory is flat"]),
        ({"records": [*WELL, record(9, cause="timeout")]}, ["every good request is answered in full"]),
        ({"records": [record(2, aborted=True), BROKEN]}, ["every good request is answered in full"]),
        ({"records": [*WELL, SERVED]}, ["every broken request is refused as the sender's mistake"]),
        ({"records": [*WELL[:2], BROKEN]}, ["some streams were left half way"]),
        (
            {"records": [*WELL, record(9, cause="http 500", status=500)]},
            ["no answer of status 500 or above", "every good request is answered in full"],
        ),
    ],
)
def test_every_check_can_fail(changes: dict[str, Any], broken: list[str]) -> None:
    assert [check.name for check in judged(**changes).values() if not check.holds] == broken


def test_growth_leaves_out_the_first_quarter() -> None:
    assert growth([1, 50, 100, 100, 100, 100, 100, 100]) == pytest.approx(0.0)
    assert growth([100, 100, 100, 100, 110, 120, 130, 130]) == pytest.approx(0.3)
    assert growth([100] * 7) is None


def test_memory_of_a_process_and_its_children() -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'x = [7] * (8 << 20); input()'])"
    process = subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE)
    try:
        with MemoryWatch(process.pid, period=0.05) as watch:
            deadline = time.monotonic() + 30
            while max((size for _, size in watch.samples), default=0) < 64 << 20:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert watch.samples[-1][1] > 64 << 20
    finally:
        process.communicate(b"\n", timeout=30)
    assert resident_bytes(process.pid) is None
    assert resident_bytes(os.getpid()) is not None


def test_whole_soak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    model = tmp_path / "model"
    model.mkdir()
    write_model_files(EMBEDDED, model)
    sizes = geometry(model)
    with stub_server() as stub:

        @contextmanager
        def serving(*_: Any) -> Iterator[tuple[Servers, str]]:
            pair = Servers.__new__(Servers)
            pair.running = {"eos": Server(stub.url, process, tmp_path / "log")}
            yield pair, "m"

        monkeypatch.setattr(soak, "serving", serving)
        subject = Subject("small", model, sizes, fitted_profile("embedded-eos", sizes))
        monkeypatch.setattr(soak, "speed_subject", lambda *_: subject)
        out = tmp_path / "soak.json"
        try:
            code = soak.main(["--minutes", "0.05", "--concurrency", "4", "--malformed", "0.2", "--out", str(out)])
        finally:
            process.communicate(b"\n", timeout=30)
    assert code == 0, capsys.readouterr().out
    found = json.loads(out.read_text())
    assert [check["name"] for check in found["checks"] if not check["holds"]] == []
    kinds = found["requests"]["by kind"]
    assert set(kinds) == {"broken", "left half way", *soak.SCENARIOS}
    assert found["requests"]["all"] == sum(kinds.values()) > 20
    assert found["drained"] == DRAINED
    assert len(found["resident_bytes"]) >= 8
    assert stub.url not in out.read_text()
    assert str(tmp_path) not in out.read_text()


def test_what_replicas_hold_is_summed() -> None:
    looks = [Snapshot({"kv_usage": 0.25, "running": 1.0}, 10), Snapshot({"kv_usage": 0.5}, 10)]
    assert together(looks) == Snapshot({"kv_usage": 0.75, "running": 1.0}, 20)
    assert together([Snapshot({})]) == Snapshot({})


def test_memory_is_drawn_over_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = {"requests": {"all": 100}, "seconds": 50.0, "resident_bytes": [[(0.0, 1 << 20), (50.0, 3 << 20)]] * 2}
    assert soak_chart.curves(one | {"stock": one})["eos"][1] == ([0.0, 100.0], [1.0, 3.0])
    file, png = tmp_path / "soak.json", tmp_path / "soak.png"
    file.write_text(json.dumps(one))
    assert soak_chart.main([str(file), str(png)]) == 2
    assert "has no stock servers" in capsys.readouterr().err
    file.write_text(json.dumps(one | {"stock": one}))
    assert soak_chart.main([str(file), str(png)]) == 0
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("flags", "field"), [([], "requests"), (["--requests", "0"], "requests")])
def test_several_replicas_are_soaked_by_number(
    flags: list[str], field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert soak.main(["--replicas", "2", *flags]) == 2
    assert field in capsys.readouterr().err


def test_requests_are_counted_by_kind() -> None:
    found = counted([*WELL, record(5, cause="timeout", budget=64)])
    assert found["all"] == 5
    assert found["by kind"] == {"single": 3, "left half way": 1, "broken": 1}
    assert found["by fault"] == {"no_json": 1}
    assert found["by budget"] == {"None": 3, "64": 1}
    assert found["failed"] == {"timeout": 1}
