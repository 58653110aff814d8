"""Alerts that really fire: breaks a replica of ``make up`` on purpose, under traffic, and mends it again.

``make drill``, or ``python deploy/local/drill.py`` (about a quarter of an hour, for the alerts' own delays are waited
for). Prints one line for each change; exit code 0 when the alerts fired for the broken replica, none for the other, and
all cleared.
"""

import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter

import stack

from eos_vllm.cluttervqa import is_right, make_sample
from eos_vllm.models.images import to_data_url

BROKEN = "127.0.0.1:8102"
SECONDS_BETWEEN_IMAGES = 2.0
START = time.monotonic()


class DrillError(RuntimeError):
    """An alert did not fire or clear in its time, or fired where it should not."""


def say(text: str) -> None:
    """One line, with seconds since the start."""
    print(f"{time.monotonic() - START:6.0f} s  {text}", flush=True)


class Traffic(threading.Thread):
    """New images, one every two seconds, each in a session of its own, so that the router spreads them."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.counts: Counter[str] = Counter()
        self.ended = threading.Event()

    def run(self) -> None:
        """Asks until ``ended``."""
        for number in itertools.count(int(time.time()) % 1_000_000):
            if self.ended.wait(SECONDS_BETWEEN_IMAGES):
                return
            self.counts[self._ask(number)] += 1

    def _ask(self, number: int) -> str:
        sample = make_sample("test", number, questions=1)
        question = sample.questions[0]
        image = {"type": "image_url", "image_url": {"url": to_data_url(sample.image)}}
        body = {
            "model": "embedded",
            "messages": [{"role": "user", "content": [image, {"type": "text", "text": question.text}]}],
            "max_tokens": 4,
            "temperature": 0,
        }
        headers = {"Content-Type": "application/json", "X-Session-ID": f"drill-{number}"}
        request = urllib.request.Request(f"{stack.ROUTER}/v1/chat/completions", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                answer = json.load(response)["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as e:
            return f"status {e.code}"
        except OSError as e:
            return f"no answer ({getattr(e, 'reason', e)})"
        return "right" if is_right(answer, question.answer) else "wrong"

    def take(self) -> str:
        """What became of the requests since the last call."""
        counts, self.counts = self.counts, Counter()
        return ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) or "none"


def alerts(state: str = "firing") -> set[tuple[str, str]]:
    """Names and instances of the alerts that Prometheus holds in that state."""
    with urllib.request.urlopen(f"{stack.PROMETHEUS}/api/v1/alerts", timeout=10) as response:
        found = json.load(response)["data"]["alerts"]
    return {(a["labels"]["alertname"], a["labels"].get("instance", "")) for a in found if a["state"] == state}


def images_reduced() -> dict[str, float]:
    """``eos_images_total`` as Prometheus has it now, by replica."""
    query = urllib.parse.urlencode({"query": 'sum by (instance) (eos_images_total{job="eos-vllm"})'})
    with urllib.request.urlopen(f"{stack.PROMETHEUS}/api/v1/query?{query}", timeout=10) as response:
        found = json.load(response)["data"]["result"]
    return {sample["metric"]["instance"]: float(sample["value"][1]) for sample in found}


def wait_for(alert: str, firing: bool, seconds: float) -> None:
    """Waits until the alert of the broken replica fires, or no longer does.

    Raises:
        DrillError: it does not in that time, or another replica's fires.
    """
    deadline, pending = time.monotonic() + seconds, False
    while ((alert, BROKEN) in alerts()) != firing:
        if others := {a for a in alerts() if a[0] == alert and a[1] != BROKEN}:
            raise DrillError(f"fires where it should not: {others}")
        if firing and not pending and (alert, BROKEN) in alerts("pending"):
            pending = True
            say(f"{alert} is pending for {BROKEN}")
        if time.monotonic() > deadline:
            raise DrillError(f"{alert} is {'not firing' if firing else 'still firing'} after {seconds:.0f} s")
        time.sleep(2)
    say(f"{alert} {'FIRES' if firing else 'is clear again'} for {BROKEN}; firing: {sorted(alerts())}")


def replace(program: str, by: str, traffic: Traffic) -> None:
    """Ends one program of the supervisor and starts another in its place."""
    say(f"stopping {program}, starting {by}")
    stack.supervisor("stop", program)
    stack.supervisor("start", by)
    say(f"requests until then: {traffic.take()}")


def ready() -> str:
    """What the readiness probe of the manifests says of replica 2."""
    variables = {**os.environ, "EOS_STATUS_URL": f"http://{BROKEN}/eos/status"}
    probe = [sys.executable, str(stack.HERE.parent / "kubernetes" / "base" / "ready.py")]
    done = subprocess.run(probe, env=variables, capture_output=True, text=True, check=False)
    return f"exit code {done.returncode} {done.stdout.strip()}".strip()[:300]


def call(method: str, *arguments: str) -> None:
    """Calls a method of replica 2's worker."""
    body = json.dumps({"method": method, "args": arguments}).encode()
    request = urllib.request.Request(f"http://{BROKEN}/collective_rpc", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30):
        pass


