"""A scenario of many models as a value: what servers have, what models are like, and how often each is asked for.

Quantities are ranges, from which a world is drawn in `drawn.py`.
"""

from typing import Annotated, Self

from pydantic import Field, model_validator

from simulator.contest import ContestScenario

Span = tuple[Annotated[float, Field(ge=0, le=1e12)], Annotated[float, Field(ge=0, le=1e12)]]
"""From and to."""
SERVERS_MAX, MODELS_MAX = 200, 500


class ResidencyScenario(ContestScenario):
    """A world of servers that hold some of many models, of which every seed draws another."""

    duration_s: float = Field(gt=0, le=1e6)
    """In which requests arrive that count."""
    warmup_s: float = Field(default=0.0, ge=0, le=1e6)
    memory_s: float = Field(default=30.0, gt=0, le=1e5)
    """So often is decided what is to be in memory,"""
    disk_s: float = Field(default=300.0, gt=0, le=1e5)
    """and so often what is to lie on disks."""

    servers: int = Field(ge=1, le=SERVERS_MAX)
    """Each with callers of its own."""
    disk_gb: Span
    memory_gb: Span
    at_once: tuple[int, int] = (1, 1)
    """Requests that a server works on at once."""
    speed: Span = (1.0, 1.0)
    read_mb_per_s: Span
    """Of a disk."""
    copy_mb_per_s: Span
    """From there on to where it computes: r_pcie."""
    setup_ms: Span = (0.0, 0.0)
    """Of each block that is loaded."""
    backhaul_mbit_per_s: Span
    """At which files come from the cloud, which has all."""
    between_ms: Span
    """Round trip between two servers,"""
    cloud_ms: Span
    """and to the cloud."""
    cloud_speed: float = Field(default=1.0, gt=0, le=1e3)
    cloud_price: Span
    """Of a request to the cloud, in seconds of waiting."""
    watts: Span
    """That a request takes while it is worked on."""
    watts_allowed: Span | None = None
    """On average, of a server; None: any."""

    models: int = Field(ge=1, le=MODELS_MAX)
    families: int = Field(ge=1, le=MODELS_MAX)
    """Models of one family share blocks: fine-tunes of one base."""
    blocks: tuple[int, int]
    own_share: Span
    """Of a model's blocks, those that it shares with none; of the first of a family all are the base's."""
    model_gb: Span
    """By the logarithm evenly drawn."""
    memory_per_disk: float = Field(default=1.2, gt=0, le=10)
    """What a block takes in memory, caches included, for what it takes on a disk."""
    work_s: Span
    """Of a request, on a server of speed 1, for a model of middling size; in proportion to size."""
    work_spread: float = Field(default=0.3, ge=0, le=2)
    """Of requests: sigma of a lognormal law."""

    requests_per_s: Span
    """Of each server's callers."""
    zipf: float = Field(default=1.0, ge=0, le=5)
    """The model of rank r is asked for in proportion to r^-zipf."""
    alike: float = Field(default=0.5, ge=0, le=1)
    """Of what callers ask for, the share that all ask for alike; the rest is by an order of their own."""
    drift_s: float | None = Field(default=None, gt=0, le=1e6)
    """Time between changes of the order; None: never."""
    drift_share: float = Field(default=0.2, ge=0, le=1)
    """Of the models that change places then."""

    disk_price: float = Field(default=0.0, ge=0)
    """Of a GB for an hour, in seconds of waiting."""
    memory_price: float = Field(default=0.0, ge=0)
    """Likewise."""
    energy_price: float = Field(default=0.0, ge=0)
    """Of a kJ."""
    fetch_price: float = Field(default=0.0, ge=0)
    """Of a second in which a file comes over the backhaul."""
    load_price: float = Field(default=0.0, ge=0)
    """Of a second in which blocks are loaded."""

    @model_validator(mode="after")
    def _spans_rise(self) -> Self:
        for name, value in self:
            if isinstance(value, tuple) and len(value) == 2 and value[0] > value[1]:
                raise ValueError(f"{name}: from {value[0]:g} to {value[1]:g}: the first is to be the smaller one")
        return self

    @model_validator(mode="after")
    def _models_fit_somewhere(self) -> Self:
        if self.model_gb[0] > self.disk_gb[1]:
            raise ValueError(
                f"model_gb: the smallest model of {self.model_gb[0]:g} GB is larger than any disk "
                f"({self.disk_gb[1]:g} GB)"
            )
        if self.model_gb[0] * self.memory_per_disk > self.memory_gb[1]:
            raise ValueError(
                f"model_gb: the smallest model takes {self.model_gb[0] * self.memory_per_disk:g} GB of memory, more "
                f"than any server has ({self.memory_gb[1]:g} GB)"
            )
        return self
