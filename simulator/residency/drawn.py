"""PURE: a world of many models, drawn from a scenario by its seed, and the requests that come in it: the same whoever
decides."""

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from math import log

import numpy as np

from orchestrator.residency.problem import NOTHING, Box, Floats, Hosting, Ints, Lying, Piece, Prices, Setting, Wanted
from schemas.base import NodeId
from simulator.draws import Draws
from simulator.residency.scenario import ResidencyScenario, Span

GB, MB = 1e9, 1e6
BUSIEST = 0.8
"""rho_max: of a server's time what is planned for."""


@dataclass(frozen=True)
class Model:
    """One of the models."""

    name: str
    pieces: tuple[str, ...]
    work_s: float
    """Of its mean request, at a speed of 1."""
    cloud_price: float


@dataclass(frozen=True)
class Server:
    """One of the servers."""

    box: Box
    at_once: int
    speed: float
    watts: float
    requests_per_s: float
    """Of its callers."""


@dataclass(frozen=True)
class Request:
    """One, as it will be asked."""

    at_s: float
    caller: int
    """The server whose callers ask."""
    model: int
    factor: float
    """Times the work of the mean request."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """A world: everything but what is asked."""

    servers: tuple[Server, ...]
    models: tuple[Model, ...]
    pieces: dict[str, Piece]
    net_s: Floats
    """[callers, servers]: the round trip."""
    cloud_s: Floats
    """[callers]"""
    cloud_speed: float
    prices: Prices
    order: Ints
    """[callers, models]: rank of each model in the beginning, 0 the first."""

    @cached_property
    def hostings(self) -> tuple[tuple[Hosting, ...], ...]:
        """Of each model one on every server."""
        return tuple(tuple(self._hosting(model, server) for server in self.servers) for model in self.models)

    @cached_property
    def load_s(self) -> Floats:
        """[models, servers]: what loading all of a model takes."""
        return np.array([[self.loading_s(server, model.pieces) for server in self.servers] for model in self.models])

    @cached_property
    def absent(self) -> Floats:
        """[callers, models]: what a request to the cloud costs."""
        work = np.array([model.work_s / self.cloud_speed + model.cloud_price for model in self.models])
        return np.asarray(self.cloud_s[:, None] + work[None, :])

    def loading_s(self, server: Server, pieces: tuple[str, ...]) -> float:
        size = sum(self.pieces[piece].memory_bytes for piece in pieces)
        return size / server.box.load_bytes_per_s + server.box.setup_s * len(pieces)

    def setting(self, rates: Floats, before: Lying = NOTHING, period_s: float = float("inf")) -> Setting:
        """What is decided on, if so much is asked, [callers, models], for so long."""
        wanted = []
        for number, (model, hostings) in enumerate(zip(self.models, self.hostings, strict=True)):
            work = np.array([model.work_s / server.speed for server in self.servers])
            resident = self.net_s + work[None, :]
            stored = resident + self.load_s[number][None, :]
            wanted.append(Wanted(model.name, hostings, rates[:, number], resident, stored, self.absent[:, number]))
        boxes = tuple(server.box for server in self.servers)
        return Setting(boxes, self.pieces, tuple(wanted), self.prices, before, period_s)

    def _hosting(self, model: Model, server: Server) -> Hosting:
        name, work_s = server.box.name, model.work_s / server.speed
        return Hosting({name: model.pieces}, {name: work_s}, {name: work_s * server.watts})


def drawn(scenario: ResidencyScenario, seed: int) -> Drawn:
    """The world of a seed."""
    draws = Draws(seed)
    rng = draws.stream("servers")

    def one(span: Span) -> float:
        return float(rng.uniform(*span))

    servers = []
    for number in range(scenario.servers):
        at_once = int(rng.integers(scenario.at_once[0], scenario.at_once[1] + 1))
        read, copy = one(scenario.read_mb_per_s) * MB, one(scenario.copy_mb_per_s) * MB
        box = Box(
            name=NodeId(f"server-{number}"),
            disk_bytes=one(scenario.disk_gb) * GB,
            memory_bytes=one(scenario.memory_gb) * GB,
            work=BUSIEST * at_once,
            watts=float("inf") if scenario.watts_allowed is None else one(scenario.watts_allowed),
            fetch_bytes_per_s=one(scenario.backhaul_mbit_per_s) * MB / 8.0,
            load_bytes_per_s=1.0 / (1.0 / read + 1.0 / copy),
            setup_s=one(scenario.setup_ms) / 1e3,
        )
        servers.append(Server(box, at_once, one(scenario.speed), one(scenario.watts), one(scenario.requests_per_s)))
    pieces, models = _models(scenario, draws.stream("models"))
    rng = draws.stream("network")
    count = scenario.servers
    upper = np.triu(rng.uniform(*scenario.between_ms, (count, count)) / 1e3, 1)
    return Drawn(
        servers=tuple(servers),
        models=models,
        pieces=pieces,
        net_s=upper + upper.T,
        cloud_s=rng.uniform(*scenario.cloud_ms, count) / 1e3,
        cloud_speed=scenario.cloud_speed,
        prices=Prices(
            disk=scenario.disk_price / GB / 3600.0,
            memory=scenario.memory_price / GB / 3600.0,
            joule=scenario.energy_price / 1e3,
            fetching=scenario.fetch_price,
            loading=scenario.load_price,
        ),
        order=_orders(scenario, draws.stream("order")),
    )


def _models(scenario: ResidencyScenario, rng: np.random.Generator) -> tuple[dict[str, Piece], tuple[Model, ...]]:
    """The models of each family: the first has blocks that the others share, but for some of their own."""
    pieces: dict[str, Piece] = {}
    models = []
    low, high = (log(size) for size in scenario.model_gb)
    middle = float(np.exp((low + high) / 2.0))
    for family in range(min(scenario.families, scenario.models)):
        count = int(rng.integers(scenario.blocks[0], scenario.blocks[1] + 1))
        size_gb = float(np.exp(rng.uniform(low, high)))
        base = tuple(f"f{family}-b{block}" for block in range(count))
        for number in range(family, scenario.models, scenario.families):
            own = 0 if number == family else max(1, round(float(rng.uniform(*scenario.own_share)) * count))
            names = (*base[: count - own], *(f"m{number}-b{block}" for block in range(count - own, count)))
            for name in names:
                disk = float(int(size_gb * GB / count))
                pieces.setdefault(name, Piece(name, disk, float(int(disk * scenario.memory_per_disk))))
            work_s = float(rng.uniform(*scenario.work_s)) * size_gb / middle
            models.append((number, Model(f"model-{number}", names, work_s, float(rng.uniform(*scenario.cloud_price)))))
    return pieces, tuple(model for _, model in sorted(models, key=lambda one: one[0]))


def _orders(scenario: ResidencyScenario, rng: np.random.Generator) -> Ints:
    """Each caller's order, in front of all the one of everybody."""
    return np.array([rng.permutation(scenario.models) for _ in range(scenario.servers + 1)], dtype=np.int64)


