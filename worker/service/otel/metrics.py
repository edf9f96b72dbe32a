"""Sends what /metrics shows, now and then: read from the same registry, so that both agree."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from threading import Event, Thread
from time import time_ns
from typing import Any

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricExportResult,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.samples import Sample

from worker import installed_version
from worker.service.otel.sending import CollectorSession

Families = Callable[[], Iterable[Family]]
Labels = tuple[tuple[str, str], ...]

# The label of a bucket: its upper bound.
LE = "le"

CUMULATIVE = AggregationTemporality.CUMULATIVE
# Of a histogram, Prometheus knows neither the least nor the greatest value.
UNKNOWN: Any = None


class Metrics:
    """Sends metrics to a collector, every so many seconds and once more in the end."""

    def __init__(self, session: CollectorSession, resource: Resource) -> None:
        self.session = session
        self._resource = resource
        self._scope = InstrumentationScope("users-sync", installed_version())
        self._exporter = OTLPMetricExporter(session=session)
        self._began_ns = time_ns()
        self._ended = Event()
        self._thread: Thread | None = None

    def start(self, families: Families, seconds: float) -> None:
        """Send these from now on, in a thread that no process waits for."""
        self._thread = Thread(
            target=self._run, args=(families, seconds), name="otel-metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Send once more, and wait for that."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, families: Families, seconds: float) -> None:
        while not self._ended.wait(seconds):
            self._send(families)
        self._send(families)

    def _send(self, families: Families) -> None:
        points = Points(self._began_ns, time_ns())
        metrics = [metric for family in families() for metric in points.of(family)]
        scoped = ScopeMetrics(self._scope, metrics, "")
        data = MetricsData([ResourceMetrics(self._resource, [scoped], "")])
        self.session.sent(lambda: self._exporter.export(data) is MetricExportResult.SUCCESS)


@dataclass(frozen=True, slots=True)
class Points:
    """Says what Prometheus' samples are to OpenTelemetry, from a beginning to now."""

    began_ns: int
    now_ns: int

    def of(self, family: Family) -> Iterator[Metric]:
        """Give the metric by the name that /metrics has; none if there is no sample."""
        samples, text = family.samples, family.documentation
        if not samples:
            return
        if family.type == "histogram":
            points = [self._histogram(labels, each) for labels, each in _by_labels(samples)]
            yield Metric(family.name, text, "", Histogram(points, CUMULATIVE))
        elif family.type == "counter":
            data = Sum(self._numbers(samples), CUMULATIVE, is_monotonic=True)
            yield Metric(samples[0].name, text, "", data)
        else:
            yield Metric(family.name, text, "", Gauge(self._numbers(samples)))

    def _numbers(self, samples: Iterable[Sample]) -> list[NumberDataPoint]:
        return [
            NumberDataPoint(each.labels, self.began_ns, self.now_ns, each.value) for each in samples
        ]

    def _histogram(self, labels: Labels, samples: Sequence[Sample]) -> HistogramDataPoint:
        """Join the samples of one histogram, each of whose buckets counts those below it, too."""
        by_name = {each.name.rpartition("_")[2]: each.value for each in samples}
        buckets = [(each.labels[LE], int(each.value)) for each in samples if LE in each.labels]
        counts = [0, *(count for _, count in buckets)]
        return HistogramDataPoint(
            attributes=dict(labels),
            start_time_unix_nano=self.began_ns,
            time_unix_nano=self.now_ns,
            count=int(by_name["count"]),
            sum=by_name["sum"],
            bucket_counts=[after - before for before, after in pairwise(counts)],
            explicit_bounds=[float(bound) for bound, _ in buckets if bound != "+Inf"],
            min=UNKNOWN,
            max=UNKNOWN,
        )


def _by_labels(samples: Iterable[Sample]) -> Iterable[tuple[Labels, list[Sample]]]:
    """Part the samples of histograms by their labels, but for the bound of a bucket."""
    parts: dict[Labels, list[Sample]] = {}
    for sample in samples:
        labels = tuple((name, value) for name, value in sample.labels.items() if name != LE)
        parts.setdefault(labels, []).append(sample)
    return parts.items()
