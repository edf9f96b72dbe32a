"""Traces and metrics as a collector receives them, and what happens where there is none."""

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.parser import text_string_to_metric_families

from tests.support.collector import (
    METRICS,
    TRACES,
    Span,
    kinds,
    named,
    pushes,
    resources,
    spans,
)
from tests.support.faulty_server import serving
from tests.support.processes import PATIENCE_SECONDS, Running, Shell, Site, command, opened_site
from tests.support.receiver import Receiver, receiving
from tests.support.waiting import until
from tests.support.worker_samples import Ticks, sample_sweep, sample_vitals
from worker.errors import Misconfigured
from worker.sandbox.api import server_error
from worker.service.metrics import METRICS as LISTED
from worker.service.metrics import Metrics
from worker.service.otel.exporting import exporting
from worker.service.otel.variables import interval_seconds, wanted

# Nobody listens there.
NOWHERE = "http://me:hush-hush@127.0.0.1:1"
REFUSING = """
create function neon_auth.refuse() returns trigger language plpgsql as
    $$ begin raise exception 'refused: %', new.raw_json; end $$;
create trigger refuse before insert on neon_auth.users_sync
    for each row when (new.raw_json ->> 'id' = '{}') execute function neon_auth.refuse()
"""


@pytest.fixture
def site(database_url: str, tmp_path: Path) -> Iterator[Site]:
    with opened_site(database_url, tmp_path) as site:
        yield site


@pytest.fixture
def collector() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


def sending(site: Site, endpoint: str, **variables: str) -> Shell:
    """Give a shell that sends to this endpoint, often and without much patience."""
    shell = site.shell.having(
        USERS_SYNC_OTEL__ENABLED="true",
        USERS_SYNC_STACK__PAGE_SIZE="10",
        OTEL_EXPORTER_OTLP_ENDPOINT=endpoint,
        OTEL_EXPORTER_OTLP_HEADERS="api-key=hush-hush,second=hush-two",
        OTEL_EXPORTER_OTLP_TIMEOUT="1",
        OTEL_BSP_SCHEDULE_DELAY="50",
        OTEL_METRIC_EXPORT_INTERVAL="50",
    )
    return shell.having(**variables)


def logged(running: Running, event: str) -> int:
    return running.stdout.read_text("utf-8").count(f'"event": "{event}"')


def children(all_spans: list[Span], parent: Span, name: str) -> list[Span]:
    return [span for span in all_spans if span.parent == parent.id and span.name == name]


# Traces


def test_trace_is_a_sweep_with_its_pages_and_their_transactions(
    site: Site, collector: Receiver
) -> None:
    site.project.populate(45)
    ended = sending(site, collector.url).run("--once")
    assert (ended.code, ended.stderr) == (0, "")
    sent = spans(collector)
    by_id = {span.id: span for span in sent}
    [sweep] = [span for span in sent if not span.parent]
    finished = ended.event("sweep.finished")
    pages = children(sent, sweep, "page")
    assert sweep.name == "sweep"
    assert {span.trace for span in sent} == {sweep.trace}
    assert len(pages) == finished["pages"] > 4
    # Each page has new users, and each transaction of a page is one of its own.
    assert [len(children(sent, page, "transaction")) for page in pages] == [1] * len(pages)
    # The end of a sweep is written beside its pages.
    assert len(children(sent, sweep, "transaction")) == 1
    assert len(sent) == 1 + 2 * len(pages) + 1
    for span in sent:
        parent = by_id.get(span.parent, span)
        assert parent.began <= span.began <= span.ended <= parent.ended
        assert not span.failed


def test_sweep_is_sent_with_the_figures_of_the_log(site: Site, collector: Receiver) -> None:
    site.project.populate(3)
    finished = sending(site, collector.url).run("--once").event("sweep.finished")
    [sweep] = [span for span in spans(collector) if span.name == "sweep"]
    figures = {name.removeprefix("users_sync."): what for name, what in sweep.attributes.items()}
    assert {"sweep", "kind", "outcome", "users", "inserted", "deleted"} <= figures.keys()
    assert figures.pop("target") == "neon_auth"
    assert figures == {name: finished[name] for name in figures}
    assert figures["inserted"] == 3