def popularity(scenario: ResidencyScenario, orders: Ints) -> Floats:
    """The share of each caller's requests that is for each model, [callers, models]: Zipf's law over everybody's order,
    mixed with the same over its own."""
    shares = (orders + 1.0) ** -scenario.zipf
    shares /= shares.sum(axis=1, keepdims=True)
    return np.asarray(scenario.alike * shares[:1] + (1.0 - scenario.alike) * shares[1:])


def rates(scenario: ResidencyScenario, found: Drawn, seed: int) -> list[tuple[float, Floats]]:
    """From when on how often each caller asks for each model, [callers, models], to the end."""
    rng, orders = Draws(seed).stream("drift"), found.order.copy()
    asked = np.array([server.requests_per_s for server in found.servers])
    end_s, at_s, told = scenario.warmup_s + scenario.duration_s, 0.0, []
    while at_s < end_s:
        told.append((at_s, popularity(scenario, orders) * asked[:, None]))
        if scenario.drift_s is None:
            break
        at_s += scenario.drift_s
        for order in orders:
            moved = np.flatnonzero(rng.random(scenario.models) < scenario.drift_share)
            order[moved] = order[rng.permutation(moved)]
    return told


def requests(scenario: ResidencyScenario, found: Drawn, seed: int) -> tuple[Request, ...]:
    """All that are asked, in order of time, the warm-up's among them."""
    draws = Draws(seed)
    spans = rates(scenario, found, seed)
    ends = [*(at_s for at_s, _ in spans[1:]), scenario.warmup_s + scenario.duration_s]
    asked = []
    for number, ((start, rate), end) in enumerate(zip(spans, ends, strict=True)):
        rng = draws.stream(f"requests {number}")
        counts = rng.poisson(rate * (end - start))
        for caller, model in np.argwhere(counts):
            times = rng.uniform(start, end, counts[caller, model])
            factors = rng.lognormal(-(scenario.work_spread**2) / 2.0, scenario.work_spread, len(times))
            asked += [
                Request(float(at), int(caller), int(model), float(factor))
                for at, factor in zip(times, factors, strict=True)
            ]
    return tuple(sorted(asked, key=lambda one: (one.at_s, one.caller, one.model)))


def trace_hash(asked: tuple[Request, ...]) -> str:
    """SHA-256 of all requests, a line each; two runs with one hash were asked the same."""
    digest = sha256()
    for one in asked:
        digest.update(f"{round(one.at_s * 1e6)} {one.caller} {one.model} {round(one.factor * 1e6)}\n".encode())
    return digest.hexdigest()
