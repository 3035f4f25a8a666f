"""The documents say what the code says: names, codes, commands, links and examples."""

import ast
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from bus.natsconf import SERVER_FILE
from bus.together import CLUSTER
from resplit.cli import app
from schemas import envelope, subjects
from schemas.audit import AuditKind
from schemas.base import DeploymentName, Digest, LifeId, NodeId, RequestId, SiteId, Value
from schemas.codec import decode, encode
from schemas.control import DeployRequest, DrainRequest, PlaceRequest, TrustRequest
from schemas.envelope import pae
from schemas.errors import ErrorCode
from schemas.manifest import DTYPE_BYTES
from schemas.plan import PlanPhase, ReceiptStatus
from schemas.request import EmbeddingRequest, TensorRequest, TextRequest, read_request
from schemas.tensor import OIP_TO_NUMPY
from tests.conftest import nats_server_binary

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")))
PROTOCOL = (ROOT / "docs" / "protocol.md").read_text()
CODE = "`{}`"
CONTROL: dict[str, type[Value]] = {
    "control.deploy": DeployRequest,
    "control.place": PlaceRequest,
    "control.drain": DrainRequest,
    "control.trust": TrustRequest,
}


def test_every_error_code_is_in_the_protocol() -> None:
    assert [code for code in ErrorCode if f"| `{code}` |" not in PROTOCOL] == []


def test_every_subject_stream_bucket_and_queue_is_in_the_protocol() -> None:
    node, digest = NodeId("<node>"), Digest("<sha256>")
    deployment, request = DeploymentName("<deployment>"), RequestId("<request>")
    named = {
        subjects.capacity(node),
        subjects.infer(deployment),
        subjects.cancel(request),
        subjects.plan(deployment),
        subjects.receipt(node),
        subjects.staging(node),
        subjects.standby(NodeId("<orchestrator>")),
        subjects.LEADER,
        subjects.BEACON,
        subjects.ROSTER,
        subjects.ROSTER_NEWEST,
        subjects.activation(node),
        subjects.audit(NodeId("<source>"), "<kind>"),
        subjects.blob(digest),
        subjects.blob_of_all(digest),
        subjects.journal(deployment, LifeId("<life>")),
        subjects.control("<verb>"),
        subjects.at_edge(SiteId("<site>"), f"{subjects.ROOT}."),
        subjects.ROSTER_OF_HUB,
    }
    named |= {value for name, value in vars(subjects).items() if re.match(r"(ALL|STREAM|BUCKET)_|.*_QUEUE$", name)}
    functions = {name for name, value in vars(subjects).items() if callable(value) and name.islower()}
    assert len(functions) == 14, f"a subject is new here: {functions}"
    assert [subject for subject in sorted(named) if CODE.format(subject) not in PROTOCOL] == []


def test_every_payload_type_phase_status_and_datatype_is_in_the_protocol() -> None:
    kinds = [value for name, value in vars(envelope).items() if name.endswith("_TYPE")]
    words = [*kinds, *PlanPhase, *ReceiptStatus, *OIP_TO_NUMPY]
    assert len(kinds) == 7
    assert [word for word in words if CODE.format(word) not in PROTOCOL] == []
    assert set(OIP_TO_NUMPY.values()) <= set(DTYPE_BYTES)


def test_every_field_of_a_request_is_in_the_protocol() -> None:
    fields = {name for kind in (TextRequest, EmbeddingRequest, TensorRequest) for name in kind.model_fields}
    assert [
        field for field in sorted(fields) if CODE.format(field) not in PROTOCOL and f'"{field}"' not in PROTOCOL
    ] == []


def test_the_audit_kinds_named_are_those_that_something_records() -> None:
    paragraph = PROTOCOL.split("Kinds published today:")[1].split("\n\n")[0]
    sources = "\n".join(
        path.read_text() for folder in ("bus", "agent", "orchestrator") for path in (ROOT / folder).glob("*.py")
    )
    assert set(re.findall(r"`(\w+)`", paragraph)) == {kind for kind in AuditKind if f"AuditKind.{kind.name}" in sources}


