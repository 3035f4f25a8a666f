"""Commands that run something until it is told to stop: up, agent, orchestrator."""

import asyncio
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from resplit.defaults import DEFAULT_URL
from resplit.options import DEFAULT_FOLDER, DEFAULT_STORE, AsJson, Keys, StoreFolder, Url, Verbose
from resplit.output import print_json, spinner
from schemas.base import NodeId
from schemas.errors import ErrorCode, ResplitError

if TYPE_CHECKING:
    from resplit.cluster import LocalCluster

ProviderName = Literal["cpu", "cuda", "auto"]
KeepName = Literal["worth", "recent"]
TierName = Literal["edge", "cloud"]
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
NATS_PORT = 4222
HTTP_PORT = 8000

Provider = Annotated[ProviderName, typer.Option(help="Where blocks run; `auto` takes a GPU where there is one.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Compute threads of an agent; default: its share of cores.")]
Memory = Annotated[
    str | None, typer.Option(help="What an agent may use for weights and caches, as `2GiB`; default: what is free.")
]
Disk = Annotated[
    str | None, typer.Option(help="What an agent may use of its disk for models, as `20GiB`; default: what is free.")
]
Metrics = Annotated[
    str | None, typer.Option(help="ADDRESS:PORT where Prometheus may read figures; whoever reaches it reads them.")
]
Clouds = Annotated[
    Path | None, typer.Option(help="A TOML file of endpoints outside that agents may ask where a deployment names one.")
]


def up(
    agents: Annotated[int, typer.Option(min=1, help="How many agents to run.")] = 3,
    orchestrators: Annotated[int, typer.Option(min=1, help="How many orchestrators; one leads.")] = 1,
    store: StoreFolder = DEFAULT_STORE,
    folder: Annotated[Path, typer.Option(help="Where the cluster keeps keys, stores and logs.")] = DEFAULT_FOLDER,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="The NATS server's port; 0 takes a free one.")
    ] = NATS_PORT,
    http: Annotated[
        int, typer.Option(min=0, max=65535, help="The port of the HTTP gateway on this machine; 0 takes a free one.")
    ] = HTTP_PORT,
    provider: Provider = "cpu",
    threads: Threads = None,
    memory: Memory = None,
    disk: Disk = None,
    clouds: Clouds = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Run a whole cluster on this machine: NATS, an orchestrator, agents and an HTTP gateway with a dashboard, until
    Ctrl-C or SIGTERM."""
    from resplit.cluster import LocalCluster  # noqa: PLC0415
    from resplit.running import log_to_stderr, run_until_told  # noqa: PLC0415

    log_to_stderr(logging.INFO if verbose else logging.WARNING)
    cluster = LocalCluster(
        folder.expanduser(),
        store.expanduser(),
        agents,
        port=port or None,
        provider=provider,
        threads=threads,
        memory_bytes=None if memory is None else parse_size(memory),
        disk_bytes=None if disk is None else parse_size(disk),
        orchestrators=orchestrators,
        clouds=clouds,
        http_port=http,
        verbose=verbose,
    )
    run_until_told(_keep_up(cluster, as_json))


def agent(
    node: Annotated[str, typer.Argument(help="This node's name, as it stands in the key folder.")],
    keys: Keys,
    url: Url = DEFAULT_URL,
    store: StoreFolder = DEFAULT_STORE,
    provider: Provider = "auto",
    threads: Threads = None,
    memory: Memory = None,
    disk: Disk = None,
    cores: Annotated[str | None, typer.Option(help="Cores to stay on, as `0,1` or `0-3`; default: all.")] = None,
    listen: Annotated[str, typer.Option(help="host:port for links from other agents; port 0 is any.")] = "127.0.0.1:0",
    advertise: Annotated[str | None, typer.Option(help="host:port others reach it at, if not `--listen`.")] = None,
    tier: Annotated[TierName, typer.Option(help="`cloud` for a rented machine: used at need, not trusted.")] = "edge",
    price_per_hour: Annotated[float, typer.Option(min=0, help="What the node costs while a plan uses it.")] = 0.0,
    clouds: Clouds = None,
    metrics: Metrics = None,
    verbose: Verbose = False,
) -> None:
    """Run one agent on this machine until Ctrl-C or SIGTERM."""
    from agent.clouds import read_clouds  # noqa: PLC0415
    from agent.config import AgentConfig  # noqa: PLC0415
    from agent.shell import run  # noqa: PLC0415
    from resplit.running import log_to_stderr, run_service  # noqa: PLC0415

    config = AgentConfig(
        node=NodeId(node),
        url=url,
        keys=keys,
        store=store.expanduser(),
        provider=provider,
        threads=threads,
        memory_bytes=None if memory is None else parse_size(memory),
        disk_bytes=None if disk is None else parse_size(disk),
        listen=listen,
        advertise=advertise,
        cores=None if cores is None else parse_cores(cores),
        tier=tier,
        price_per_hour=price_per_hour,
        clouds={} if clouds is None else read_clouds(clouds.expanduser()),
        metrics=metrics,
    )
    log_to_stderr(logging.DEBUG if verbose else logging.INFO)
    run_service(run(config))


def orchestrator(
    keys: Keys,
    url: Url = DEFAULT_URL,
    store: StoreFolder = DEFAULT_STORE,
    name: Annotated[
        str | None, typer.Option("--id", help="Its name among the orchestrators; default: host and process id.")
    ] = None,
    keep: Annotated[
        KeepName, typer.Option(help="Which deployments on demand stay loaded: those worth most, or used last.")
    ] = "worth",
    metrics: Metrics = None,
    verbose: Verbose = False,
) -> None:
    """Run an orchestrator until Ctrl-C or SIGTERM; it offers the models in its store to the agents.

    Of several one leads and the others stand by. Each needs the same models in its store.
    """
    from orchestrator.shell import OrchestratorConfig, run  # noqa: PLC0415
    from resplit.running import log_to_stderr, run_service  # noqa: PLC0415

    log_to_stderr(logging.DEBUG if verbose else logging.INFO)
    called = None if name is None else NodeId(name)
    config = OrchestratorConfig(url, keys, store.expanduser(), called, keep, metrics)
    run_service(run(config))


def parse_size(text: str) -> int:
    """Bytes from `4096`, `512M`, `2GiB`, ...; raises `ResplitError(INVALID_REQUEST)`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ResplitError(ErrorCode.INVALID_REQUEST, f"{text!r} is not a size such as 512MiB or 2GiB", "memory")
    return int(float(match[1]) * UNITS[match[2].upper()])