def test_empty_project_is_a_sweep_with_one_page(site: Site, collector: Receiver) -> None:
    assert sending(site, collector.url).run("--once").code == 0
    sent = spans(collector)
    assert sorted(span.name for span in sent) == ["page", "sweep", "transaction"]
    [page] = [span for span in sent if span.name == "page"]
    assert page.attributes == {"users_sync.users": 0, "users_sync.proven": True}


def test_sweep_that_fails_says_by_which_kind_of_error(site: Site, collector: Receiver) -> None:
    shell = sending(site, collector.url, USERS_SYNC_STACK__RETRY_MINUTES="0")
    assert shell.run("--once").code == 0
    site.api.on_request(lambda _: server_error())
    assert shell.run("--once").code == 3
    failed = {span.name: span.attributes["error.type"] for span in spans(collector) if span.failed}
    assert failed == {"page": "SourceUnavailable", "sweep": "SourceUnavailable"}


def test_refused_row_is_told_by_its_sqlstate_alone(site: Site, collector: Receiver) -> None:
    everybody = site.project.populate(20)
    assert site.shell.run("init").code == 0
    site.execute(REFUSING.format(everybody[5]))
    assert sending(site, collector.url).run("--once").code == 0
    failed = [span for span in spans(collector) if span.failed]
    # The page, its half, and so on until the user stands alone.
    assert len(failed) > 2
    assert {span.name for span in failed} == {"transaction"}
    assert {span.attributes["db.response.status_code"] for span in failed} == {"P0001"}
    assert {span.attributes["error.type"] for span in failed} == {"RaiseException"}
    assert [span.events for span in spans(collector) if span.events] == []


def test_nothing_that_is_sent_or_logged_holds_a_secret_or_an_email(
    site: Site, collector: Receiver
) -> None:
    everybody = site.project.populate(20)
    assert site.shell.run("init").code == 0
    site.execute(REFUSING.format(everybody[5]))
    ended = sending(site, collector.url, USERS_SYNC_LOG__LEVEL="debug").run("--once")
    assert (ended.code, ended.stderr) == (0, "")
    assert collector.requests[0].headers["api-key"] == "hush-hush"
    assert "hush" not in ended.stdout
    users = site.project.users().values()
    told = {
        site.project.secret_server_key,
        site.database_url,
        *(str(user[name]) for user in users for name in ("primary_email", "display_name")),
    } - {"None", ""}
    assert len(told) > 20
    bodies = b"".join(request.body for request in collector.requests)
    assert [text for text in told if text.encode() in bodies] == []
    assert "@" not in str([span.attributes for span in spans(collector)])


def test_polls_and_what_they_write_are_not_traced(site: Site, collector: Receiver) -> None:
    site.project.populate(3)
    running = sending(
        site,
        collector.url,
        USERS_SYNC_SCHEDULE__POLL_SECONDS="0.02",
        USERS_SYNC_SCHEDULE__SWEEP_SECONDS="3600",
    ).start()
    until("it has swept", lambda: logged(running, "sweep.finished") == 1)
    [signed_up] = site.project.populate(1, seed=1)
    rows = "select id from neon_auth.users_sync"
    until("a poll has written", lambda: (signed_up,) in site.rows(rows))
    running.signal(signal.SIGTERM)
    assert running.end().code == 0
    sent = spans(collector)
    roots = [span for span in sent if not span.parent]
    assert [(span.name, span.attributes["users_sync.kind"]) for span in roots] == [
        ("sweep", "sweep")
    ]
    assert {span.trace for span in sent} == {roots[0].trace}


def test_sender_is_named_by_the_variables_and_told_apart(site: Site, collector: Receiver) -> None:
    def ids() -> set[str]:
        assert sending(site, collector.url).run("--once").code == 0
        said = resources(collector, TRACES)
        collector.requests.clear()
        assert {each["service.name"] for each in said} == {"users-sync"}
        return {each["service.instance.id"] for each in said}

    first, second = ids(), ids()
    assert (len(first), len(second), first & second) == (1, 1, set())
    given = {
        "OTEL_SERVICE_NAME": "ours",
        "OTEL_RESOURCE_ATTRIBUTES": "service.instance.id=one,deployment.environment.name=test",
    }
    assert sending(site, collector.url, **given).run("--once").code == 0
    expected = {
        "service.name": "ours",
        "service.instance.id": "one",
        "deployment.environment.name": "test",
    }
    assert resources(collector, TRACES)[0].items() >= expected.items()


