"""Every subject is one that its stream or its watcher hears, and no name can reach another's."""

import contextlib
import fnmatch
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from schemas import subjects
from schemas.base import (
    DeploymentId,
    DeploymentName,
    Digest,
    LifeId,
    LifeName,
    NodeId,
    NodeName,
    RequestId,
    RequestName,
    Sha256,
)

NODE = NodeId("n0")
ALL = {
    subjects.capacity(NODE): subjects.ALL_CAPACITY,
    subjects.plan(DeploymentName("adder")): subjects.ALL_PLANS,
    subjects.receipt(NODE): subjects.ALL_RECEIPTS,
    subjects.audit(NODE, "node_lost"): subjects.ALL_AUDIT,
    subjects.cancel(RequestId("r")): subjects.ALL_CANCEL,
    subjects.journal(DeploymentName("adder"), LifeId("n0-1f2e")): subjects.ALL_JOURNAL,
}


@pytest.mark.parametrize(("subject", "wildcard"), ALL.items())
def test_a_wildcard_hears_its_subjects_and_no_others(subject: str, wildcard: str) -> None:
    heard = [one for one in ALL if fnmatch.fnmatch(one, wildcard.replace(">", "*"))]
    assert heard == [subject]


def test_every_subject_stands_under_the_versioned_root() -> None:
    others = [subjects.infer(DeploymentName("a")), subjects.blob(Digest("a" * 64)), subjects.activation(NODE)]
    assert all(one.startswith("resplit.v1.") for one in [*ALL, *others, subjects.control("deploy")])


@pytest.mark.parametrize("kind", [NodeName, DeploymentId])
def test_a_name_is_one_token_of_a_subject(kind: Any) -> None:
    good = ["a", "n0", "pi4-kitchen", "a" * 63, "0_1"]
    bad = ["", "a.b", "*", ">", "a b", "A", "-a", "a\n", "a" * 64, "é"]
    assert accepted(kind, good + bad) == good


def test_a_life_is_one_token_with_room_for_a_node_and_a_number() -> None:
    longest = "a" * 63 + "-" + "0" * 32
    assert accepted(LifeName, ["n0-1f2e", longest, "", "n0.1", "n0-*", "N0", longest + "0"]) == ["n0-1f2e", longest]


def test_request_ids_and_digests_are_one_token_too() -> None:
    assert accepted(RequestName, ["Chat-12_a", "", "a.b", "a*", ">", "a\n", "a" * 65]) == ["Chat-12_a"]
    assert accepted(Sha256, ["0" * 64, "", "0" * 63, "A" * 64, "0" * 65, "0" * 64 + "\n"]) == ["0" * 64]


def accepted(kind: Any, names: list[str]) -> list[str]:
    """Those of `names` that are values of the type."""
    found = []
    for name in names:
        with contextlib.suppress(ValidationError):
            found.append(TypeAdapter(kind).validate_python(name))
    return found
