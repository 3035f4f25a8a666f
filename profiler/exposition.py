"""What a process shows Prometheus: figures as they were last told, over HTTP, to whoever may reach the address.

The server runs in a thread of its own and reads values that never change once they are told, so a scrape waits for
nobody and disturbs nobody.
"""

import ipaddress
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from schemas.errors import ErrorCode, ResplitError

FIRST_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0)
PACE_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
"""Buckets of seconds, to a first token or a whole answer and between tokens: the same wherever they are measured."""

Labels = Mapping[str, str]
Sample = tuple[Labels, float | None]


class Told(Collector):
    """The figures that were told last."""

    def __init__(self) -> None:
        self._families: tuple[Metric, ...] = ()

    def tell(self, families: Iterable[Metric]) -> None:
        """From now on these."""
        self._families = tuple(families)

    def collect(self) -> Iterator[Metric]:
        return iter(self._families)


def gauge(name: str, what: str, labels: Sequence[str], samples: Iterable[Sample]) -> Metric:
    """A family of figures that rise and fall; one that is None is left out."""
    return _filled(GaugeMetricFamily(name, what, labels=labels), labels, samples)


def counter(name: str, what: str, labels: Sequence[str], samples: Iterable[Sample]) -> Metric:
    """A family of figures that grow as long as the process lives."""
    return _filled(CounterMetricFamily(name, what, labels=labels), labels, samples)


def troubles(source: str, counts: Mapping[str, int]) -> Metric:
    """What a connection to NATS met (`natstls.client.SafeClient.troubles`)."""
    return counter(
        "resplit_bus_troubles",
        "Connections to NATS lost, hung; messages denied by the server, dropped unhandled, refused unsent.",
        ("source", "kind"),
        [({"source": source, "kind": kind}, count) for kind, count in sorted(counts.items())],
    )


@contextmanager
def exposed(listen: str | None, registry: CollectorRegistry) -> Iterator[None]:
    """Show `registry` at `listen`, host:port, for as long as this lasts; nothing where it is None.

    Raises `ResplitError(INVALID_REQUEST)` for an address that is none, or where nobody can listen. Whoever reaches it
    reads it: there are names of nodes and deployments in it, and no content.
    """
    if listen is None:
        yield
        return
    host, port = _address(listen)
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        message = f"cannot listen at {listen} for metrics: {error.strerror}; choose another --metrics"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "metrics") from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _address(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        ipaddress.ip_address(host)
        assert 0 < int(port) < 1 << 16
    except (ValueError, AssertionError) as error:
        message = f"{listen!r} is not an address and a port such as 127.0.0.1:9100"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "metrics") from error
    return host, int(port)


def _filled(
    family: GaugeMetricFamily | CounterMetricFamily, labels: Sequence[str], samples: Iterable[Sample]
) -> Metric:
    for given, value in samples:
        if value is not None:
            family.add_metric([given[label] for label in labels], value)
    return family