# Metrics


def prometheus(text: str) -> dict[str, float]:
    """Give the samples of /metrics by name and labels, bounds written alike."""
    return {
        named(each.name, {k: f"{float(v)}" if k == "le" else v for k, v in each.labels.items()}): (
            each.value
        )
        for family in text_string_to_metric_families(text)
        for each in family.samples
    }


def test_metrics_that_are_sent_are_those_of_the_endpoint(
    collector: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock stands still, so that both tell of one moment."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    health = sample_vitals(Ticks())
    health.sweep_finished(sample_sweep())
    health.poll_finished()
    health.set_deletions(held=7, candidates=1, oldest_candidate_since=1000.0)
    health.set_page_size(5000)
    metrics = Metrics(health.read)
    metrics.count_rows({"users": 30, "inserted": 5, "deleted": 2})
    metrics.count_request("200", 0.2)
    metrics.count_request("timeout", 0.2)
    metrics.count_retry("Stack Auth")
    metrics.count_webhook("204")
    for seconds in (0.05, 0.3, 0.3, 7200):
        metrics.observe_sweep(seconds)
        metrics.observe_freshness(seconds)
    with exporting(os.environ) as send_metrics:
        send_metrics(metrics.families)
    shown = prometheus(metrics.render()[0].decode())
    assert pushes(collector) == [shown]
    listed = {each.name: (each.kind, each.help) for each in LISTED}
    assert kinds(collector) == listed
    assert [each["service.name"] for each in resources(collector, METRICS)] == ["users-sync"]


def test_every_kind_of_metric_keeps_its_labels(
    collector: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    leave_out_created: Callable[[], None] = disable_created_metrics
    leave_out_created()  # as the worker does
    registry = CollectorRegistry()
    histogram = Histogram("h", "", ["a", "b"], registry=registry, buckets=(1, 2))
    for a, seconds in (("x", 0.5), ("x", 1.5), ("y", 3)):
        histogram.labels(a, "z").observe(seconds)
    Gauge("g", "", ["a"], registry=registry).labels("x").set(-1)
    Counter("c", "", ["a"], registry=registry).labels("x").inc()
    Counter("never", "", ["a"], registry=registry)
    with exporting(os.environ) as send_metrics:
        send_metrics(registry.collect)
    shown = prometheus(generate_latest(registry).decode())
    assert pushes(collector) == [shown]
    assert shown["h_bucket/x/z/2.0"] == 2
    assert kinds(collector).keys() == {"h", "g", "c_total"}


def test_metrics_of_a_worker_at_work_are_those_of_its_endpoint(
    site: Site, collector: Receiver
) -> None:
    """What only rises lies between what /metrics said before and what it says after."""
    site.project.populate(45)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
    shell = sending(
        site,
        collector.url,
        USERS_SYNC_SCHEDULE__SWEEP_SECONDS="0.1",
        USERS_SYNC_SCHEDULE__POLL_SECONDS="0.02",
        USERS_SYNC_HTTP__PORT=port,
    )
    worker = shell.start()
    until("it has swept twice", lambda: logged(worker, "sweep.finished") >= 2)

    def shown() -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            return prometheus(answer.read().decode())

    before, count = shown(), len(pushes(collector))
    # One push may have been made up before that.
    until("two more were sent", lambda: len(pushes(collector)) >= count + 2)
    sent, after = pushes(collector)[count + 1], shown()
    worker.signal(signal.SIGTERM)
    assert worker.end().code == 0
    assert before.keys() <= sent.keys() <= after.keys()
    rising = {name for name in before if name.partition("/")[0].endswith(SUFFIXES)}
    assert len(rising) > 60
    assert {name for name in rising if not before[name] <= sent[name] <= after[name]} == set()
    steady = ("users_sync_page_size", "users_sync_lease_held", "users_sync_deletions_held")
    assert [sent[name] for name in steady] == [after[name] for name in steady] == [10, 1, 0]


SUFFIXES = ("_total", "_bucket", "_count", "_sum")


def test_once_sends_no_metrics(site: Site, collector: Receiver) -> None:
    assert sending(site, collector.url).run("--once").code == 0
    assert set(collector.paths()) == {f"POST {TRACES}"}


# Collectors that are not there


def test_collector_that_is_gone_costs_one_line_and_no_sweep(site: Site) -> None:
    site.project.populate(45)
    shell = sending(
        site,
        NOWHERE,
        USERS_SYNC_SCHEDULE__SWEEP_SECONDS="0.1",
        OTEL_EXPORTER_OTLP_TIMEOUT="0.1",
    )
    running = shell.start()
    until("it fails", lambda: logged(running, "telemetry.failed"))
    swept = logged(running, "sweep.finished")
    until("it goes on", lambda: logged(running, "sweep.finished") >= swept + 5)
    running.signal(signal.SIGTERM)
    ended = running.end()
    assert (ended.code, ended.stderr) == (0, "")
    failed = ended.event("telemetry.failed")
    assert (failed["level"], failed["host"]) == ("warning", "127.0.0.1:1")
    assert failed["error"] == "Connection refused"
    assert {line.get("outcome", "complete") for line in ended.log} == {"complete"}
    assert "hush" not in ended.stdout
    assert [line for line in ended.log if line["event"] == "library.logged"] == []


def test_each_outage_is_one_line(site: Site, collector: Receiver) -> None:
    site.project.populate(3)
    running = sending(
        site,
        collector.url,
        USERS_SYNC_SCHEDULE__SWEEP_SECONDS="0.1",
        OTEL_EXPORTER_OTLP_TIMEOUT="0.1",
    ).start()
    for outage in (1, 2):
        collector.status = 503
        until("it fails", lambda: logged(running, "telemetry.failed") == outage)  # noqa: B023
        for path in (TRACES, METRICS):
            requests = collector.paths().count(f"POST {path}")
            until(
                "it tries again",
                lambda: collector.paths().count(f"POST {path}") > requests + 5,  # noqa: B023
            )
        assert logged(running, "telemetry.failed") == outage
        collector.status = 200
        for path in (TRACES, METRICS):
            requests = collector.paths().count(f"POST {path}")
            until(
                "it is taken",
                lambda: collector.paths().count(f"POST {path}") > requests + 5,  # noqa: B023
            )
    running.signal(signal.SIGTERM)
    ended = running.end()
    errors = [each["error"] for each in ended.log if each["event"] == "telemetry.failed"]
    assert errors == ["answered with status 503"] * 2


@pytest.mark.parametrize("collector_is", ["gone", "silent"])
def test_stop_is_over_soon_without_a_collector(site: Site, collector_is: str) -> None:
    """With the SDK's own patience of ten seconds; the bound is the promise, and what it costs."""
    site.project.populate(3)
    with serving(lambda _, server: server.over.wait(PATIENCE_SECONDS)) as silent:
        url = silent.url if collector_is == "silent" else NOWHERE
        running = sending(site, url, OTEL_EXPORTER_OTLP_TIMEOUT="10").start()
        until("it has swept", lambda: logged(running, "sweep.finished"))
        began = time.monotonic()
        running.signal(signal.SIGTERM)
        ended = running.end()
        took = time.monotonic() - began
    assert (ended.code, ended.stderr, took < 5) == (0, "", True)
    error = {"gone": "Connection refused", "silent": "did not answer yet"}[collector_is]
    assert ended.event("telemetry.failed")["error"] == error


def test_run_of_cron_tells_of_a_collector_that_is_gone(site: Site) -> None:
    ended = sending(site, NOWHERE, OTEL_EXPORTER_OTLP_TIMEOUT="10").run("--once")
    assert (ended.code, ended.stderr) == (0, "")
    assert ended.event("sweep.finished")["outcome"] == "complete"
    assert ended.event("telemetry.failed")["error"] == "Connection refused"


def test_stop_sends_what_is_left(site: Site, collector: Receiver) -> None:
    """What the SDK would have sent in a minute."""
    site.project.populate(3)
    patient = {"OTEL_BSP_SCHEDULE_DELAY": "60000", "OTEL_METRIC_EXPORT_INTERVAL": "60000"}
    running = sending(site, collector.url, **patient).start()
    until("it has swept", lambda: logged(running, "sweep.finished"))
    assert collector.requests == []
    running.signal(signal.SIGTERM)
    assert running.end().code == 0
    assert sorted(collector.paths()) == [f"POST {METRICS}", f"POST {TRACES}"]
    assert "sweep" in {span.name for span in spans(collector)}
    assert pushes(collector)[0]["users_sync_rows_total/inserted"] == 3


# Whether it is there


def run(shell: Shell, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, forked from nothing."""
    return subprocess.run(
        arguments,
        cwd=shell.folder,
        env={**shell.environ(), **variables},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )


@pytest.mark.parametrize("arguments", [("--help",), ("--once",)])
def test_nothing_of_it_is_imported_unless_it_is_asked_for(
    site: Site, arguments: tuple[str, ...]
) -> None:
    python, *module = command(*arguments)
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": NOWHERE, "OTEL_TRACES_EXPORTER": "zipkin"}
    ended = run(site.shell, python, "-X", "importtime", *module, **variables)
    assert ended.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert "worker.cli.main" in imported
    foreign = ("opentelemetry", "requests", "urllib3", "google.protobuf", "worker.service.otel")
    assert {name for name in imported if name.startswith(foreign)} == set()


def test_missing_extra_is_one_clear_line(site: Site, tmp_path: Path) -> None:
    """An empty package of that name stands before the installed one."""
    (tmp_path / "opentelemetry").mkdir()
    (tmp_path / "opentelemetry" / "__init__.py").touch()
    shell = sending(site, NOWHERE)
    path = f"{tmp_path}{os.pathsep}{shell.environ()['PYTHONPATH']}"
    ended = run(shell, *command("--once"), PYTHONPATH=path)
    assert (ended.returncode, ended.stdout, site.api.requests) == (2, "", [])
    assert ended.stderr == (
        "users-sync: otel.enabled is set, but OpenTelemetry is not installed: pip install"
        " 'users-sync[otel]'\n"
    )


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER should be otlp or none"),
        ({"OTEL_METRICS_EXPORTER": "prometheus"}, "OTEL_METRICS_EXPORTER should be otlp or none"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL should be http/pro"),
        (
            {"OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "http/json"},
            "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL should be http/protobuf",
        ),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "hush:4318"}, "OTEL_EXPORTER_OTLP_ENDPOINT should be an"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:hush"}, "OTEL_EXPORTER_OTLP_ENDPOINT should"),
        (
            {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://[hush"},
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT should be an address such as http://localhost:4318",
        ),
        ({"OTEL_METRIC_EXPORT_INTERVAL": "0"}, "OTEL_METRIC_EXPORT_INTERVAL should be millisec"),
        ({"OTEL_METRIC_EXPORT_INTERVAL": "1m"}, "OTEL_METRIC_EXPORT_INTERVAL should be millisec"),
        ({"OTEL_BSP_MAX_QUEUE_SIZE": "1"}, "OpenTelemetry does not take an OTEL_ variable"),
    ],
)
def test_wrong_variable_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str], message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Misconfigured) as caught, exporting(os.environ):
        pass
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert "hush" not in str(caught.value)


def test_wrong_variable_ends_the_program_before_it_begins(site: Site) -> None:
    ended = sending(site, "ftp://collector").run()
    assert (ended.code, ended.stdout, site.api.requests) == (2, "", [])
    assert ended.stderr == (
        "users-sync: OTEL_EXPORTER_OTLP_ENDPOINT should be an address such as"
        " http://localhost:4318\n"
    )


@pytest.mark.parametrize(
    "variables",
    [
        {"OTEL_SDK_DISABLED": "true"},
        {"OTEL_TRACES_EXPORTER": "none", "OTEL_METRICS_EXPORTER": "none"},
    ],
)
def test_signals_can_be_turned_off(variables: Mapping[str, str]) -> None:
    assert [wanted("traces", variables), wanted("metrics", variables)] == [None, None]


def test_variables_have_the_defaults_of_the_specification() -> None:
    found = wanted("traces", {"OTEL_EXPORTER_OTLP_ENDPOINT": " ", "OTEL_TRACES_EXPORTER": ""})
    assert found is not None
    assert (found.host, interval_seconds({})) == ("localhost:4318", 60)
