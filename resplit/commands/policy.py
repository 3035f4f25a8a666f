"""`resplit roster policy`: what no orchestrator can override, rule by rule."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from pydantic import ValidationError

from schemas.base import DIGEST_PATTERN, NAME_PATTERN, Digest
from schemas.errors import ErrorCode, ResplitError

if TYPE_CHECKING:
    from schemas.deployment import Sensitive
    from schemas.roster import Policy

R = TypeVar("R")

SensitiveRules = Annotated[
    list[str] | None,
    typer.Option(
        "--sensitive",
        help="Blocks that only trusted nodes may hold, whatever an orchestrator says, as `chat=ends`, `chat=ends:2`, "
        "`chat=0,5` or `*=ends` for every deployment. Once for each.",
        metavar="NAME=BLOCKS",
    ),
]
ModelRules = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        help="The only models that a deployment may run, whatever an orchestrator says, by the digests that `resplit "
        "models show` prints: `chat=DIGEST`, `chat=DIGEST,DIGEST`, or `*=DIGEST` for each deployment that is not "
        "named. Once for each.",
        metavar="NAME=DIGEST",
    ),
]


def changed(policy: "Policy", sensitive: Iterable[str], models: Iterable[str]) -> "Policy":
    """`policy` with these rules in the place of those about the same names; `NAME=` takes a rule back.

    Raises `ResplitError(INVALID_REQUEST)` naming the rule that is none.
    """
    from resplit.commands.deployments import parse_sensitive  # noqa: PLC0415
    from schemas.roster import Policy  # noqa: PLC0415

    parse: Callable[[str], Sensitive] = parse_sensitive
    secret = {**policy.sensitive, **dict(_rules(sensitive, parse, "sensitive", "its blocks, as `*=ends`"))}
    example = "the digests of its models, as `resplit models show` prints them"
    pinned = {**(policy.models or {}), **dict(_rules(models, _digests, "model", example))}
    try:
        return Policy(
            sensitive={name: blocks for name, blocks in secret.items() if blocks is not None},
            models={name: digests for name, digests in pinned.items() if digests is not None} or None,
        )
    except ValidationError as error:
        raise ResplitError.from_validation(error, "policy") from error


def lines(policy: "Policy") -> Iterator[str]:
    """The rules, for people."""
    for name, blocks in policy.sensitive.items():
        yield f"sensitive {name}: {blocks if isinstance(blocks, str) else ','.join(map(str, blocks))}"
    for name, digests in (policy.models or {}).items():
        yield f"model {name}: {', '.join(digests)}"


def _rules(texts: Iterable[str], parse: Callable[[str], R], field: str, example: str) -> Iterator[tuple[str, R | None]]:
    from schemas.roster import EVERY_DEPLOYMENT  # noqa: PLC0415

    for text in texts:
        name, equals, said = text.partition("=")
        if not equals or (name != EVERY_DEPLOYMENT and re.fullmatch(NAME_PATTERN, name) is None):
            message = f"{text!r} is no rule: give a deployment or `*`, and {example}"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, field)
        yield name, parse(said) if said else None


def _digests(text: str) -> tuple[Digest, ...]:
    found = tuple(dict.fromkeys(text.split(",")))
    for digest in found:
        if re.fullmatch(DIGEST_PATTERN, digest) is None:
            message = f"{digest!r} is not the digest of a model, 64 hexadecimal digits; `resplit models show` prints it"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, "model")
    return tuple(Digest(digest) for digest in found)
