"""The figures that Prometheus reads."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from worker.log.queue import losses
from worker.service.health import HealthReading


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric as it is exposed, and as the documentation lists it."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()


# A second series beside each counter, which is never used. The annotation is for mypy.
_leave_out_created: Callable[[], None] = disable_created_metrics

USERS_SEEN = Metric("users_sync_users_seen_total", "counter", "Users that sweeps have read.")
ROWS = Metric("users_sync_rows_total", "counter", "What became of the rows of users.", ("outcome",))
REQUESTS = Metric(
    "users_sync_api_requests_total",
    "counter",
    "Requests to Stack Auth by HTTP status, or by what kept one from arriving.",
    ("status",),
)
RETRIES = Metric(
    "users_sync_retries_total", "counter", "Attempts that were repeated, by service.", ("service",)
)
CALL_SECONDS = Metric(
    "users_sync_call_seconds",
    "histogram",
    "Duration of requests that were answered, and of calls that succeeded, by service.",
    ("service",),
)
SWEEP_SECONDS = Metric(
    "users_sync_sweep_seconds", "histogram", "Duration of sweeps over the whole list."
)
POLL_SECONDS = Metric(
    "users_sync_poll_seconds", "histogram", "Duration of looks at the newest users."
)
FRESHNESS = Metric(
    "users_sync_signup_to_row_seconds", "histogram", "Time from a sign-up to its row."
)
SINCE_SWEEP = Metric(
    "users_sync_seconds_since_complete_sweep",
    "gauge",
    "Age of the last complete sweep; absent before the first.",
)
SINCE_POLL = Metric(
    "users_sync_seconds_since_poll", "gauge", "Age of the last poll; absent before the first."
)
OLDEST_CANDIDATE = Metric(
    "users_sync_oldest_candidate_seconds",
    "gauge",
    "Age of the oldest suspicion that a user is gone; absent if there is none.",
)
HELD = Metric("users_sync_deletions_held", "gauge", "Deletions that wait for a person.")
QUARANTINED = Metric("users_sync_quarantined", "gauge", "Records that cannot be stored.")
LEASE_HELD = Metric("users_sync_lease_held", "gauge", "1 if this worker is the one that writes.")
PAGE_SIZE = Metric("users_sync_page_size", "gauge", "Users that are asked for at once.")
WEBHOOKS = Metric(
    "users_sync_webhooks_total",
    "counter",
    "Webhooks received, by the status answered.",
    ("status",),
)
HINTED = Metric(
    "users_sync_hint_to_row_seconds", "histogram", "Time from a hint until it was followed."
)
LOG_LINES_DROPPED = Metric(
    "users_sync_log_lines_dropped_total",
    "counter",
    "Log lines that were lost because they were not read, or could not be written.",
)

COUNTERS = (USERS_SEEN, ROWS, REQUESTS, RETRIES, WEBHOOKS, LOG_LINES_DROPPED)
HISTOGRAMS = (CALL_SECONDS, SWEEP_SECONDS, POLL_SECONDS, FRESHNESS, HINTED)
GAUGES: tuple[tuple[Metric, Callable[[HealthReading], float | None]], ...] = (
    (SINCE_SWEEP, lambda seen: seen.seconds_since_sweep),
    (SINCE_POLL, lambda seen: seen.seconds_since_poll),
    (OLDEST_CANDIDATE, lambda seen: seen.oldest_candidate_seconds),
    (HELD, lambda seen: seen.held),
    (QUARANTINED, lambda seen: seen.quarantined),
    (LEASE_HELD, lambda seen: seen.lease_held),
    (PAGE_SIZE, lambda seen: seen.page_size),
)
METRICS = (*COUNTERS, *HISTOGRAMS, *(metric for metric, _ in GAUGES))

OUTCOMES = (
    "inserted",
    "updated",
    "restored",
    "unchanged",
    "stale",
    "deleted",
    "approved",
    "quarantined",
)

# From a statement on a database next door to a page of many users from a busy API.
CALL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
# From a small project's single page to the hour that millions of users take.
SWEEP_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
POLL_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
# Finest around the promise: most within 0.7 s, nearly all within 1.2 s.
FRESHNESS_BUCKETS = (0.1, 0.25, 0.5, 0.7, 1, 1.2, 1.5, 2, 3, 5, 10, 30, 60, 300, 3600)


class _Gauges(Collector):
    """Reads the health once a scrape, so that ages are those of the moment and all agree."""

    def __init__(self, health: Callable[[], HealthReading]) -> None:
        self._health = health

    def collect(self) -> Iterable[GaugeMetricFamily]:
        seen = self._health()
        for metric, read in GAUGES:
            value = read(seen)
            if value is not None:
                yield GaugeMetricFamily(metric.name, metric.help, value=float(value))


class _LostLines(Collector):
    """Reads how many log lines this process has lost."""

    def collect(self) -> Iterable[CounterMetricFamily]:
        metric = LOG_LINES_DROPPED
        yield CounterMetricFamily(metric.name, metric.help, value=losses.total)


class Metrics:
    """The metrics of one worker, in a registry of their own. Safe to be called from any thread.

    Without the `health` of one target there are no gauges but those of `more`.
    """

    def __init__(self, health: Callable[[], HealthReading] | None = None, *more: Collector) -> None:
        _leave_out_created()
        self._registry = CollectorRegistry()
        self._users_seen = self._counter(USERS_SEEN)
        self._rows = self._counter(ROWS)
        self._requests = self._counter(REQUESTS)
        self._retries = self._counter(RETRIES)
        self._call_seconds = self._histogram(CALL_SECONDS, CALL_BUCKETS)
        self._sweep_seconds = self._histogram(SWEEP_SECONDS, SWEEP_BUCKETS)
        self._poll_seconds = self._histogram(POLL_SECONDS, POLL_BUCKETS)
        self._freshness = self._histogram(FRESHNESS, FRESHNESS_BUCKETS)
        self._hinted = self._histogram(HINTED, FRESHNESS_BUCKETS)
        self._webhooks = self._counter(WEBHOOKS)
        self._registry.register(_LostLines())
        for collector in (*([_Gauges(health)] if health else []), *more):
            self._registry.register(collector)
        for outcome in OUTCOMES:  # a rate needs the zero before the first one
            self._rows.labels(outcome)

    def count_rows(self, counts: Mapping[str, int]) -> None:
        """Count what a sweep or a poll did, named as in its report; `users` are those seen.

        What is no outcome of a row, such as `pages`, counts for nothing.
        """
        self._users_seen.inc(counts.get("users", 0))
        for outcome in OUTCOMES:
            self._rows.labels(outcome).inc(counts.get(outcome, 0))

    def count_request(self, status: str, seconds: float) -> None:
        """Count a request: `200`, or what came instead, such as `timeout`; measure an answer."""
        self._requests.labels(status).inc()
        if status.isdecimal():
            self.observe_call("Stack Auth", seconds)

    def count_webhook(self, status: str) -> None:
        """Count a webhook by the status that it was answered with."""
        self._webhooks.labels(status).inc()

    def observe_hint(self, seconds: float) -> None:
        """Take in how long a hint waited until the row agreed with the API's answer."""
        self._hinted.observe(max(0.0, seconds))

    def count_retry(self, service: str) -> None:
        self._retries.labels(service).inc()

    def observe_call(self, service: str, seconds: float) -> None:
        """Take in how long a call took; `service` is as in retries."""
        self._call_seconds.labels(service).observe(seconds)

    def observe_sweep(self, seconds: float) -> None:
        self._sweep_seconds.observe(seconds)

    def observe_poll(self, seconds: float) -> None:
        self._poll_seconds.observe(seconds)

    def observe_freshness(self, seconds: float) -> None:
        """Take in how long a sign-up took to its row; clocks that differ make no negative time."""
        self._freshness.observe(max(0.0, seconds))

    def render(self) -> tuple[bytes, str]:
        """Return all metrics as Prometheus reads them, and the content type of that."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def families(self) -> Iterable[Family]:
        """Return all metrics as they are now, with their samples."""
        return self._registry.collect()

    def _counter(self, metric: Metric) -> Counter:
        return Counter(metric.name, metric.help, metric.labels, registry=self._registry)

    def _histogram(self, metric: Metric, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            metric.name, metric.help, metric.labels, registry=self._registry, buckets=buckets
        )
