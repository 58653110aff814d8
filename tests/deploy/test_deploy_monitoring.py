"""Alerts by promtool's unit tests, the operator's copy of them, and the dashboard's form."""

import json
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploy_files import DEPLOY, ROOT, checked, load, promtool

RULES = load("monitoring/alerts.yaml")["groups"]
ALERTS = [rule for group in RULES for rule in group["rules"]]
DASHBOARD = json.loads((DEPLOY / "monitoring" / "dashboard.json").read_text(encoding="utf-8"))


def test_alerts_fire_when_they_should() -> None:
    checked(promtool(), "check", "rules", DEPLOY / "monitoring" / "alerts.yaml")
    checked(promtool(), "test", "rules", DEPLOY / "monitoring" / "alerts_test.yaml")


@pytest.mark.parametrize(
    ("wrong", "instead"),
    [
        (r"(increase\(eos_images_total[^\n]+) > 0\n", r"\1 >= 0\n"),
        (r"\n            - increase\(vllm:mm_cache_hits_total[^\n]+", ""),
        (r"> 20\n", "> -1\n"),
        (r"> 0\.95", "> 0.99"),
    ],
)
def test_the_unit_tests_find_a_wrong_rule(wrong: str, instead: str, tmp_path: Path) -> None:
    text = (DEPLOY / "monitoring" / "alerts.yaml").read_text(encoding="utf-8")
    broken, count = re.subn(wrong, instead, text, count=1)
    assert count == 1
    (tmp_path / "alerts.yaml").write_text(broken, encoding="utf-8")
    shutil.copy(DEPLOY / "monitoring" / "alerts_test.yaml", tmp_path)
    checked(promtool(), "check", "rules", tmp_path / "alerts.yaml")
    with pytest.raises(AssertionError, match="FAILED"):
        checked(promtool(), "test", "rules", tmp_path / "alerts_test.yaml")


def test_every_alert_has_a_unit_test_that_fires() -> None:
    tests = load("monitoring/alerts_test.yaml")["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert fired == {alert["alert"] for alert in ALERTS}


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_every_alert_says_what_to_do(alert: dict[str, Any]) -> None:
    assert set(alert["annotations"]) == {"summary", "description", "runbook"}
    assert alert["labels"]["severity"] in ("critical", "warning")
    file, _, anchor = alert["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^#+ (.+)$", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    assert anchor == alert["alert"].lower()
    assert alert["alert"] in headings


def test_the_operator_s_rules_are_the_same() -> None:
    written = yaml.safe_load((DEPLOY / "monitoring" / "prometheusrule.yaml").read_text(encoding="utf-8"))
    assert written == runpy.run_path(str(DEPLOY / "monitoring" / "prometheusrule.py"))["prometheus_rule"]()
    assert written["spec"]["groups"] == RULES


@pytest.mark.parametrize("file", ["compose/prometheus.yml", "local/prometheus.yml"])
def test_prometheus_takes_its_configuration(file: str, tmp_path: Path) -> None:
    shutil.copy(DEPLOY / "monitoring" / "alerts.yaml", tmp_path)  # where compose mounts it
    config = (DEPLOY / file).read_text(encoding="utf-8").replace("../monitoring/", "")
    (tmp_path / "prometheus.yml").write_text(config, encoding="utf-8")
    checked(promtool(), "check", "config", tmp_path / "prometheus.yml")
    # The job by which alerts, dashboard and autoscaling find the servers.
    assert "eos-vllm" in [job["job_name"] for job in load(file)["scrape_configs"]]
    rules = " ".join(alert["expr"] for alert in ALERTS)
    assert set(re.findall(r'job="([^"]+)"', rules)) == {"eos-vllm"}


def test_the_dashboard_s_form() -> None:
    panels = DASHBOARD["panels"]
    assert len({p["id"] for p in panels}) == len(panels)
    variables = {v["name"] for v in DASHBOARD["templating"]["list"]}
    for p in panels:
        spot = p["gridPos"]
        assert spot["x"] + spot["w"] <= 24
        for target in p.get("targets", []):
            assert target["datasource"]["uid"] == "${datasource}"
            used = set(re.findall(r"\$(\w+)", target["expr"]))
            assert used <= variables | {"__rate_interval"}
    taken = [(p["gridPos"]["x"] + i, p["gridPos"]["y"]) for p in panels for i in range(p["gridPos"]["w"])]
    assert len(set(taken)) == len(taken)
    assert any(p.get("targets") for p in panels)