def test_the_example_of_the_signed_bytes_is_right() -> None:
    signed = pae("http://example.com/HelloWorld", b"hello world").decode()
    assert CODE.format(signed) in PROTOCOL


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        found = page if not path else (page.parent / path).resolve()
        if found.name == "benchmarks.md":
            continue  # written from measurements, with the rest of them
        assert found.exists(), f"{page.name}: {target}"
        if heading:
            anchors = [_anchor(line) for line in found.read_text().splitlines() if line.startswith("#")]
            assert heading in anchors, f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_shown_is_one(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESPLIT_KEYS", "keys")  # as the pages say once, above the commands
    for words in _shown_in_blocks(page):
        _parse(words)
    for words in _shown_inline(page):
        _walk(words)


def test_commands_that_are_none_are_found() -> None:
    with pytest.raises(Exception, match=r"[Nn]o such option"):
        _parse(["deploy", "adder", "--nodes", "3"])
    with pytest.raises(AssertionError):
        _walk(["deploy", "--nodes"])
    with pytest.raises(AssertionError):
        _walk(["undeploy"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_request_shown_for_the_nats_command_is_valid(page: Path) -> None:
    for subject, body in re.findall(r"nats req resplit\.v1\.([\w.-]+) '([^']*)'", page.read_text()):
        if subject.startswith("infer."):
            read_request(json.loads(body))
        elif subject in CONTROL:
            assert encode(decode(CONTROL[subject], body.encode(), "example"))
        else:
            assert (subject, body) == ("control.status", "")


def test_the_fifteen_lines_are_fifteen_and_the_ones_in_the_protocol() -> None:
    source = (ROOT / "docs" / "examples" / "fifteen_lines.py").read_text()
    lines = [line for line in source.splitlines()[1:] if line.strip() and not line.startswith("import ")]
    assert len(lines) <= 15
    imported = {
        alias.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import) for alias in node.names
    }
    assert imported == {"asyncio", "json", "ssl", "sys", "nats"}
    body = [line.removeprefix("    ") for line in lines if line.startswith("    ")]
    assert "\n".join(body) in PROTOCOL


def test_the_server_takes_the_configuration_of_a_cluster(members: Path) -> None:
    command, there = [nats_server_binary(), "-t", "-c", SERVER_FILE], members / CLUSTER
    checked = subprocess.run(command, cwd=there, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


UNITS = ROOT / "deploy" / "systemd"


@pytest.mark.parametrize("role", ["agent", "orchestrator", "gateway"])
def test_the_units_start_commands_that_exist_and_their_examples_are_right(role: str) -> None:
    [unit] = UNITS.glob(f"resplit-{role}*.service")
    [started] = re.findall(r"^ExecStart=/opt/resplit/bin/resplit (.*)$", unit.read_text(), re.MULTILINE)
    command, *words = started.split()
    assert command == role
    [variable] = [word for word in words if word.startswith("$RESPLIT_")]
    [options] = re.findall(rf"^{variable[1:]}=(.*)$", (UNITS / f"{role}.env.example").read_text(), re.M)
    _parse([role, *(["n1"] if "%i" in words else []), "--keys", "k", *options.split()])


def _anchor(line: str) -> str:
    return re.sub(r"[^\w -]", "", line.lstrip("#").strip().lower()).replace(" ", "-")


def _shown_in_blocks(page: Path) -> Iterator[list[str]]:
    """The arguments of every command line in a shell block."""
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if found := re.match(r"(?:sudo (?:-u resplit )?)?(?:/opt/resplit/bin/)?resplit (.*)", line):
                words = shlex.split(found[1], comments=True)
                yield words[: words.index(">")] if ">" in words else words


def _shown_inline(page: Path) -> Iterator[list[str]]:
    for text in re.findall(r"`resplit ([a-z][^`\n]*)`", page.read_text()):
        yield shlex.split(text)


def _walk(words: list[str]) -> tuple[Any, list[str]]:
    """The command that `words` name and what follows; every option among that is one of the command's."""
    command: Any = typer.main.get_command(app)
    rest = list(words)
    while hasattr(command, "commands"):
        if not rest:
            break
        name = rest.pop(0)
        assert name in command.commands, f"resplit {' '.join(words)}: there is no {name!r}"
        command = command.commands[name]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    unknown = [word for word in rest if re.match(r"-{1,2}[a-z]", word) and word not in known]
    assert unknown == [], f"resplit {' '.join(words)}"
    return command, rest


def _parse(words: list[str]) -> None:
    """Parse a whole command line without running it; raises what the command line raises."""
    command, rest = typer.main.get_command(app), list(words)
    while hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]
    command.make_context("resplit", rest)
