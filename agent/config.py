"""What an operator tells an agent."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Literal

from agent.clouds import KnownCloud
from agent.memory import Device
from profiler.calibrate import calibrate
from schemas.base import NodeId
from schemas.capacity import Provider, Tier
from schemas.errors import ErrorCode, ResplitError

ProviderChoice = Literal["auto", "cpu", "cuda"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AgentConfig:
    """One agent. `provider` "auto" takes CUDA where it works; "cuda" takes nothing else, ever.

    `listen` is where peers reach it (port 0 picks one) and `advertise` what they are told, if that is another
    address; `cores` pins the process; `memory_bytes` limits what blocks and caches may take,
    `disk_bytes` what files of models may;
    `tier` and `price_per_hour` are what the planner goes by where it has a choice. Raises INVALID_REQUEST for what is
    no price, and for a core that the machine does not have.
    """

    node: NodeId
    url: str
    keys: Path
    store: Path
    provider: ProviderChoice = "auto"
    threads: int | None = None
    memory_bytes: int | None = None
    disk_bytes: int | None = None
    listen: str = "127.0.0.1:0"
    advertise: str | None = None
    cores: tuple[int, ...] | None = None
    tier: Tier = "edge"
    price_per_hour: float = 0.0
    """In the currency that all nodes are priced in."""
    clouds: Mapping[str, KnownCloud] = field(default_factory=dict)
    """Endpoints outside the cluster that this node may ask, by name (`agent.clouds`)."""
    metrics: str | None = None
    """host:port where Prometheus may read its figures."""

    def __post_init__(self) -> None:
        if not 0 <= self.price_per_hour < inf:
            message = f"price_per_hour is {self.price_per_hour}; it must be a finite number, 0 or more"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, "price_per_hour")
        # The kernel takes a list with cores that there are not, and the threads for them would share the others.
        count = os.cpu_count() or 1
        absent = [core for core in self.cores or () if core >= count]
        if absent:
            message = f"there is no core {absent[0]}: this machine has cores 0 to {count - 1}; name some of those"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, "cores")

    @property
    def thread_count(self) -> int:
        """As many threads as the process has cores, unless told otherwise."""
        return self.threads or len(os.sched_getaffinity(0))


def choose_provider(choice: ProviderChoice, threads: int) -> tuple[Device, Provider]:
    """The device to compute on, measured. Raises PROVIDER_UNAVAILABLE when CUDA was asked for and is not there."""
    if choice != "cpu":
        try:
            return "cuda", calibrate("cuda", threads)
        except ResplitError as error:
            if choice == "cuda" or error.code is not ErrorCode.PROVIDER_UNAVAILABLE:
                raise
            log.info("computing on the processor: %s", error.message)
    return "cpu", calibrate("cpu", threads)
