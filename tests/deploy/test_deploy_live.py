"""One live server of the embedded model, started as the image starts it: what dashboard and alerts read; its end."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest
import yaml
from deploy_files import DEPLOY, ROOT, image_command, load, tool
from prometheus_client.parser import text_string_to_metric_families

from eos_vllm.cli.server_process import Server, free_port, serve
from eos_vllm.cluttervqa import make_sample
from eos_vllm.models import embedded
from eos_vllm.models.images import to_data_url

pytestmark = pytest.mark.serving
PANELS = [p for p in json.loads((DEPLOY / "monitoring" / "dashboard.json").read_text())["panels"] if "targets" in p]
QUERIES = [(p["title"], t["expr"]) for p in PANELS for t in p["targets"]]
ALERTS = [rule for group in load("monitoring/alerts.yaml")["groups"] for rule in group["rules"]]
# Made by Prometheus, not by the server.
OF_PROMETHEUS = {"up", "ALERTS"}
HAS_STATUS = importlib.util.find_spec("eos_vllm.serving.endpoints") is not None
NOT_YET = set() if HAS_STATUS else {"eos_proof_lost"}  # comes with GET /eos/status
# Rates of these are 0 over 0 where nothing was counted within the window.
SECONDS_OF_TRAFFIC = 12.0
DRAIN = "30"
ELASTIC = "16:32"  # has metrics of its own
KEY = "a key"
# vLLM's own, that stand in its middleware.
GUARDED = ("/v1", "/v2", "/inference", "/cohere")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("live") / "log"
    variables = container_variables() | {"VLLM_API_KEY": KEY}
    with serve(
        embedded.path(), [*image_command()[1:], "--shutdown-timeout", DRAIN, "--eos-elastic", ELASTIC], log, variables
    ) as running:
        yield running


def container_variables() -> dict[str, str]:
    """Plugins and settings as the manifests give them."""
    variables = load("kubernetes/base/deployment.yaml")["spec"]["template"]["spec"]["containers"][0]["env"]
    return {v["name"]: v["value"] for v in variables if "value" in v}


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120)


def post(server: Server, path: str, body: dict[str, Any], **headers: str) -> int:
    """Status of a POST."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{server.url}{path}", data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status
    except urllib.error.HTTPError as e:
        return e.code


def ask(server: Server, number: int, turns: int = 2) -> None:
    """A chat about an image of its own: the second turn finds the first one's KV."""
    sample = make_sample("test", number, questions=1)
    image = {"type": "image_url", "image_url": {"url": to_data_url(sample.image)}}
    messages: list[Any] = [
        {"role": "user", "content": [image, {"type": "text", "text": sample.questions[0].text}]},
    ]
    for _ in range(turns):
        reply = client(server).chat.completions.create(model="embedded", messages=messages, max_tokens=4, temperature=0)
        messages.append({"role": "assistant", "content": reply.choices[0].message.content})
        messages.append({"role": "user", "content": "And now?"})


@dataclass(frozen=True)
class Prometheus:
    """A Prometheus that scrapes the server every second."""

    url: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Samples of an instant query."""
        query = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"{self.url}/api/v1/query?{query}", timeout=10) as response:
            return json.load(response)["data"]["result"]


@pytest.fixture(scope="module")
def prometheus(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """With the project's alerts and, in front of the server, traffic that lasts some scrapes."""
    program = tool("prometheus", "apt-get install prometheus")
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    shutil.copy(DEPLOY / "monitoring" / "alerts.yaml", folder)
    config = load("compose/prometheus.yml")
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"] = config["scrape_configs"][:1]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [server.url.removeprefix("http://")]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = [program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=subprocess.STDOUT
        )
    running = Prometheus(f"http://127.0.0.1:{port}")
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                if running.query('up{job="eos-vllm"} == 1'):
                    break
            except OSError:
                time.sleep(0.2)
        end = time.monotonic() + SECONDS_OF_TRAFFIC
        number = 1000
        while time.monotonic() < end:
            ask(server, number)
            number += 1
            time.sleep(0.5)
        yield running
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def names_in(expression: str) -> set[str]:
    """Metrics that a query reads."""
    return set(re.findall(r"((?:vllm:|eos_|process_)\w+|\bup\b|\bALERTS\b)", expression)) - OF_PROMETHEUS - NOT_YET


