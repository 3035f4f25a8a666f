"""Alarms and the Grafana dashboard ask for figures that there are, and every alarm has its remedy."""

import json
import re
from datetime import UTC, datetime
from pathlib import Path

import yaml

from agent.measures import AgentMeasures
from natstls.client import SafeClient
from orchestrator.measures import families as orchestrator_families
from resplit.gateway.measures import Measures
from schemas.audit import AuditKind
from schemas.capacity import Capacity, Provider
from schemas.control import StatusReply

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "monitoring"
SUFFIXES = ("", "_total", "_bucket", "_count", "_sum")
NAME = re.compile(r"\b(?:resplit|gen_ai)_[a-z_]+\b")
LABELS = re.compile(r"\{[^}]*\}|by \([^)]*\)")


def known() -> set[str]:
    """Names of samples that processes have."""
    capacity = Capacity(
        node="n0", boot="b", sequence=0, issued_at=datetime.now(UTC), version="0", threads=1,
        provider=Provider(name="cpu", device="x", flops_per_s=1, bytes_per_s=1), memory_total_bytes=1,
        memory_free_bytes=1, disk_free_bytes=1, load=0,
    )  # fmt: skip
    events = {AuditKind.DECISION: 1}
    agents = AgentMeasures()
    agents.said(capacity, events, SafeClient().troubles, journal_waits_s=0.0)
    names = {family.name for family in orchestrator_families(StatusReply(term=1, nodes=(), deployments=()), events)}
    for registry in (agents.registry, Measures().registry):
        names |= {family.name for family in registry.collect()}
    return {name + suffix for name in names for suffix in SUFFIXES}


def asked(expression: str) -> set[str]:
    return set(NAME.findall(LABELS.sub("", expression)))


def rules() -> list[dict[str, str]]:
    found: list[dict[str, str]] = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"][0]["rules"]
    return found


def test_every_figure_that_is_asked_for_is_there() -> None:
    panels = json.loads((FOLDER / "grafana.json").read_text())["panels"]
    expressions = [rule["expr"] for rule in rules()]
    expressions += [target["expr"] for panel in panels for target in panel["targets"]]
    assert len(expressions) > 30
    there = known()
    for expression in expressions:
        assert asked(expression), expression
        assert asked(expression) <= there, expression


def test_every_alarm_has_its_remedy_and_every_remedy_its_alarm() -> None:
    section = (ROOT / "docs" / "operating.md").read_text().split("### Alarms")[1].split("\n### ")[0]
    described = re.findall(r"^\| `(Resplit\w+)`", section, re.MULTILINE)
    assert described == [rule["alert"] for rule in rules()]


def test_kinds_of_events_that_alarms_name_exist() -> None:
    audited, met = {kind.value for kind in AuditKind}, set(SafeClient().troubles)
    for rule in rules():
        kinds = met if "resplit_bus_troubles" in rule["expr"] else audited
        for listed in re.findall(r'kind=~"([^"]+)"', rule["expr"]):
            assert set(listed.split("|")) <= kinds
