"""The base of every value in `schemas`: frozen, strict about unknown fields, compared by value."""

from typing import Annotated, Any, NewType

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, StringConstraints
from pydantic_core import CoreSchema

NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,62}$"
DEPLOYMENT_PATTERN = r"^([a-z0-9][a-z0-9_-]{0,62}/)?[a-z0-9][a-z0-9_-]{0,62}$"
NAME_RULE = "use lower-case letters, digits, '_' and '-', 63 at most, a letter or digit first"
DIGEST_PATTERN = r"^[0-9a-f]{64}$"
REQUEST_ID_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"
LIFE_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,95}$"

NodeId = NewType("NodeId", str)
DeploymentName = NewType("DeploymentName", str)
RequestId = NewType("RequestId", str)
SiteId = NewType("SiteId", str)
"""A site that is the home of deployments; it keeps what is theirs and steers them itself."""
Home = SiteId | None
"""Where a deployment is at home: at a site, or at the hub (None)."""
LifeId = NewType("LifeId", str)
"""One life of an ingress, from its start to its end: the node's name, a dash, and a random number."""
Digest = NewType("Digest", str)
"""SHA-256 of the bytes named, as 64 lower-case hexadecimal digits."""

# One token of a NATS subject: no dots, no wildcards, no spaces.
NodeName = Annotated[NodeId, StringConstraints(pattern=NAME_PATTERN)]
SiteName = Annotated[SiteId, StringConstraints(pattern=NAME_PATTERN)]
DeploymentId = Annotated[DeploymentName, StringConstraints(pattern=DEPLOYMENT_PATTERN)]
"""`NAME`, or `SITE/NAME` of one that is at home at a site: nobody has to be asked which home steers it."""
RequestName = Annotated[RequestId, StringConstraints(pattern=REQUEST_ID_PATTERN)]
LifeName = Annotated[LifeId, StringConstraints(pattern=LIFE_PATTERN)]
Sha256 = Annotated[Digest, StringConstraints(pattern=DIGEST_PATTERN)]


def home_of(deployment: DeploymentName) -> Home:
    """Where a deployment is at home, by its name."""
    site, slash, _ = deployment.partition("/")
    return SiteId(site) if slash else None


def called(home: Home) -> str:
    """A home as people read it."""
    return "the hub" if home is None else f"site {home!r}"


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
