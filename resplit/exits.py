"""How a command ends: the exit codes, and the one line in which an error is told."""

import sys
from enum import IntEnum
from typing import Any

import typer
from pydantic import ValidationError
from typer.core import TyperGroup

from resplit.replies import RequestError
from schemas.errors import ErrorCode, ResplitError


class Exit(IntEnum):
    """The exit codes of every command; scripts may rely on them."""

    OK = 0
    FAILED = 1
    """It was tried and went wrong."""
    USAGE = 2
    """The command or the request is malformed."""
    NOT_FOUND = 3
    """No such model, deployment or node, or no keys to a sealed model."""
    REFUSED = 4
    """Understood, but it cannot be done: it does not fit, is not supported or is not trusted."""
    UNREACHABLE = 5
    """No NATS server, or no orchestrator, answers."""
    OVERLOADED = 6
    """Too much to do, or not done in time."""
    INTERRUPTED = 130
    """Ctrl-C."""


EPILOG = (
    "Exit codes: 0 done; 1 failed; 2 malformed command or request; 3 no such model, deployment or node; "
    "4 refused or infeasible; 5 unreachable; 6 overloaded or timed out; 130 interrupted."
)

_BY_CODE = {
    ErrorCode.INVALID_REQUEST: Exit.USAGE,
    ErrorCode.TOKEN_OUT_OF_RANGE: Exit.USAGE,
    ErrorCode.UNKNOWN_MODEL: Exit.NOT_FOUND,
    ErrorCode.UNKNOWN_DEPLOYMENT: Exit.NOT_FOUND,
    ErrorCode.UNKNOWN_NODE: Exit.NOT_FOUND,
    ErrorCode.MISSING_BLOB: Exit.NOT_FOUND,
    ErrorCode.MISSING_KEYS: Exit.NOT_FOUND,
    ErrorCode.PAYLOAD_TOO_LARGE: Exit.REFUSED,
    ErrorCode.CONTEXT_EXCEEDED: Exit.REFUSED,
    ErrorCode.MODEL_TOO_LARGE: Exit.REFUSED,
    ErrorCode.INFEASIBLE: Exit.REFUSED,
    ErrorCode.BAD_SIGNATURE: Exit.REFUSED,
    ErrorCode.STALE_EPOCH: Exit.REFUSED,
    ErrorCode.ROLLED_BACK: Exit.REFUSED,
    ErrorCode.EXPIRED: Exit.REFUSED,
    ErrorCode.FORBIDDEN: Exit.REFUSED,
    ErrorCode.UNSUPPORTED_MODEL: Exit.REFUSED,
    ErrorCode.PROVIDER_UNAVAILABLE: Exit.REFUSED,
    ErrorCode.UNREACHABLE: Exit.UNREACHABLE,
    ErrorCode.OVERLOADED: Exit.OVERLOADED,
    ErrorCode.DEADLINE_EXCEEDED: Exit.OVERLOADED,
    ErrorCode.DEADLINE_UNATTAINABLE: Exit.OVERLOADED,
    ErrorCode.TIMEOUT: Exit.OVERLOADED,
}


class Commands(TyperGroup):
    """A command group that ends in one of `Exit`, with one line on stderr where something went wrong.

    A traceback is left to what is a defect in Resplit itself.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ResplitError, RequestError) as error:
            raise typer.Exit(report(error)) from error
        except ValidationError as error:
            raise typer.Exit(report(ResplitError.from_validation(error, "command"))) from error
        except OSError as error:
            if error.filename is None:
                raise
            message = f"cannot use {error.filename}: {error.strerror}; permit it, make room, or name another place"
            raise typer.Exit(report(ResplitError(ErrorCode.INVALID_REQUEST, message))) from error
        except KeyboardInterrupt as interruption:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(Exit.INTERRUPTED) from interruption


def report(error: ResplitError | RequestError) -> Exit:
    """Print an error as `error: message (code, field)` and return the exit code it stands for."""
    about = error.code if error.field is None else f"{error.code}, {error.field}"
    print(f"error: {error.message} ({about})", file=sys.stderr)
    return exit_of(error.code)


def exit_of(code: str) -> Exit:
    """The exit code of an error code; codes of a newer release are plain failures."""
    try:
        return _BY_CODE.get(ErrorCode(code), Exit.FAILED)
    except ValueError:
        return Exit.FAILED
