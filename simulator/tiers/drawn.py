"""PURE: a world of two tiers, drawn from a scenario by its seed, and the requests that come in it: the same whoever
decides."""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from math import log2

import numpy as np
from scipy.special import gammaincinv

from orchestrator.services.problem import Host, ServiceKind, Setting, Stream, TaskKind, Ways
from orchestrator.services.routing import Speeds
from profiler.effective_capacity import GammaService, Steady
from schemas.base import NodeId
from simulator.draws import Draws
from simulator.tiers.scenario import Span, TierSpec, TwoTierScenario

AGES = 10
"""Quantiles of what the way from a user takes, which is known of a stream."""
CLOUD = NodeId("cloud")
PLENTY = 1e9
"""What the cloud has of everything."""


@dataclass(frozen=True)
class User:
    """Somebody at a node, by radio."""

    at: NodeId
    mb_per_ms: float
    """At a signal-to-noise ratio of 1."""
    shape: float
    spread: float

    def sent_ms(self, data: float, power: float) -> float:
        """What so many MB take at a signal-to-noise ratio: A / (b log2(1 + gamma))."""
        return data / (self.mb_per_ms * log2(1.0 + power))

    def ages_ms(self, data: float) -> tuple[float, ...]:
        """Quantiles of that: the square of a Nakagami amplitude is Gamma(shape, spread / shape)."""
        shares = (np.arange(AGES) + 0.5) / AGES
        powers = gammaincinv(self.shape, shares) * self.spread / self.shape
        return tuple(self.sent_ms(data, float(power)) for power in powers)


@dataclass(frozen=True)
class Request:
    """One, as it will be sent."""

    number: int
    sent_ms: float
    task: str
    at: NodeId
    age_ms: float
    """When it comes in at its node."""


@dataclass(frozen=True)
class Drawn:
    """A world: its setting at a load of 1, with the mean of what comes, and who sends it."""

    setting: Setting
    speeds: Speeds
    users: tuple[User, ...]


def drawn(scenario: TwoTierScenario, seed: int) -> Drawn:
    """The world of a seed."""
    draws = Draws(seed)
    rng = draws.stream("services")

    def one(span: Span) -> float:
        return float(rng.uniform(*span))

    services, speeds = {}, {}
    for spec in scenario.services:
        tier = scenario.core if spec.core else scenario.light
        speeds[spec.name] = speed = _speed(tier, rng, scenario.slot_ms)
        services[spec.name] = ServiceKind(
            name=spec.name,
            is_core=spec.core,
            needs={key: one(span) for key, span in tier.needs.items()},
            work=one(tier.work),
            output=one(tier.output),
            rate=speed.mean / scenario.slot_ms,
            keep_cost=tier.keep_cost,
            deploy_cost=tier.deploy_cost,
        )
    rng = draws.stream("tasks")
    tasks = {
        each.name: TaskKind(each.name, dict(each.after), one(scenario.input), one(scenario.deadline_ms))
        for each in scenario.tasks
    }
    rng = draws.stream("nodes")
    hosts = {}
    for number in range(scenario.devices + scenario.servers):
        is_server = number >= scenario.devices
        name = NodeId(f"server-{number - scenario.devices}" if is_server else f"device-{number}")
        has = scenario.server if is_server else scenario.device
        hosts[name] = Host(name, str(name), {key: one(span) for key, span in has.items()})
    pairs = [(a, b) for a in hosts for b in hosts if a != b]
    ways = Ways({pair: one(scenario.link) for pair in pairs}, {pair: one(scenario.delay_ms) for pair in pairs})
    rng = draws.stream("users")
    devices = [name for name in hosts if not name.startswith("server")]
    users = tuple(
        User(at, one(scenario.link), one(scenario.fading_shape), one(scenario.fading_spread)) for at in devices
    )
    streams = []
    for user in users:
        rate, shares = one(scenario.arrivals) * scenario.slot_ms, rng.dirichlet(np.ones(len(tasks)))
        streams += [
            Stream(task.name, user.at, float(rate * share), user.ages_ms(task.input))
            for task, share in zip(tasks.values(), shares, strict=True)
        ]
    return Drawn(Setting(services, tasks, hosts, ways, tuple(streams)), Speeds(scenario.slot_ms, speeds), users)


