"""`resplit topology`: splits that an operator decides, for those who want to."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resplit.defaults import DEFAULT_URL
from resplit.options import AsJson, Keys, Timeout, Url, Wait
from resplit.output import print_json
from resplit.view import chains, readiness, routes
from schemas.base import DeploymentName
from schemas.errors import ErrorCode, ResplitError

if TYPE_CHECKING:
    from resplit.access import Access
    from schemas.control import DeploymentStatus
    from schemas.deployment import Chain, Placement

PLACE_TIMEOUT_S = 900.0
"""Nodes may have to fetch gigabytes before they are ready."""

app = typer.Typer(no_args_is_help=True, help="Decide yourself which node runs which blocks, or see who does.")

Name = Annotated[str, typer.Argument(help="The deployment.", metavar="DEPLOYMENT")]


@app.command()
def show(name: Name, keys: Keys, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Print the split that runs now, as a file for `lock`: `show chat > f.toml` and `lock f.toml` freeze it."""
    from resplit import control  # noqa: PLC0415
    from resplit.access import Access  # noqa: PLC0415
    from resplit.topology import as_toml, current_topology  # noqa: PLC0415

    reply = asyncio.run(control.status(Access(url, keys)))
    found = next((one for one in reply.deployments if one.name == name), None)
    if found is None:
        known = ", ".join(one.name for one in reply.deployments) or "none"
        message = f"there is no deployment {name!r}; the deployments are: {known}"
        raise ResplitError(ErrorCode.UNKNOWN_DEPLOYMENT, message, "deployment")
    if as_json:
        print_json(current_topology(found))
    else:
        print(as_toml(found), end="")


@app.command()
def lock(
    file: Annotated[
        Path, typer.Argument(help="A deployment and its stages, or its routes, as `show` prints them (TOML or .json).")
    ],
    keys: Keys,
    url: Url = DEFAULT_URL,
    wait: Wait = True,
    timeout: Timeout = PLACE_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Run a deployment exactly as FILE says, until it is unlocked: the planner then only watches that it holds.

    Refused, and nothing changed, if a node is not there, has too little memory or may not hold what is sensitive.
    """
    from resplit.access import Access  # noqa: PLC0415
    from resplit.topology import in_file, read_topology  # noqa: PLC0415

    path = file.expanduser()
    topology = read_topology(path)
    try:
        _place(Access(url, keys), topology.deployment, topology.placement, wait, timeout, as_json)
    except ResplitError as error:
        raise in_file(error, path) from error


@app.command()
def unlock(
    name: Name,
    keys: Keys,
    url: Url = DEFAULT_URL,
    wait: Wait = True,
    timeout: Timeout = PLACE_TIMEOUT_S,
    as_json: AsJson = False,
) -> None:
    """Leave the split of a deployment to the planner again; nothing moves by that alone."""
    from resplit.access import Access  # noqa: PLC0415

    _place(Access(url, keys), DeploymentName(name), None, wait, timeout, as_json)


def _place(
    at: "Access", name: DeploymentName, placement: "Chain | Placement | None", wait: bool, timeout: float, as_json: bool
) -> None:
    from resplit import control  # noqa: PLC0415

    how = "planned automatically" if placement is None else "locked"
    if not wait:
        reply = asyncio.run(control.place(at, name, placement))
        if as_json:
            print_json(reply)
        else:
            print(f"{name}: {how}; as of now {chains(reply.routes)}")
        return
    with readiness() as show_progress:
        served = asyncio.run(control.place_and_wait(at, name, placement, timeout, show_progress))
    if as_json:
        print_json(served)
    else:
        print(f"{name}: {how}; {_serving(served)}")


def _serving(served: "DeploymentStatus") -> str:
    assert served.current is not None
    return f"serving epoch {served.current.epoch}, {routes(served.current)}"