def test_the_server_has_every_metric_that_is_read(server: Server) -> None:
    ask(server, 1)
    families = text_string_to_metric_families(server.text("/metrics"))
    samples = {sample.name: set(sample.labels) for family in families for sample in family.samples}
    scaling = load("kubernetes/components/keda/scaledobject.yaml")["spec"]["triggers"][0]["metadata"]["query"]
    for expression in (*(e for _, e in QUERIES), *(a["expr"] for a in ALERTS), scaling):
        assert names_in(expression) <= set(samples), expression
    # Labels by which the dashboard groups.
    for name, label in (("eos_visual_tokens_in_total", "layer"), ("eos_kv_blocks_held", "segment")):
        assert label in samples[name]


@pytest.mark.parametrize(("title", "expression"), QUERIES, ids=[f"{i}-{t}" for i, (t, _) in enumerate(QUERIES)])
def test_every_panel_shows_something(title: str, expression: str, prometheus: Prometheus) -> None:
    if any(name in expression for name in NOT_YET):
        pytest.skip("this version has no endpoint /eos/status yet, nor its metric")
    query = expression.replace("$instance", ".+").replace("$__rate_interval", "10m")
    found = prometheus.query(query)
    assert found, f"{title}: {query}"
    assert all(sample["value"][1] not in ("NaN", "+Inf") for sample in found), found


def test_nothing_fires_at_a_server_that_is_well(prometheus: Prometheus) -> None:
    assert prometheus.query('ALERTS{alertname!=""}') == []
    for alert in ALERTS:
        assert prometheus.query(alert["expr"]) == [], alert["alert"]


def test_the_security_page_names_all_that_is_open(server: Server) -> None:
    """What vLLM's key does not guard, inference included, is what docs/security.md says it is."""
    paths = json.loads(server.text("/openapi.json"))["paths"]
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    table = [row for row in page.splitlines() if row.startswith("| `/")]
    named = {path for row in table for path in re.findall(r"`(/[\w/]+)`", row.split("|")[1])}
    assert {p for p in paths if not p.startswith(GUARDED)} <= named
    body = {"model": "embedded", "messages": [{"role": "user", "content": "Yes?"}], "max_tokens": 2}
    assert post(server, "/v1/chat/completions", body) == 401
    assert post(server, "/v1/chat/completions", body, Authorization=f"Bearer {KEY}") == 200
    assert post(server, "/invocations", body) == 200


def test_readiness(server: Server) -> None:
    """The manifests' probe, at the real endpoint."""
    if not HAS_STATUS:
        pytest.skip("this version has no endpoint /eos/status yet")
    script = DEPLOY / "kubernetes" / "base" / "ready.py"
    variables = {"EOS_STATUS_URL": f"{server.url}/eos/status", "PATH": os.environ["PATH"]}

    def probe(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-I", script], env=variables | more, capture_output=True, text=True, check=False
        )

    assert probe(VLLM_API_KEY=KEY).returncode == 0
    refused = probe()
    assert refused.returncode == 1
    assert "401" in refused.stdout


def test_a_request_under_way_survives_the_end(server: Server) -> None:
    """As a pod ends: SIGTERM, and --shutdown-timeout for what is under way. The last test, for it ends the server."""
    chunks: list[str] = []
    started, reason = threading.Event(), []

    def read() -> None:
        stream = client(server).chat.completions.create(
            model="embedded",
            messages=[{"role": "user", "content": "Tell me more."}],
            max_tokens=1200,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for chunk in stream:
            chunks.extend(choice.delta.content or "" for choice in chunk.choices)
            reason.extend(choice.finish_reason for choice in chunk.choices if choice.finish_reason)
            if len(chunks) > 5:
                started.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert started.wait(60)
    server.process.send_signal(signal.SIGTERM)
    after = len(chunks)
    reader.join(60)
    assert reason == ["length"]
    assert len(chunks) > after
    assert server.process.wait(60) == 0