def parse_cores(text: str) -> tuple[int, ...]:
    """Core numbers from `0,2,4-7`; raises `ResplitError(INVALID_REQUEST)`."""
    if re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text) is None:
        raise ResplitError(ErrorCode.INVALID_REQUEST, f"{text!r} is not a list of cores such as 0,2,4-7", "cores")
    ends = [part.partition("-") for part in text.split(",")]
    backwards = next((part for part in ends if int(part[2] or part[0]) < int(part[0])), None)
    if backwards is not None:
        raise ResplitError(ErrorCode.INVALID_REQUEST, f"{''.join(backwards)!r} ends before it begins", "cores")
    return tuple(core for first, _, last in ends for core in range(int(first), int(last or first) + 1))


async def _keep_up(cluster: "LocalCluster", as_json: bool) -> None:
    from resplit.server import NATS  # noqa: PLC0415

    with spinner("starting"):
        await cluster.__aenter__()
    try:
        _announce(cluster, as_json)
        while True:
            name, error = await cluster.first_to_end()
            if name == NATS or len(cluster.processes) <= 1:
                raise error
            logging.getLogger(__name__).error("a process of the cluster ended: %s", error.message)
    finally:
        with spinner("stopping"):
            await asyncio.shield(cluster.__aexit__(None, None, None))


def _announce(cluster: "LocalCluster", as_json: bool) -> None:
    keys = cluster.operator_keys
    if as_json:
        clients = str(cluster.client_keys)
        paths = {"store": str(cluster.store), "keys": str(keys), "client_keys": clients, "folder": str(cluster.folder)}
        print_json({"url": cluster.url, "http": cluster.http_url, **paths, "processes": cluster.processes})
        return
    print(f"{len(cluster.agents)} agents are up at {cluster.url}  (Ctrl-C stops everything)")
    print(f"  dashboard     {cluster.http_url}/dashboard/")
    print(f"  OpenAI's API  {cluster.http_url}/v1")
    print(f"  models from   {cluster.store}")
    print(f"  keys and logs {cluster.folder}")
    print(f"\nIn another terminal:\n  export RESPLIT_URL={cluster.url} RESPLIT_STORE={cluster.store}")
    print(f"  export RESPLIT_KEYS={keys} RESPLIT_CLIENT_KEYS={cluster.client_keys}")
    print("  resplit deploy MODEL\n  resplit status", flush=True)
