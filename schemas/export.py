"""JSON Schemas of every value that travels or is stored as JSON: `python -m schemas.export docs/schemas`.

The files are made from the types and from nothing else, so equal types give equal bytes;
`tests/unit/test_schemas_export.py` fails while a file is not what its type says.
"""

import json
import re
import sys
from pathlib import Path

from pydantic import BaseModel

from schemas.audit import AuditEvent
from schemas.beacon import Beacon
from schemas.capacity import Capacity
from schemas.control import (
    DeployReply,
    DeployRequest,
    DrainReply,
    DrainRequest,
    ExplainReply,
    ExplainRequest,
    PlaceRequest,
    PlanReply,
    PlanRequest,
    RemoveReply,
    RemoveRequest,
    StatusReply,
    TrustReply,
    TrustRequest,
    UndrainReply,
    UndrainRequest,
    WhereReply,
    WhereRequest,
)
from schemas.deployment import Deployment, NodeWish
from schemas.heartbeat import Heartbeat, Hosting
from schemas.leader import Claim, Leadership
from schemas.manifest import Manifest
from schemas.plan import Plan, PlanEvent, Receipt
from schemas.request import (
    AcceptedReply,
    CompletionReply,
    EmbeddingReply,
    EmbeddingRequest,
    ErrorReply,
    TensorReply,
    TensorRequest,
    TextRequest,
    TokenReply,
)
from schemas.roster import RootKeys, Roster
from schemas.section import EventSection, SealedEvent
from schemas.staging import Staging

DIALECT = "https://json-schema.org/draft/2020-12/schema"
EXPORTED: tuple[type[BaseModel], ...] = (
    AcceptedReply,
    AuditEvent,
    Beacon,
    Capacity,
    Claim,
    CompletionReply,
    DeployReply,
    DeployRequest,
    Deployment,
    DrainReply,
    DrainRequest,
    EmbeddingReply,
    EmbeddingRequest,
    ErrorReply,
    EventSection,
    Heartbeat,
    Hosting,
    ExplainReply,
    ExplainRequest,
    Leadership,
    RootKeys,
    Roster,
    Manifest,
    NodeWish,
    PlaceRequest,
    Plan,
    PlanEvent,
    PlanReply,
    PlanRequest,
    Receipt,
    RemoveReply,
    RemoveRequest,
    SealedEvent,
    Staging,
    StatusReply,
    TensorReply,
    TensorRequest,
    TextRequest,
    TokenReply,
    TrustReply,
    TrustRequest,
    UndrainReply,
    UndrainRequest,
    WhereReply,
    WhereRequest,
)


def documents() -> dict[str, str]:
    """File name to content, for every exported type."""
    return {f"{_snake(kind.__name__)}.json": _document(kind) for kind in EXPORTED}


def write(folder: Path) -> tuple[Path, ...]:
    """Write every schema into `folder`, made if it is missing; the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, content in documents().items():
        path = folder / name
        path.write_text(content, encoding="utf-8")
        written.append(path)
    return tuple(written)


def _document(kind: type[BaseModel]) -> str:
    schema = {"$schema": DIALECT, **kind.model_json_schema()}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def main() -> int:
    """Write the schemas into the one folder named; 0, or 2 where none is."""
    if len(sys.argv) != 2:
        print("usage: python -m schemas.export FOLDER", file=sys.stderr)
        return 2
    print(f"{len(write(Path(sys.argv[1])))} schemas in {sys.argv[1]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
