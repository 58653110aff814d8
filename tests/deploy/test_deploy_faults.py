"""Faults without a server: outcomes are told apart, the configuration is that of make up, the table is the file's."""

import asyncio
import itertools
import json
import re
import sys
from configparser import RawConfigParser
from pathlib import Path
from typing import Any

import pytest
from deploy_files import DEPLOY, ROOT, supervisor

sys.path.append(str(DEPLOY / "local"))

import fault_client
import fault_stack
import fault_table
import faults
import stack
from fault_client import LONG, Answer, Case

RESULTS = ROOT / "results" / "faults.json"
CASE = Case("data:,", "What?", "Red")


def answer(*chunks: dict[str, Any], done: bool = True) -> Answer:
    """A stream of these chunks."""
    found = Answer()
    for chunk in chunks:
        found.take(json.dumps(chunk))
    if done:
        found.take("[DONE]")
    return found


def chunk(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}, "finish_reason": finish}]}


@pytest.mark.parametrize(
    ("found", "long", "kind"),
    [
        (answer(chunk("r"), chunk("ed", "stop")), False, "right"),
        (answer(chunk("blue", "stop")), False, "wrong"),
        (answer(chunk("redder", "stop")), False, "wrong"),
        (answer(chunk("red and on", "length"), {"usage": {"completion_tokens": LONG}}), True, "right"),
        (answer(chunk("red", "length"), {"usage": {"completion_tokens": LONG - 1}}), True, "wrong"),
        (answer(chunk("red")), False, "truncated"),
        (answer(chunk("red", "stop"), done=False), False, "truncated"),
        (answer(done=False), False, "truncated"),
        (answer(chunk("r"), {"error": {"message": "dead", "code": 500}}), False, "told status 500 in the stream"),
    ],
)
def test_outcomes_of_streams_are_told_apart(found: Answer, long: bool, kind: str) -> None:
    assert found.kind(CASE, long) == kind


HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/event-stream\r\n\r\n"
EVENT = b"data: " + json.dumps(chunk("red")).encode() + b"\n\n"
PIECE = f"{len(EVENT):x}".encode() + b"\r\n" + EVENT + b"\r\n"


@pytest.mark.parametrize(
    ("sent", "kind"),
    [
        (HEAD + PIECE + b"0\r\n\r\n", "truncated"),
        (HEAD + PIECE, "told stream broken"),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", "told status 503"),
        (b"", "told connection broken"),
        (None, "hung"),
    ],
)
def test_outcomes_of_connections_are_told_apart(sent: bytes | None, kind: str) -> None:
    async def outcome() -> fault_client.Outcome:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            await reader.readexactly(int(re.findall(r"content-length: (\d+)", head)[0]))
            if sent is None:
                await asyncio.sleep(2)
            else:
                writer.write(sent)
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()[:2]
        async with server, fault_client.aiohttp.ClientSession() as session:
            return await fault_client.ask(session, f"http://{host}:{port}", CASE, "x", long=False, limit=1.0)

    assert asyncio.run(outcome()).kind == kind


def test_the_configuration_is_that_of_make_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "FOLDER", tmp_path)
    monkeypatch.setattr(stack, "PORT", 9300)
    found = RawConfigParser(inline_comment_prefixes=None)
    found.read(fault_stack.write_configuration("--max-num-seqs 3", "theta.json", tmp_path / "logs"))
    programs = {name.removeprefix("program:") for name in found.sections() if name.startswith("program:")}
    assert programs == set(fault_stack.PROGRAMS)
    for number, name in enumerate(fault_stack.PROGRAMS[:2], start=1):
        ours, theirs = found[f"program:{name}"], supervisor()[f"program:{name}"]
        want = " ".join(theirs["command"].split()).replace(f"--port 810{number}", f"--port 930{number}")
        want = want.replace("--eos-profile embedded-searched", "--eos-profile theta.json")
        assert ours["command"] == f"{want} --max-num-seqs 3"
        assert ours["autorestart"] == theirs["autorestart"] == "true"
    assert "http://127.0.0.1:9301 http://127.0.0.1:9302" in found["program:router"]["command"]


def result(**changes: Any) -> dict[str, Any]:
    part = {"outcomes": {"right": 3}}
    values = {"name": "disk", "what": "no space", "in_flight": part, "during": part, "after": part}
    facts = {"git": "0123456789abcdef", "machine": {"cores": 2, "processor": "some"}}
    return values | {"recover_seconds": 0.0, "load_average": 3.5, "provenance": facts, "notes": {}} | changes


def test_problems_are_found() -> None:
    assert faults.problems(result()) == []
    for kind in ("wrong", "truncated", "hung"):
        assert faults.problems(result(during={"outcomes": {kind: 1}})) == [f"1 {kind} (during)"]
    assert faults.problems(result(in_flight={"outcomes": {"told status 500": 1}})) == []
    assert faults.problems(result(after={"outcomes": {"told status 500": 1}}))
    assert faults.problems(result(recover_seconds=None)) == ["no recovery"]


def test_faults_with_the_same_flags_share_a_stack() -> None:
    assert faults.stacks(["disk", "flood-requests", "replica"], 16) == {
        "--max-num-seqs 2": ["disk", "replica"],
        "--max-num-seqs 2 --max-num-queued-reqs 2": ["flood-requests"],
    }
    shared = faults.stacks(list(faults.FAULTS), 200)
    assert sorted(itertools.chain(*shared.values())) == sorted(faults.FAULTS)


def test_faults_played_again_replace_their_results() -> None:
    earlier = [{"name": "worker", "take": 1}, {"name": "disk", "take": 1}]
    now = [{"name": "disk", "take": 2}, {"name": "replica", "take": 2}]
    assert [(r["name"], r["take"]) for r in faults.merged(earlier, now)] == [("worker", 1), ("replica", 2), ("disk", 2)]


def test_table_counts_what_was_told() -> None:
    told = {"outcomes": {"right": 9, "told status 500": 2, "told stream broken": 1}}
    _, _, row, _, foot = fault_table.table([result(in_flight=told, recover_seconds=41.5)]).splitlines()
    assert foot == "2 cores (some), with other work on it: load average 3.5 to 3.5. Revision 0123456789ab."
    assert "9 right, 3 told (status 500: 2, stream broken: 1) | 3 right | 41.5 |" in row


def test_table_says_how_long_a_flood_waits() -> None:
    notes = {"ready": "38 of 38", "first token, median s": 0.5, "first token, worst s": 2.0}
    row = fault_table.table([result(name="flood-queued", notes=notes)]).splitlines()[2]
    assert "answers begin after 0.5 s (median) and 2 s at worst; replicas ready in 38 of 38 looks" in row


@pytest.mark.skipif(not RESULTS.exists(), reason="results/faults.json is not there yet: make faults")
def test_the_page_shows_the_file() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))["faults"]
    assert f"{fault_table.BEGIN}\n{fault_table.table(results)}\n{fault_table.END}" in page
