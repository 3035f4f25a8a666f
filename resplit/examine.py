"""Looks at a cluster and at this machine, changes nothing, waits for nothing long: the facts for a diagnosis."""

import asyncio
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.errors import NotFoundError

from bus.folders import KNOWN, ROSTER
from bus.replicas import counts, servers_of
from natstls.client import SafeClient
from natstls.contexts import AUTHORITY
from profiler.gpu import gpu_name
from resplit import control
from resplit.access import Access
from resplit.diagnosis import Facts, KeyFile, Storage
from resplit.replies import RequestError
from schemas import subjects
from schemas.base import NodeId
from schemas.errors import ResplitError

ANSWER_S = 5.0
"""An orchestrator or a server that takes longer is not well."""
GOODBYE_S = 2.0
STREAMS = (
    subjects.STREAM_PLANS,
    subjects.STREAM_RECEIPTS,
    subjects.STREAM_AUDIT,
    subjects.STREAM_JOURNAL,
    f"KV_{subjects.BUCKET_DEPLOYMENTS}",
    f"KV_{subjects.BUCKET_NODES}",
    f"KV_{subjects.BUCKET_LEADER}",
)


async def examine(at: Access, agent: Path | None, node: NodeId | None) -> Facts:
    """The facts, each within `ANSWER_S`; `agent`: the folder of an agent on this machine. Raises nothing for what is
    broken: that is what it reports."""
    files = await asyncio.to_thread(key_files, at.keys, None)
    if agent is not None:
        files += await asyncio.to_thread(key_files, agent, node)
    here = agent is not None and node is not None and (agent / f"{node}.key").is_file()
    facts = Facts(
        url=_without_password(at.url),
        at=datetime.now(UTC),
        version=version("resplit"),
        keys=files,
        idle_gpu=await asyncio.to_thread(gpu_name) if here else None,
    )
    try:
        connection = await at.connect("resplit-doctor", "operator")
    except ResplitError as error:
        return replace(facts, login_fault=error.message)
    except RequestError as error:
        if error.field == "keys":
            return replace(facts, login_fault=error.message)
        return replace(facts, server_fault=error.message)
    try:
        return await _ask(connection, facts)
    finally:
        with suppress(NatsError, TimeoutError, OSError):
            await asyncio.wait_for(connection.close(), GOODBYE_S)


def _without_password(url: str) -> str:
    # What a doctor says is read aloud, and pasted.
    return url.rpartition("@")[2] if "@" in url else url


async def _ask(connection: SafeClient, facts: Facts) -> Facts:
    server = connection.connected_server_version
    facts = replace(
        facts,
        server=f"nats-server {server.major}.{server.minor}.{server.patch}",
        certificate_until=connection.certificate_until,
    )
    try:
        facts = replace(facts, storage=await _storage(connection.jetstream()))
    except (NatsError, TimeoutError, OSError) as error:
        facts = replace(facts, storage_fault=f"JetStream does not answer: {error or type(error).__name__}")
    try:
        status = await control.status_on(connection, ANSWER_S)
    except ResplitError as error:
        return replace(facts, status_fault=error.message)
    except (NatsError, OSError) as error:
        return replace(facts, status_fault=f"the question could not be sent: {error!r}")
    return replace(facts, status=status, at=datetime.now(UTC))


async def _storage(js: JetStreamContext) -> Storage:
    account = await js.account_info()
    servers = servers_of(js._nc)
    most = counts(servers)[0]
    missing, kept_less = [], []
    for name in STREAMS:
        try:
            if ((await js.stream_info(name)).config.num_replicas or 1) < most:
                kept_less.append(name)
        except NotFoundError:
            missing.append(name)
    limit = account.limits.max_storage
    known_limit = limit if limit is not None and limit > 0 else None
    return Storage(account.storage, known_limit, tuple(missing), servers, tuple(kept_less))


def key_files(folder: Path, node: NodeId | None) -> tuple[KeyFile, ...]:
    """The files that belong in a key folder: those everybody has, and those of `node` or of every name in it."""
    try:
        names = [str(node)] if node is not None else sorted(p.stem for p in folder.glob("*.key") if "." not in p.stem)
    except OSError:
        names = []
    found = [_key_file(folder / name, private=False) for name in (ROSTER, AUTHORITY)]
    found.append(_key_file(folder / KNOWN, private=True))
    for name in names:
        found.append(_key_file(folder / f"{name}.key", private=True))
        found += [_key_file(folder / f"{name}.{kind}", private=True) for kind in ("tls.key", "sealing.key", "nk")]
        found.append(_key_file(folder / f"{name}.tls.pem", private=False))
    return tuple(found)


def _key_file(path: Path, private: bool) -> KeyFile:
    try:
        return KeyFile(path, path.stat().st_mode, private)
    except OSError:
        return KeyFile(path, None, private)
