"""Requests in traces: who sends a `traceparent` (W3C) sees its request here as a span, and each stage's part in it.

Spans are OpenTelemetry's. Where no exporter is set up they cost next to nothing, and of a request that came without a
`traceparent` no span is begun at all: whether something is traced is decided where requests come from. A span has
figures and names in it, and no content.
"""

import time
from collections.abc import Mapping
from typing import Any

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

HEADER = "traceparent"
HEADER_CHARS = 55

_tracer = trace.get_tracer("resplit.agent")
_form = TraceContextTextMapPropagator()


class Trace:
    """One request's span at its ingress."""

    def __init__(self, span: Span | None = None) -> None:
        self._span = span

    @classmethod
    def begun(cls, headers: Mapping[str, str] | None, name: str, deployment: str, request: str) -> "Trace":
        """From now on, if the message that brought the request had a `traceparent`; what is malformed is passed
        over."""
        said = (headers or {}).get(HEADER, "")
        if len(said) != HEADER_CHARS:
            return cls()
        parent = _form.extract({HEADER: said})
        if not trace.get_current_span(parent).get_span_context().is_valid:
            return cls()
        attributes = {
            "gen_ai.operation.name": name,
            "gen_ai.request.model": deployment,
            "gen_ai.provider.name": "resplit",
            "resplit.request": request,
        }
        return cls(_tracer.start_span(f"{name} {deployment}", parent, SpanKind.SERVER, attributes))

    @property
    def header(self) -> str:
        """What the stages are told, so that their spans belong to this one; nothing if there is none."""
        if self._span is None:
            return ""
        carrier: dict[str, str] = {}
        _form.inject(carrier, trace.set_span_in_context(self._span))
        return carrier.get(HEADER, "")

    @property
    def id(self) -> str | None:
        """By which an event of the trail names the trace."""
        return None if self._span is None else f"{self._span.get_span_context().trace_id:032x}"

    def saw(self, what: str) -> None:
        """Something happened to it now."""
        if self._span is not None:
            self._span.add_event(what)

    def ended(self, code: str | None, **attributes: str | int | float) -> None:
        """In output, or in an error of this code."""
        span, self._span = self._span, None
        if span is None:
            return
        span.set_attributes(attributes)
        if code is not None:
            span.set_attribute("error.type", code)
            span.set_status(Status(StatusCode.ERROR))
        span.end()


def stage_ended(header: str, name: str, lasted_us: int, attributes: Mapping[str, Any]) -> None:
    """A stage has done its part of a traced sequence, which began so long ago."""
    if not header:
        return
    now = time.time_ns()
    parent = _form.extract({HEADER: header})
    span = _tracer.start_span(name, parent, SpanKind.INTERNAL, attributes, start_time=now - 1000 * lasted_us)
    span.end(now)
