"""Writes prometheusrule.yaml, the rules of alerts.yaml as Prometheus' operator takes them (make deploy-rules)."""

from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
HEADER = "# Written from alerts.yaml by prometheusrule.py (make deploy-rules); a test holds them equal.\n"


def prometheus_rule() -> dict[str, Any]:
    """The object, with the groups of alerts.yaml."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "eos-vllm", "labels": {"app.kubernetes.io/name": "eos-vllm"}},
        "spec": yaml.safe_load((HERE / "alerts.yaml").read_text(encoding="utf-8")),
    }


class _Dumper(yaml.SafeDumper):
    """Expressions of several lines stay so."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)

if __name__ == "__main__":
    text = yaml.dump(prometheus_rule(), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
    (HERE / "prometheusrule.yaml").write_text(HEADER + text, encoding="utf-8")