def requests(scenario: TwoTierScenario, found: Drawn, load: float, seed: int) -> tuple[Request, ...]:
    """All that are sent, in order of time, the warm-up's among them."""
    slots = scenario.warmup_slots + scenario.slots
    draws = Draws(seed)
    paces = {task: _pace(scenario, draws.stream(f"bursts of {task}"), slots) for task in found.setting.tasks}
    sent: list[tuple[float, str, NodeId, float]] = []
    for number, stream in enumerate(found.setting.streams):
        rng = draws.stream(f"requests {number} at {load:g}")
        counts = rng.poisson(stream.per_slot * load * paces[stream.task])
        times = (np.repeat(np.arange(slots), counts) + rng.random(counts.sum())) * scenario.slot_ms
        user = next(user for user in found.users if user.at == stream.at)
        powers = rng.gamma(user.shape, user.spread / user.shape, len(times))
        data = found.setting.tasks[stream.task].input
        sent += [
            (float(at), stream.task, stream.at, user.sent_ms(data, max(float(power), 1e-9)))
            for at, power in zip(times, powers, strict=True)
        ]
    return tuple(Request(number, *one) for number, one in enumerate(sorted(sent)))


def trace_hash(found: tuple[Request, ...]) -> str:
    """SHA-256 of all requests, a line each; two runs with one hash were asked the same."""
    digest = sha256()
    for one in found:
        digest.update(f"{round(one.sent_ms * 1e6)} {one.task} {one.at} {round(one.age_ms * 1e3)}\n".encode())
    return digest.hexdigest()


def with_cloud(scenario: TwoTierScenario, found: Drawn) -> Drawn:
    """The same world with a cloud that has plenty of everything, as far away as the scenario says."""
    setting = found.setting
    nodes = list(setting.hosts)
    best = max(setting.ways.mb_per_ms.values(), default=1.0)
    rates = {**setting.ways.mb_per_ms, **{pair: best for node in nodes for pair in ((node, CLOUD), (CLOUD, node))}}
    delays = {
        **setting.ways.delay_ms,
        **{pair: scenario.cloud_delay_ms for node in nodes for pair in ((node, CLOUD), (CLOUD, node))},
    }
    cloud = Host(CLOUD, str(CLOUD), dict.fromkeys(setting.resources, PLENTY))
    hosts = {**setting.hosts, CLOUD: cloud}
    return Drawn(
        Setting(setting.services, setting.tasks, hosts, Ways(rates, delays), setting.streams), found.speeds, found.users
    )


def _speed(tier: TierSpec, rng: np.random.Generator, slot_ms: float) -> Steady | GammaService:
    """What an instance does in a slot."""
    if tier.rate is not None:
        return Steady(float(rng.uniform(*tier.rate)) * slot_ms)
    assert tier.shape is not None and tier.scale is not None
    return GammaService(float(rng.uniform(*tier.shape)), float(rng.uniform(*tier.scale)) * slot_ms)


def _pace(scenario: TwoTierScenario, rng: np.random.Generator, slots: int) -> np.ndarray:
    """By slot: how many times as often as in the mean a task is asked for."""
    if (bursts := scenario.bursts) is None:
        return np.ones(slots)
    calm = (1.0 - bursts.share * bursts.factor) / (1.0 - bursts.share)
    return np.array(list(_spells(rng, slots, bursts.slots, bursts.share, bursts.factor, calm)))


def _spells(
    rng: np.random.Generator, slots: int, mean: float, share: float, factor: float, calm: float
) -> Iterator[float]:
    """Bursts and what is between them, geometric, in the share of the time that is theirs."""
    bursts = bool(rng.random() < share)
    for _ in range(slots):
        yield factor if bursts else calm
        leaves = 1.0 / mean if bursts else share / (1.0 - share) / mean
        if rng.random() < leaves:
            bursts = not bursts