def break_the_proof(traffic: Traffic) -> None:
    """Fault 3: a layer of a running worker attends as vLLM's own, as another plugin's patch might make it."""
    if importlib.util.find_spec("eos_vllm.serving.endpoints") is None:
        say("fault 3 is left out: this version has no /eos/status")
        return
    sys.path.append(str(stack.HERE.parents[1] / "tests"))
    from support import broken_proof

    shutil.rmtree(stack.FOLDER / "plugins", ignore_errors=True)
    broken_proof.install(stack.FOLDER / "plugins")
    say("fault 3: one attention layer of replica 2's worker is put back to vLLM's own while it serves")
    replace("replica-2", "replica-2-breakable", traffic)
    stack.wait_until_up(stack.REPLICAS[1])
    say(f"readiness: {ready()}")
    call("eos_break", "attention")
    time.sleep(2)  # an answer of the last second is given again
    say(f"broken; readiness: {ready()}")
    wait_for("EosProofLost", True, 120)
    call("eos_mend")
    wait_for("EosProofLost", False, 120)
    say(f"mended; readiness: {ready()}")
    replace("replica-2-breakable", "replica-2", traffic)
    stack.wait_until_up(stack.REPLICAS[1])


def main() -> None:
    """The faults, one after the other.

    Raises:
        DrillError, StackError: what did not go as it should.
    """
    stack.wait_until_up(*stack.READY)
    traffic = Traffic()
    traffic.start()
    say("all replicas serve their profile; one new image every two seconds goes to the router")
    time.sleep(60)
    if firing := alerts():
        raise DrillError(f"firing before anything is broken: {firing}")
    say(f"nothing fires; images reduced: {images_reduced()}; requests: {traffic.take()}")

    say("fault 1: the plugin is not loaded (VLLM_PLUGINS=none); vLLM refuses --eos-profile, and ends")
    replace("replica-2", "replica-2-without-plugin", traffic)
    wait_for("EosReplicaDown", True, 240)
    log = (stack.FOLDER / "replica-2-without-plugin.log").read_text(encoding="utf-8", errors="replace")
    say("its log: " + [line for line in log.splitlines() if "--eos-profile" in line][-1].strip()[-120:])
    replace("replica-2-without-plugin", "replica-2", traffic)
    stack.wait_until_up(stack.REPLICAS[1])
    wait_for("EosReplicaDown", False, 60)

    say("fault 2: replica 2 without its profile; it answers, and reduces nothing")
    replace("replica-2", "replica-2-without-profile", traffic)
    stack.wait_until_up(stack.REPLICAS[1])
    wait_for("EosNotReducing", True, 900)
    say(f"images reduced: {images_reduced()}; requests since the fault: {traffic.take()}")
    replace("replica-2-without-profile", "replica-2", traffic)
    stack.wait_until_up(stack.REPLICAS[1])
    wait_for("EosNotReducing", False, 120)
    break_the_proof(traffic)
    time.sleep(30)
    say(f"images reduced: {images_reduced()}; requests: {traffic.take()}; firing: {sorted(alerts())}")
    # Four starts of one replica within half an hour are more than that alert takes for well, and rightly so.
    if rest := alerts() - {("EosReplicaRestarting", BROKEN)}:
        raise DrillError(f"still firing: {rest}")
    traffic.ended.set()
    say("every alert fired for the broken replica alone, and cleared")


if __name__ == "__main__":
    try:
        main()
    except (DrillError, stack.StackError) as e:
        say(f"FAILED: {e}")
        sys.exit(1)
