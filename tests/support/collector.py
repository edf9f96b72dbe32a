"""A collector of OpenTelemetry: what was sent by OTLP over HTTP, decoded."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from tests.support.receiver import Receiver

TRACES, METRICS = "/v1/traces", "/v1/metrics"


@dataclass(frozen=True)
class Span:
    """One span as it came; `parent` is empty for the root of a trace."""

    name: str
    id: bytes
    parent: bytes
    trace: bytes
    began: int
    ended: int
    failed: bool
    attributes: dict[str, Any]
    events: int


def spans(collector: Receiver) -> list[Span]:
    return [
        Span(
            name=span.name,
            id=span.span_id,
            parent=span.parent_span_id,
            trace=span.trace_id,
            began=span.start_time_unix_nano,
            ended=span.end_time_unix_nano,
            failed=span.status.code == Status.STATUS_CODE_ERROR,
            attributes=_attributes(span.attributes),
            events=len(span.events),
        )
        for request in _decoded(collector, TRACES, ExportTraceServiceRequest)
        for of_resource in request.resource_spans
        for of_scope in of_resource.scope_spans
        for span in of_scope.spans
    ]


def resources(collector: Receiver, path: str) -> list[dict[str, Any]]:
    """Give what the senders say of themselves."""
    if path == TRACES:
        traces = _decoded(collector, path, ExportTraceServiceRequest)
        return [_attributes(r.resource.attributes) for each in traces for r in each.resource_spans]
    metrics = _decoded(collector, path, ExportMetricsServiceRequest)
    return [_attributes(r.resource.attributes) for each in metrics for r in each.resource_metrics]


def pushes(collector: Receiver) -> list[dict[str, float]]:
    """Give each push of metrics as the samples that Prometheus would read: buckets added up."""
    return [
        dict(
            sample
            for of_resource in request.resource_metrics
            for of_scope in of_resource.scope_metrics
            for metric in of_scope.metrics
            for sample in _samples(metric)
        )
        for request in _decoded(collector, METRICS, ExportMetricsServiceRequest)
    ]


def kinds(collector: Receiver) -> dict[str, tuple[str, str]]:
    """Give kind and description of each metric of the last push; sums rise, from a beginning."""
    request = _decoded(collector, METRICS, ExportMetricsServiceRequest)[-1]
    found: dict[str, tuple[str, str]] = {}
    for metric in request.resource_metrics[0].scope_metrics[0].metrics:
        kind = metric.WhichOneof("data")
        data = getattr(metric, kind)
        if kind in {"sum", "histogram"}:
            cumulative = AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
            assert data.aggregation_temporality == cumulative
            assert all(0 < p.start_time_unix_nano <= p.time_unix_nano for p in data.data_points)
        if kind == "sum":
            assert data.is_monotonic
        found[metric.name] = ({"sum": "counter"}.get(kind, kind), metric.description)
    return found


def named(name: str, labels: dict[str, str]) -> str:
    return "/".join([name, *(value for _, value in sorted(labels.items()))])


def _samples(metric: Any) -> Iterator[tuple[str, float]]:
    kind = metric.WhichOneof("data")
    for point in getattr(metric, kind).data_points:
        labels = _attributes(point.attributes)
        if kind != "histogram":
            yield named(metric.name, labels), point.as_double
            continue
        assert {point.HasField("min"), point.HasField("max")} == {False}
        below = 0
        bounds = [*point.explicit_bounds, float("inf")]
        for bound, count in zip(bounds, point.bucket_counts, strict=True):
            below += count
            yield named(f"{metric.name}_bucket", {**labels, "le": f"{bound}"}), below
        yield named(f"{metric.name}_count", labels), point.count
        yield named(f"{metric.name}_sum", labels), point.sum


def _decoded(collector: Receiver, path: str, kind: Any) -> list[Any]:
    return [
        kind.FromString(request.body)
        for request in list(collector.requests)
        if request.path == path
    ]


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, str(pair.value.WhichOneof("value"))) for pair in pairs}
