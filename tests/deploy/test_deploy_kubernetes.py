"""Manifests: rendered by kustomize, valid by the schemas of Kubernetes and of the operators, and consistent."""

import http.server
import json
import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploy_files import DEPLOY, KUSTOMIZATIONS, OVERLAYS, container, load, one, rendered

from eos_vllm.core.profile import MAX_BYTES

CONFIG_MAP_BYTES = 1 << 20
CUSTOM = ("ScaledObject", "PodMonitor", "PrometheusRule", "LLMInferenceService")


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
@pytest.mark.parametrize("version", ["1.29", "1.34"])
def test_valid_by_the_schemas_of_kubernetes(name: str, version: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    objects = [o for o in rendered(name) if o["kind"] not in CUSTOM]
    assert objects
    for o in objects:
        kubernetes_validate.validate(o, version, strict=True)


def test_a_misspelt_field_is_found() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    deployment = one(rendered("gpu"), "Deployment")
    deployment["spec"]["template"]["spec"]["terminationGracePeriod"] = 120
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, "1.34", strict=True)


@pytest.mark.parametrize(
    ("name", "kind"), [("gpu", "ScaledObject"), ("monitoring", "PodMonitor"), ("monitoring", "PrometheusRule")]
)
def test_valid_by_the_operators_models(name: str, kind: str) -> None:
    """Those models drop fields that they don't know: whatever comes back changed was no field of the operator's."""
    module = {"ScaledObject": "keda.v1alpha1"}.get(kind, "prometheus_operator.v1")
    models = pytest.importorskip(f"cloudcoil.models.{module}", reason="cloudcoil's models are not installed")
    given = one(rendered(name), kind)
    parsed = getattr(models, kind).model_validate(given)
    assert parsed.model_dump(by_alias=True, exclude_unset=True, mode="json") == given


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_restricted(overlay: str) -> None:
    """By the pod security standard "restricted", and read-only on top."""
    pod = one(rendered(overlay), "Deployment")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsGroup"]) == (2000, 0)
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not pod["automountServiceAccountToken"]
    for c in pod["containers"]:
        assert not c["securityContext"]["allowPrivilegeEscalation"]
        assert c["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert c["securityContext"]["readOnlyRootFilesystem"]
        assert {m["mountPath"] for m in c["volumeMounts"] if not m.get("readOnly")} == {"/cache", "/tmp", "/dev/shm"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_is_mounted_is_there(overlay: str) -> None:
    objects = rendered(overlay)
    pod = one(objects, "Deployment")["spec"]["template"]["spec"]
    names = {(o["kind"], o["metadata"]["name"]) for o in objects}
    for volume in pod["volumes"]:
        if "configMap" in volume:
            assert ("ConfigMap", volume["configMap"]["name"]) in names
        if "persistentVolumeClaim" in volume:
            assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in names
    assert [m["name"] for m in container(objects)["volumeMounts"]] == [v["name"] for v in pod["volumes"]]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_selectors_find_the_pods(overlay: str) -> None:
    objects = [*rendered(overlay), *rendered("monitoring")]
    labels = one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"].items()
    for selector in (
        one(objects, "Deployment")["spec"]["selector"]["matchLabels"],
        one(objects, "Service")["spec"]["selector"],
        one(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        one(objects, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        one(objects, "PodMonitor")["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels
    job = one(objects, "PodMonitor")["spec"]["jobLabel"]
    assert dict(labels)[job] == "eos-vllm"


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_config_maps_fit(name: str) -> None:
    """Kubernetes takes 1 MiB for all of one; a profile may be as large, and would then not fit."""
    for config_map in (o for o in rendered(name) if o["kind"] == "ConfigMap"):
        assert len(json.dumps(config_map)) < CONFIG_MAP_BYTES // 2
    assert MAX_BYTES <= CONFIG_MAP_BYTES


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_drain_fits_into_the_grace_period(overlay: str) -> None:
    pod = one(rendered(overlay), "Deployment")["spec"]["template"]["spec"]
    server = pod["containers"][0]
    program, seconds = server["lifecycle"]["preStop"]["exec"]["command"]
    (drain,) = (int(a.partition("=")[2]) for a in server["args"] if a.startswith("--shutdown-timeout="))
    assert program == "sleep"
    assert int(seconds) + drain < pod["terminationGracePeriodSeconds"]


def test_the_probe_ends_before_it_is_ended() -> None:
    """So that its line says what was wrong, instead of the kubelet's "timed out"."""
    script = runpy.run_path(str(DEPLOY / "kubernetes" / "base" / "ready.py"))
    assert script["SECONDS"] < container(rendered("gpu"))["readinessProbe"]["timeoutSeconds"]


@pytest.mark.parametrize("overlay", ["gpu", "gpu-tp2"])
def test_autoscaling_owns_the_number_of_replicas(overlay: str) -> None:
    objects = rendered(overlay)
    deployment, scaled = one(objects, "Deployment"), one(objects, "ScaledObject")["spec"]
    assert "replicas" not in deployment["spec"]
    assert scaled["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert scaled["minReplicaCount"] <= scaled["fallback"]["replicas"] <= scaled["maxReplicaCount"]


@pytest.mark.parametrize(("overlay", "gpus"), [("gpu", "1"), ("gpu-tp2", "2")])
def test_gpus(overlay: str, gpus: str) -> None:
    resources = container(rendered(overlay))["resources"]
    assert {resources[kind]["nvidia.com/gpu"] for kind in ("requests", "limits")} == {gpus}


def test_the_demo_reaches_nothing() -> None:
    policy = one(rendered("cpu-demo"), "NetworkPolicy")["spec"]
    assert policy["egress"] == []
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}


@pytest.mark.parametrize("overlay", ["gpu", "gpu-tp2"])
def test_no_server_reaches_private_addresses(overlay: str) -> None:
    """An image's URL comes from a client: the cloud's metadata service must not be among what it can name."""
    blocks = [
        to["ipBlock"]
        for rule in one(rendered(overlay), "NetworkPolicy")["spec"]["egress"]
        for to in rule["to"]
        if "ipBlock" in to
    ]
    assert [b["cidr"] for b in blocks] == ["0.0.0.0/0"]
    assert {"10.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16"} <= set(blocks[0]["except"])


@contextmanager
def status(code: int, body: bytes) -> Iterator[tuple[str, list[str | None]]]:
    """A server that answers so on /eos/status: its address, and the Authorization headers it was sent."""
    seen: list[str | None] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers["Authorization"])
            self.send_response(code if self.path == "/eos/status" else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/eos/status", seen
    finally:
        server.shutdown()
        server.server_close()


def probe(url: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the readiness probe as the manifest does, with the system's Python."""
    command = container(rendered("cpu-demo"))["readinessProbe"]["exec"]["command"]
    assert command == ["python3", "/etc/eos-probe/ready.py"]
    environment = {"PATH": os.environ["PATH"], "EOS_STATUS_URL": url, "http_proxy": "http://127.0.0.1:9", **variables}
    script = DEPLOY / "kubernetes" / "base" / Path(command[1]).name
    return subprocess.run(
        [sys.executable, "-I", script], env=environment, capture_output=True, text=True, check=False, timeout=30
    )


def test_ready_where_all_workers_are_proven() -> None:
    with status(200, b"{}") as (url, seen):
        assert probe(url, VLLM_API_KEY="secret").returncode == 0
        assert probe(url).returncode == 0
    assert seen == ["Bearer secret", None]


@pytest.mark.parametrize(("code", "body"), [(503, b'{"worker 1":\n "lost"}'), (401, b"{}"), (404, b"")])
def test_not_ready_where_one_is_not(code: int, body: bytes) -> None:
    with status(code, body) as (url, _):
        done = probe(url, VLLM_API_KEY="secret")
    assert done.returncode == 1
    assert done.stdout == f"{url}: status {code}: {' '.join(body.decode().split())}\n"
    assert "secret" not in done.stdout + done.stderr


def test_not_ready_where_nobody_answers() -> None:
    with status(200, b"") as (url, _):
        pass
    done = probe(url)
    assert done.returncode == 1
    assert "no answer" in done.stdout
    assert done.stderr == ""


def undeclared(schema: dict[str, Any], value: Any, path: str = "") -> list[str]:
    """Keys that a schema does not know; objects of Kubernetes, which charts pass on, are left out."""
    if isinstance(value, dict) and schema.get("properties") and not path.endswith("ontainerSecurityContext"):
        known = schema["properties"]
        wrong = [f"{path}/{key}" for key in value if key not in known]
        return wrong + [w for k, v in value.items() if k in known for w in undeclared(known[k], v, f"{path}/{k}")]
    if isinstance(value, list) and "items" in schema:
        return [w for i, v in enumerate(value) for w in undeclared(schema["items"], v, f"{path}/{i}")]
    return []


def given(variable: str, what: str) -> Path:
    """A file that is no part of this project, where the environment names it."""
    if variable not in os.environ:
        pytest.skip(f"set {variable} to {what}")
    return Path(os.environ[variable])


def test_values_fit_vllm_s_chart() -> None:
    import jsonschema

    file = given("PRODUCTION_STACK_SCHEMA", "helm/values.schema.json of vllm-project/production-stack")
    schema, values = json.loads(file.read_text(encoding="utf-8")), load("production-stack/values.yaml")
    jsonschema.Draft202012Validator(schema).validate(values)
    assert undeclared(schema, values) == []


def test_the_llm_inference_service_fits_kserve() -> None:
    import jsonschema

    file = given("KSERVE_CRD", "config/crd/full/llmisvc/serving.kserve.io_llminferenceservices.yaml of kserve/kserve")
    crd, service = yaml.safe_load(file.read_text(encoding="utf-8")), load("kserve/llminferenceservice.yaml")
    (schema,) = (
        v["schema"]["openAPIV3Schema"]
        for v in crd["spec"]["versions"]
        if f"serving.kserve.io/{v['name']}" == service["apiVersion"]
    )
    jsonschema.Draft202012Validator(schema).validate(service)
    assert undeclared(schema, service) == []
