"""The base of every value in `schemas`: frozen, strict about unknown fields, compared by value."""

from typing import Annotated, Any, NewType

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, StringConstraints
from pydantic_core import CoreSchema

NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,62}$"
NAME_RULE = "use lower-case letters, digits, '_' and '-', 63 at most, a letter or digit first"
DIGEST_PATTERN = r"^[0-9a-f]{64}$"
REQUEST_ID_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"
LIFE_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,95}$"

NodeId = NewType("NodeId", str)
DeploymentName = NewType("DeploymentName", str)
RequestId = NewType("RequestId", str)
LifeId = NewType("LifeId", str)
"""One life of an ingress, from its start to its end: the node's name, a dash, and a random number."""
Digest = NewType("Digest", str)
"""SHA-256 of the bytes named, as 64 lower-case hexadecimal digits."""

# One token of a NATS subject: no dots, no wildcards, no spaces.
NodeName = Annotated[NodeId, StringConstraints(pattern=NAME_PATTERN)]
DeploymentId = Annotated[DeploymentName, StringConstraints(pattern=NAME_PATTERN)]
RequestName = Annotated[RequestId, StringConstraints(pattern=REQUEST_ID_PATTERN)]
LifeName = Annotated[LifeId, StringConstraints(pattern=LIFE_PATTERN)]
Sha256 = Annotated[Digest, StringConstraints(pattern=DIGEST_PATTERN)]


def _fail_fast(schema: Any) -> None:
    """End the validation of every sequence in a schema at its first item that is wrong.

    Errors name one flaw. A list of half a million empty objects, in one message, would else make as many errors for
    each field that every one of them lacks: gigabytes, and a minute of a core.
    """
    match schema:
        case {"type": "list" | "tuple"}:
            schema["fail_fast"] = True
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        _fail_fast(part)


class Value(BaseModel):
    """A frozen value: equal when its fields are equal, refused when it has a field nobody declared."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type[BaseModel], handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _fail_fast(schema)
        return schema
