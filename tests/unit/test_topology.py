"""A split as a file: what `show` prints is what `lock` reads, and what is wrong is named."""

import json
from pathlib import Path

import pytest

from resplit.topology import FILE_BYTES_MAX, Topology, as_toml, current_topology, in_file, read_topology
from schemas.base import DeploymentName, Digest, NodeId
from schemas.control import DeploymentStatus
from schemas.deployment import Settings, Stage
from schemas.errors import ErrorCode, ResplitError
from schemas.plan import Plan, Route

CHAT, MODEL = DeploymentName("chat"), Digest("1" * 64)
STAGES = tuple(Stage(node=NodeId(node), first=2 * i, last=2 * i + 1) for i, node in enumerate(("n0", "n1", "n0")))


def shown(current: Plan | None) -> DeploymentStatus:
    return DeploymentStatus(
        name=CHAT,
        state="waiting" if current is None else "serving",
        current=current,
        draining=(),
        ready=(),
        applied=(),
        reason="the deployment has no plan yet" if current is None else None,
        revision=1,
    )


def plan() -> Plan:
    route = Route(index=0, source=STAGES[0].node, stages=STAGES, max_sequences=1)
    return Plan(deployment=CHAT, model=MODEL, epoch=3, block_count=6, settings=Settings(), routes=(route,), reason="-")


def test_what_is_shown_is_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "f.toml").write_text(as_toml(shown(plan())))
    (tmp_path / "f.json").write_text(current_topology(shown(plan())).model_dump_json())
    assert read_topology(tmp_path / "f.toml") == Topology(deployment=CHAT, stages=STAGES)
    assert read_topology(tmp_path / "f.json") == Topology(deployment=CHAT, stages=STAGES)


def test_several_routes_are_shown_and_read_alike(tmp_path: Path) -> None:
    other = (Stage(node=NodeId("n2"), first=0, last=5),)
    routes = tuple(
        Route(index=i, source=chain[0].node, stages=chain, max_sequences=1) for i, chain in enumerate((STAGES, other))
    )
    two = plan().model_copy(update={"routes": routes})
    (tmp_path / "f.toml").write_text(as_toml(shown(two)))
    (tmp_path / "f.json").write_text(current_topology(shown(two)).model_dump_json())
    for name in ("f.toml", "f.json"):
        assert read_topology(tmp_path / name).placement == (STAGES, other)
    (tmp_path / "none.toml").write_text('deployment = "chat"')
    with pytest.raises(ResplitError, match="give either stages, or routes that have stages"):
        read_topology(tmp_path / "none.toml")


def test_without_a_plan_there_is_nothing_to_show() -> None:
    with pytest.raises(ResplitError, match="no split now, it is waiting: the deployment has no plan yet"):
        as_toml(shown(None))


GOOD = {"deployment": "chat", "stages": [{"node": "n0", "first": 0, "last": 3}]}


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"deployment": "Chat!"}, "deployment", "'Chat!'"),
        ({"stages": []}, "stages", "at least 1"),
        ({"stages": [{"node": "n0", "first": 3, "last": 1}]}, "stages.0", "from block 3 to block 1"),
        ({"stages": [{"node": "n0", "first": -1, "last": 1}]}, "stages.0.first", "got -1"),
        ({"stages": [{"node": "n0", "first": 0}]}, "stages.0.last", "required"),
        ({"stages": [{"node": "N 0", "first": 0, "last": 1}]}, "stages.0.node", "'N 0'"),
        ({"speed": "fast"}, "speed", "'fast'"),
    ],
)
def test_a_wrong_value_is_named_with_its_file_and_field(
    tmp_path: Path, change: dict[str, object], field: str, words: str
) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(ResplitError) as caught:
        read_topology(path)
    assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID_REQUEST, field)
    assert words in caught.value.message
    assert str(path) in caught.value.message


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("missing.toml", None, "cannot read"),
        ("f.toml", b"deployment = ", "not valid TOML"),
        ("f.json", b"{", "not valid JSON"),
        ("f.json", b"[" * 100_000, "not valid JSON"),
        ("f.toml", b"\xff\xfe", "not valid TOML"),
        ("f.json", b"[]", "f.json"),
        ("f.toml", b" " * (FILE_BYTES_MAX + 1), "no topology"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, name: str, data: bytes | None, words: str) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ResplitError, match=words) as caught:
        read_topology(tmp_path / name)
    assert caught.value.code is ErrorCode.INVALID_REQUEST


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("placement.1.node", "stages.1.node"),
        ("placement", "stages"),
        ("placement.1", "routes.1"),
        ("placement.1.0.node", "routes.1.stages.0.node"),
        ("name", "deployment"),
        (None, None),
    ],
)
def test_a_refusal_is_told_in_the_words_of_the_file(field: str | None, expected: str | None) -> None:
    told = in_file(ResplitError(ErrorCode.INFEASIBLE, "no", field), Path("f.toml"))
    assert (told.code, told.message, told.field) == (ErrorCode.INFEASIBLE, "f.toml: no", expected)
