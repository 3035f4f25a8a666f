"""Which files of the store agents can fetch from here: those of every model that is wanted or runs, and no other."""

import asyncio
import contextlib
from collections.abc import Callable, Iterable

from nats.errors import Error as NatsError

from bus.blobs import BlobServer
from orchestrator.fold import Snapshot
from schemas.base import Digest
from schemas.manifest import Manifest

KEPT_S = 10.0
"""Files stay on offer this long after their model was last in use: an agent may be in the middle of one."""
LOOK_S = 1.0


class Offers:
    """Keeps the offered files in line with the snapshot."""

    def __init__(self, server: BlobServer) -> None:
        self._server = server
        self._used_at: dict[Digest, float] = {}

    async def add(self, digest: Digest, manifest: Manifest) -> None:
        """Offer a model before anybody is told to fetch it."""
        await self._offer(_files(digest, manifest))

    async def follow(self, snapshot: Snapshot) -> None:
        """Offer what the snapshot needs, and withdraw what nothing has needed for `KEPT_S`."""
        models = {digest: snapshot.manifests.get(digest) for digest in models_in_use(snapshot)}
        await self._offer(file for digest, manifest in models.items() for file in _files(digest, manifest))
        now = asyncio.get_running_loop().time()
        stale = [file for file, used_at in self._used_at.items() if now - used_at > KEPT_S]
        await self._server.withdraw(stale)
        for file in stale:
            del self._used_at[file]

    async def end(self) -> None:
        """Offer nothing any more."""
        await self._server.withdraw(list(self._used_at))
        self._used_at.clear()

    async def run(self, snapshot: Callable[[], Snapshot]) -> None:
        """Follow the snapshot until cancelled."""
        while True:
            with contextlib.suppress(NatsError, OSError):  # the connection is away: the next look tries again
                await self.follow(snapshot())
            await asyncio.sleep(LOOK_S)

    async def _offer(self, files: Iterable[Digest]) -> None:
        now = asyncio.get_running_loop().time()
        wanted = dict.fromkeys(files, now)
        await self._server.offer(wanted)
        self._used_at.update(wanted)


def models_in_use(snapshot: Snapshot) -> set[Digest]:
    """Models that are wanted, those of the services of pipelines among them, or that a live plan runs."""
    running = {plan.model for rollout in snapshot.rollouts.values() for plan in rollout.plans}
    wanted = running | {deployment.model for deployment in snapshot.deployments.values()}
    of_services = {
        service.model
        for digest in wanted
        if (manifest := snapshot.manifests.get(digest)) is not None and manifest.pipeline is not None
        for service in manifest.pipeline.services.values()
    }
    return wanted | of_services


def _files(digest: Digest, manifest: Manifest | None) -> tuple[Digest, ...]:
    return (digest, *(Digest(file) for file in (manifest.blobs if manifest is not None else ())))
