"""What Prometheus reads, and that the list of it is right."""

import pytest
from prometheus_client import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

from tests.support.worker_samples import Ticks, sample_sweep, sample_vitals
from worker.service.health import Health
from worker.service.metrics import METRICS, OUTCOMES, Metrics


@pytest.fixture
def ticks() -> Ticks:
    return Ticks()


@pytest.fixture
def health(ticks: Ticks) -> Health:
    return sample_vitals(ticks)


@pytest.fixture
def metrics(health: Health) -> Metrics:
    return Metrics(health.read)


def families(metrics: Metrics) -> dict[str, Family]:
    body, _ = metrics.render()
    return {family.name: family for family in text_string_to_metric_families(body.decode())}


def figures(metrics: Metrics) -> dict[str, float]:
    """Return each sample by its name and the values of its labels."""
    return {
        "/".join([sample.name, *sample.labels.values()]): sample.value
        for family in families(metrics).values()
        for sample in family.samples
    }


def have_everything_happen(health: Health, metrics: Metrics) -> None:
    health.sweep_finished(sample_sweep())
    health.poll_finished()
    health.set_deletions(held=7, candidates=1, oldest_candidate_since=1000.0)
    health.set_page_size(5000)
    metrics.count_request("200", 0.2)
    metrics.count_retry("Stack Auth")
    metrics.count_webhook("204")


def test_list_of_metrics_is_what_is_exposed(health: Health, metrics: Metrics) -> None:
    have_everything_happen(health, metrics)
    listed = {(metric.name.removesuffix("_total"), metric.kind, metric.help) for metric in METRICS}
    exposed = {(f.name, f.type, f.documentation) for f in families(metrics).values()}
    assert exposed == listed


def test_list_of_metrics_names_the_labels(health: Health, metrics: Metrics) -> None:
    have_everything_happen(health, metrics)
    listed = {metric.name.removesuffix("_total"): set(metric.labels) for metric in METRICS}
    exposed = {
        family.name: {label for sample in family.samples for label in sample.labels} - {"le"}
        for family in families(metrics).values()
    }
    assert exposed == listed


def test_what_is_not_known_is_absent(metrics: Metrics) -> None:
    absent = {
        "users_sync_seconds_since_complete_sweep",
        "users_sync_seconds_since_poll",
        "users_sync_oldest_candidate_seconds",
        "users_sync_page_size",
    }
    assert absent.isdisjoint(families(metrics))


def test_every_outcome_begins_at_zero(metrics: Metrics) -> None:
    seen = figures(metrics)
    assert [seen[f"users_sync_rows_total/{outcome}"] for outcome in OUTCOMES] == [0] * len(OUTCOMES)


def test_rows_are_counted_by_outcome(metrics: Metrics) -> None:
    metrics.count_rows({"pages": 3, "users": 200, "inserted": 2, "unchanged": 198})
    metrics.count_rows({"users": 100, "inserted": 1, "held": 9})
    seen = figures(metrics)
    assert seen["users_sync_users_seen_total"] == 300
    assert seen["users_sync_rows_total/inserted"] == 3
    assert seen["users_sync_rows_total/unchanged"] == 198
    assert not {"users_sync_rows_total/pages", "users_sync_rows_total/held"} & set(seen)


def test_requests_and_retries_are_counted(metrics: Metrics) -> None:
    for status in ("200", "200", "timeout"):
        metrics.count_request(status, 0.2)
    metrics.count_retry("the database")
    seen = figures(metrics)
    assert seen["users_sync_api_requests_total/200"] == 2
    assert seen["users_sync_api_requests_total/timeout"] == 1
    assert seen["users_sync_call_seconds_count/Stack Auth"] == 2  # no answer took no time
    assert seen["users_sync_retries_total/the database"] == 1


def test_durations_fall_into_buckets(metrics: Metrics) -> None:
    metrics.observe_sweep(20)
    metrics.observe_poll(0.02)
    metrics.observe_call("the database", 0.002)
    metrics.observe_freshness(0.6)
    metrics.observe_freshness(-0.1)  # the API's clock is ahead of ours
    seen = figures(metrics)
    assert seen["users_sync_sweep_seconds_sum"] == 20
    assert seen["users_sync_poll_seconds_bucket/0.025"] == 1
    assert seen["users_sync_call_seconds_bucket/0.001/the database"] == 0
    assert seen["users_sync_call_seconds_bucket/0.0025/the database"] == 1
    assert seen["users_sync_signup_to_row_seconds_bucket/0.1"] == 1
    assert seen["users_sync_signup_to_row_seconds_bucket/0.7"] == 2


def test_gauges_are_of_the_moment_of_the_scrape(
    health: Health, metrics: Metrics, ticks: Ticks
) -> None:
    have_everything_happen(health, metrics)
    health.set_quarantined(4)
    health.set_lease(True)
    ticks.seconds = 12
    seen = figures(metrics)
    assert seen["users_sync_seconds_since_complete_sweep"] == 12
    assert seen["users_sync_seconds_since_poll"] == 12
    assert seen["users_sync_oldest_candidate_seconds"] == 12
    assert seen["users_sync_deletions_held"] == 7
    assert seen["users_sync_quarantined"] == 4
    assert seen["users_sync_lease_held"] == 1
    assert seen["users_sync_page_size"] == 5000


def test_two_workers_in_one_process_share_nothing(health: Health) -> None:
    one, other = Metrics(health.read), Metrics(health.read)
    one.count_rows({"users": 5})
    assert figures(other)["users_sync_users_seen_total"] == 0
