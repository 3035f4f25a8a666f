"""What Prometheus reads of a gateway. Names are those of OpenTelemetry's conventions for generative AI, where they
exist, written as Prometheus writes them."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from profiler.exposition import FIRST_S, PACE_S

TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)
ABOUT = ("gen_ai_operation_name", "gen_ai_request_model")
UNKNOWN = "unknown"
"""A deployment that does not exist: names that clients make up are no labels."""


class Measures:
    """The figures of one gateway."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._first = self._histogram("gen_ai_server_time_to_first_token", "Until the first token came.", FIRST_S)
        self._pace = self._histogram("gen_ai_server_time_per_output_token", "Between tokens after the first.", PACE_S)
        self._duration = Histogram(
            "gen_ai_server_request_duration_seconds",
            "Of a request, from when it was read until its last byte was there.",
            (*ABOUT, "error_type"),
            buckets=FIRST_S,
            registry=self.registry,
        )
        self._tokens = Histogram(
            "gen_ai_client_token_usage",
            "Tokens of a request, read (input) and said (output).",
            (*ABOUT, "gen_ai_token_type"),
            buckets=TOKENS,
            registry=self.registry,
        )
        self._running = Gauge(
            "resplit_gateway_requests_running", "Requests that run or wait now.", registry=self.registry
        )
        self._refused = Counter(
            "resplit_gateway_unauthorized", "Requests without an API key that is known.", registry=self.registry
        )

    def first_token(self, operation: str, deployment: str, seconds: float) -> None:
        self._first.labels(operation, deployment).observe(seconds)

    def pace(self, operation: str, deployment: str, seconds: float) -> None:
        self._pace.labels(operation, deployment).observe(seconds)

    def ended(self, operation: str, deployment: str, seconds: float, code: str | None) -> None:
        """A request ended, in output or with an error of this code."""
        named = UNKNOWN if code == "unknown_deployment" else deployment
        self._duration.labels(operation, named, code or "").observe(seconds)

    def used(self, operation: str, deployment: str, prompt_tokens: int, completion_tokens: int) -> None:
        self._tokens.labels(operation, deployment, "input").observe(prompt_tokens)
        if completion_tokens:
            self._tokens.labels(operation, deployment, "output").observe(completion_tokens)

    def running(self, change: int) -> None:
        self._running.inc(change)

    def unauthorized(self) -> None:
        self._refused.inc()

    def page(self) -> tuple[bytes, str]:
        """All of it as Prometheus reads it, and the content type of that."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"{name}_seconds", what, ABOUT, buckets=buckets, registry=self.registry)
