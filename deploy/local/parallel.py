"""vLLM's ways over several ranks and nodes, each as a command on CPU ranks: the answers and counts of one rank.

``python deploy/local/parallel.py [NAME ...]`` (ten minutes for all on two cores). "Nodes" are processes of this machine
that meet over the loopback interface. Prints one line for each way; exit code 1 where one differs.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from eos_vllm import profiles
from eos_vllm.cli.server_process import Server, free_port, serve, vllm_command
from eos_vllm.core.plan import Planner
from eos_vllm.models.images import sample_image, to_data_url
from eos_vllm.models.tiny import write_tiny_model

PROFILE, IMAGES, BLOCK = "embedded-searched", 6, 32
FLAGS = (
    *("--served-model-name=tiny", f"--eos-profile={PROFILE}", "--dtype=float32", "--enforce-eager"),
    *("--max-model-len=2048", f"--kv-cache-memory-bytes={64 << 20}"),
)
NODES = "--nnodes 2 --master-addr 127.0.0.1"
# Name: flags of all, and of the second node where there is one.
WAYS = {
    "one rank": "",
    "tensor": "--tensor-parallel-size 2",
    "pipeline": "--pipeline-parallel-size 2",
    "data": "--data-parallel-size 2",
    "data, 2 API servers": "--data-parallel-size 2 --api-server-count 2",
    "tensor, 2 nodes": f"--tensor-parallel-size 2 {NODES}",
    "pipeline, 2 nodes": f"--pipeline-parallel-size 2 {NODES}",
}


@contextmanager
def second_node(model: Path, flags: list[str], folder: Path, variables: dict[str, str]) -> Iterator[None]:
    """The headless part of a server over two nodes."""
    command = vllm_command("serve", str(model), *FLAGS, *flags, "--node-rank", "1", "--headless")
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", **variables}
    with (folder / "second.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ask(server: Server, number: int) -> str:
    """The answer to a question about an image of its own."""
    image = {"type": "image_url", "image_url": {"url": to_data_url(sample_image(number))}}
    content = [image, {"type": "text", "text": f"Question {number}?"}]
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 12, "temperature": 0}
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)["choices"][0]["message"]["content"]


def total(server: Server, name: str) -> int:
    """A counter, all engines and layers together."""
    families = text_string_to_metric_families(server.text("/metrics"))
    return int(sum(s.value for family in families for s in family.samples if s.name == name))


def run(way: str, model: Path, folder: Path) -> tuple[list[str], int, int]:
    """Answers, images reduced and visual tokens kept of a server started that way."""
    flags, variables = WAYS[way].split(), {"VLLM_PLUGINS": "eos", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    if way == "one rank" or "nodes" in way:
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "0"
    if "nodes" not in way:
        with serve(model, [*FLAGS, *flags], folder / "log", variables) as server:
            return answers(server)
    flags += ["--master-port", str(free_port())]
    first = [*FLAGS, *flags, "--node-rank", "0"]
    with second_node(model, flags, folder, variables), serve(model, first, folder / "log", variables) as server:
        return answers(server)


def answers(server: Server) -> tuple[list[str], int, int]:
    """As :func:`run`, of a server that runs."""
    texts = [ask(server, i) for i in range(IMAGES)]
    return texts, total(server, "eos_images_total"), total(server, "eos_visual_tokens_kept_total")


def main(ways: list[str]) -> int:
    """Runs one rank, then each way, and compares."""
    kept = IMAGES * sum(Planner(profiles.load(PROFILE), block=BLOCK).counts())
    failed = False
    with tempfile.TemporaryDirectory(prefix="eos-parallel-") as name:
        folder = Path(name)
        # Four heads in the vision tower, which tensor parallel ranks split as well.
        model = write_tiny_model(folder / "model", vision_attention_heads=4)
        want: list[str] | None = None
        for way in ["one rank", *(w for w in ways if w != "one rank")]:
            got, *counts = run(way, model, folder)
            want = want or got
            failed |= got != want or counts != [IMAGES, kept]
            print(
                f"{way}: answers {'of one rank' if got == want else 'DIFFER'}, {counts[0]} images, {counts[1]} visual "
                f"tokens kept of {kept} planned ({WAYS[way] or 'no flags'})",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(WAYS)))
