"""What a worker of the fleet knows of itself and of the others, for the endpoints."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from threading import Lock

from prometheus_client import Counter, Histogram
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from worker.fleet.control import STATES, Overview
from worker.fleet.site import Outcome
from worker.service.metrics import Metric

VISITS = Metric(
    "users_sync_fleet_visits_total", "counter", "Visits of this worker by outcome.", ("outcome",)
)
VISIT_SECONDS = Metric("users_sync_fleet_visit_seconds", "histogram", "Duration of visits.")
BUDGET_WAIT = Metric(
    "users_sync_fleet_budget_wait_seconds",
    "histogram",
    "How long requests waited for the budget of their API host.",
)
PROJECTS = Metric(
    "users_sync_fleet_projects", "gauge", "Projects of the whole fleet by state.", ("state",)
)
CYCLE = Metric(
    "users_sync_fleet_cycle_seconds",
    "gauge",
    "How often the budget of an API host allows a visit to each of its projects.",
    ("host",),
)
FRESH = Metric(
    "users_sync_fleet_fresh_seconds",
    "gauge",
    "Age of the last visit that ended well; absent for a paused project, and for all with more"
    " projects than fleet.metrics_projects.",
    ("project",),
)
IN_MEMORY = Metric(
    "users_sync_fleet_projects_in_memory", "gauge", "Projects whose mirrors this worker has."
)
MIRROR_BYTES = Metric("users_sync_fleet_mirror_bytes", "gauge", "About what these mirrors take.")
SINCE_CONTROL = Metric(
    "users_sync_fleet_seconds_since_control",
    "gauge",
    "Age of the last answer of the control database.",
)
FLEET_METRICS = (
    VISITS,
    VISIT_SECONDS,
    BUDGET_WAIT,
    PROJECTS,
    CYCLE,
    FRESH,
    IN_MEMORY,
    MIRROR_BYTES,
    SINCE_CONTROL,
)

OUTCOMES = ("done", "cut", "stopped", "standing by", "failed")
VISIT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 60)
WAIT_BUCKETS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

# A worker without the control database makes no visits.
LONGEST_WITHOUT_CONTROL_SECONDS = 30.0
LONGEST_SILENCE_SECONDS = 30.0


@dataclass(slots=True, eq=False)
class FleetTelemetry(Collector):
    """Safe to be called from any thread. Moments are seconds of `monotonic`."""

    worker: str
    metrics_projects: int
    monotonic: Callable[[], float] = time.monotonic
    workers: int = 0
    in_memory: int = 0
    mirror_bytes: int = 0
    overview: Overview = field(default_factory=lambda: Overview({}, (), ()))
    _overview_at: float = field(init=False)
    _beat_at: float = field(init=False)
    _control_at: float = field(init=False)
    _visits: Counter = field(init=False)
    _visit_seconds: Histogram = field(init=False)
    _budget_wait: Histogram = field(init=False)
    _ended: dict[str, int] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        self._beat_at = self._control_at = self._overview_at = self.monotonic()
        self._visits = Counter(VISITS.name, VISITS.help, VISITS.labels, registry=None)
        for outcome in OUTCOMES:  # a rate needs the zero before the first one
            self._visits.labels(outcome)
        self._visit_seconds = Histogram(
            VISIT_SECONDS.name, VISIT_SECONDS.help, registry=None, buckets=VISIT_BUCKETS
        )
        self._budget_wait = Histogram(
            BUDGET_WAIT.name, BUDGET_WAIT.help, registry=None, buckets=WAIT_BUCKETS
        )

    def visited(self, _name: str, outcome: Outcome, seconds: float) -> None:
        """Take in a visit that ended."""
        self._visits.labels(outcome.outcome).inc()
        self._visit_seconds.observe(seconds)
        with self._lock:
            self._ended[outcome.outcome] = self._ended.get(outcome.outcome, 0) + 1

    def waited(self, seconds: float) -> None:
        """Take in how long a request waited for its turn."""
        self._budget_wait.observe(seconds)

    def beat(self) -> None:
        """Tell that the main loop goes round."""
        self._beat_at = self.monotonic()

    def control_answered(self) -> None:
        self._control_at = self.monotonic()

    def see(self, overview: Overview) -> None:
        """Take in how the whole fleet is."""
        self.overview, self._overview_at = overview, self.monotonic()

    @property
    def seconds_since_overview(self) -> float:
        return self.monotonic() - self._overview_at

    @property
    def ended(self) -> dict[str, int]:
        """Count the visits of this worker by outcome."""
        with self._lock:
            return dict(self._ended)

    @property
    def seconds_since_control(self) -> float:
        return self.monotonic() - self._control_at

    @property
    def not_alive(self) -> tuple[str, ...]:
        """Say why only a restart can help; nothing if none is needed."""
        still = self.monotonic() - self._beat_at > LONGEST_SILENCE_SECONDS
        return ("the main loop stands still",) if still else ()

    @property
    def not_ready(self) -> tuple[str, ...]:
        """Say why this worker makes no visits; how single projects are is no matter of it."""
        seconds = self.seconds_since_control
        if seconds <= LONGEST_WITHOUT_CONTROL_SECONDS:
            return self.not_alive
        return (*self.not_alive, f"the control database has not answered for {seconds:.0f} s")

    def collect(self) -> Iterable[Family]:
        yield from self._visits.collect()
        yield from self._visit_seconds.collect()
        yield from self._budget_wait.collect()
        seen = self.overview
        yield _gauge(PROJECTS, {state: float(seen.counts.get(state, 0)) for state in STATES})
        yield _gauge(CYCLE, {host: cycle for host, _, cycle in seen.hosts})
        if sum(seen.counts.values()) <= self.metrics_projects:
            visited = (row for row in seen.worst if row["state"] != "paused")
            fresh = {row["name"]: row["fresh_seconds"] for row in visited}
            yield _gauge(FRESH, {name: age for name, age in fresh.items() if age is not None})
        yield _gauge(IN_MEMORY, self.in_memory)
        yield _gauge(MIRROR_BYTES, self.mirror_bytes)
        yield _gauge(SINCE_CONTROL, self.seconds_since_control)


def _gauge(metric: Metric, values: dict[str, float] | float) -> GaugeMetricFamily:
    if not isinstance(values, dict):
        return GaugeMetricFamily(metric.name, metric.help, value=values)
    family = GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
    for label, value in values.items():
        family.add_metric([label], value)
    return family
