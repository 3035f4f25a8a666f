"""Sending traces somewhere, as OpenTelemetry's own environment variables say."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import trace

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

log = logging.getLogger(__name__)


@contextmanager
def traced(service: str, instance: str) -> Iterator[None]:
    """Export spans over OTLP (HTTP) for as long as this lasts, if one of `ENDPOINTS` is set; what is left is sent at
    the end. Headers, timeouts and sampling are OpenTelemetry's variables too."""
    if not any(os.environ.get(name) for name in ENDPOINTS):
        yield
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError as error:
        log.warning("%s is set, but traces need: pip install 'resplit[traces]' (%s)", ENDPOINTS[0], error)
        yield
        return
    resource = Resource.create({"service.name": service, "service.instance.id": instance})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        provider.shutdown()
