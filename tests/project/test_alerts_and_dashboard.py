"""The alert rules and the dashboard in ops/ ask for what a worker at work shows."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from psycopg.conninfo import conninfo_to_dict

from tests.support.fleet_world import opened_fleet
from tests.support.places import ROOT
from tests.support.ports import free_port
from tests.support.processes import Shell, Site, opened_site
from tests.support.promql import Shown, all_faults, faults, shown
from tests.support.waiting import until
from worker.fleet.telemetry import FLEET_METRICS
from worker.sandbox.api import server_error
from worker.sandbox.postgres import create_database, drop_database
from worker.service.metrics import METRICS

OPS = ROOT / "ops"
DASHBOARD: dict[str, Any] = json.loads((OPS / "grafana.json").read_text("utf-8"))
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((OPS / "alerts.yaml").read_text("utf-8"))["groups"]
    for rule in group["rules"]
]
CASES: list[dict[str, Any]] = yaml.safe_load((OPS / "alerts_test.yaml").read_text("utf-8"))["tests"]

# The panels of one target, and those of a fleet, which are in a row that can be folded away.
OWN_PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
[ROW] = [panel for panel in DASHBOARD["panels"] if panel["type"] == "row"]
PANELS = [*OWN_PANELS, *ROW["panels"]]

# As (expression, legend).
ASKED_BY_PANELS = [
    (target["expr"], target["legendFormat"]) for panel in PANELS for target in panel["targets"]
]
ASKED_BY_RULES = [(rule["expr"], "") for rule in RULES]
ASKED_IN_CASES = [(series["series"], "") for case in CASES for series in case["input_series"]]
ALL = [*ASKED_BY_PANELS, *ASKED_BY_RULES, *ASKED_IN_CASES]

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
ROWS = "select id from neon_auth.users_sync where id in"
END_SESSIONS = """
select pg_terminate_backend(pid) from pg_stat_activity
where datname = current_database() and pid <> pg_backend_pid()
"""


def get(url: str) -> str:
    with suppress(httpx.TransportError):
        return httpx.get(url, trust_env=False).text
    return ""


def make_everything_happen(site: Site, webhooks: str) -> None:
    """Have a worker at work count something under every name."""
    new, leaving = site.project.create(), site.project.create()
    site.execute(f"select users_sync_worker.refresh('{new}')")
    assert httpx.post(webhooks, content=b"{}", trust_env=False).status_code == 400
    site.api.fail_next(server_error())
    site.execute(END_SESSIONS)
    until(
        "both have a row",
        lambda: site.rows(f"select from neon_auth.users_sync where id in ('{new}', '{leaving}')")[
            1:
        ],
    )
    # The row is too young to be marked deleted, so that the suspicion stays.
    site.project.delete(leaving)


@pytest.fixture(scope="module")
def at_work(
    postgres_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Site, str]]:
    """Return a worker's surroundings, and the URL of its metrics."""
    url = create_database(postgres_url)
    http, webhooks = str(free_port()), str(free_port())
    with ExitStack() as ending:
        ending.callback(drop_database, postgres_url, str(conninfo_to_dict(url)["dbname"]))
        site = ending.enter_context(opened_site(url, tmp_path_factory.mktemp("worker")))
        site.project.populate(300)
        site.shell.having(
            USERS_SYNC_HTTP__PORT=http,
            USERS_SYNC_WEBHOOK__PORT=webhooks,
            USERS_SYNC_WEBHOOK__SECRETS=SECRET,
            USERS_SYNC_DELETIONS__GRACE_SECONDS="600",
            USERS_SYNC_SCHEDULE__SWEEP_SECONDS="0.1",
            USERS_SYNC_SCHEDULE__SWEEP_SHARE="1",
        ).start()
        metrics = f"http://127.0.0.1:{http}/metrics"
        until("it swept", lambda: "users_sync_seconds_since_complete_sweep" in get(metrics))
        make_everything_happen(site, f"http://127.0.0.1:{webhooks}/webhooks/stack-auth")
        yield site, metrics


@pytest.fixture(scope="module")
def seen_of_a_fleet(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    """Return what a worker of a fleet shows that has visited a project."""
    folder, port = tmp_path_factory.mktemp("fleet"), free_port()
    urls = [create_database(postgres_url) for _ in range(2)]
    metrics = f"http://127.0.0.1:{port}/metrics"
    with ExitStack() as ending:
        for url in urls:
            ending.callback(drop_database, postgres_url, str(conninfo_to_dict(url)["dbname"]))
        fleet = ending.enter_context(opened_fleet(urls[0], urls[1:], folder))
        fleet.add("acme", 3)
        shell = Shell(folder, fleet.variables(port))
        ending.callback(shell.close)
        shell.start("fleet", "work")
        everything = ("users_sync_fleet_fresh_seconds{", "users_sync_fleet_cycle_seconds{")
        until("it visited", lambda: all(each in get(metrics) for each in everything))
        yield shown(get(metrics))


@pytest.fixture(scope="module")
def seen(at_work: tuple[Site, str], seen_of_a_fleet: Shown) -> Shown:
    """Return what a worker shows that has met everything, and one of a fleet."""
    _, metrics = at_work
    everything = (
        'users_sync_retries_total{service="Stack Auth"}',
        'users_sync_retries_total{service="the database"}',
        "users_sync_hint_to_row_seconds_count 1.0",
        "users_sync_oldest_candidate_seconds",
        "users_sync_webhooks_total{",
    )
    until("all is shown", lambda: all(each in get(metrics) for each in everything))
    return Shown({**seen_of_a_fleet.labels, **shown(get(metrics)).labels})


def test_every_expression_asks_for_what_a_worker_shows(seen: Shown) -> None:
    assert all_faults(ALL, seen) == {}


@pytest.mark.parametrize("name", [metric.name for metric in (*METRICS, *FLEET_METRICS)])
def test_metric_that_is_renamed_is_missed(seen: Shown, name: str) -> None:
    """So every metric is on the dashboard."""
    assert all_faults(ASKED_BY_PANELS, seen.without(name)) != {}


@pytest.mark.parametrize(
    ("expression", "legend", "fault"),
    [
        (
            "users_sync_seconds_since_sweep > 900",
            "",
            "no worker shows users_sync_seconds_since_sweep",
        ),
        ("sum by (job) (users_sync_rows)", "", "no worker shows users_sync_rows"),
        ('users_sync_rows_total{kind="inserted"}', "", "users_sync_rows_total has no label kind"),
        (
            'rate(users_sync_rows_total{outcome=~"inserted|erased"}[5m])',
            "",
            "outcome of users_sync_rows_total is never erased",
        ),
        (
            'users_sync_call_seconds_sum{service="database"}',
            "",
            "service of users_sync_call_seconds_sum is never database",
        ),
        ("sum by (target) (users_sync_lease_held)", "", "nothing in it has the label target"),
        ("rate(users_sync_lease_held[5m])", "", "users_sync_lease_held is no counter"),
        ("topk(1, users_sync_lease_held)", "", "no worker shows topk"),
        (
            "sum by (job) (users_sync_rows_total)",
            "{{outcome}}",
            "the legend names outcome, which is summed away",
        ),
    ],
)
def test_mistake_in_an_expression_is_found(
    seen: Shown, expression: str, legend: str, fault: str
) -> None:
    assert faults(expression, seen, legend) == [fault]


def test_every_alert_is_tried_both_ways() -> None:
    tried = [each for case in CASES for each in case["alert_rule_test"]]
    names = {rule["alert"] for rule in RULES}
    assert {each["alertname"] for each in tried if "exp_alerts" in each} == names
    assert {each["alertname"] for each in tried if "exp_alerts" not in each} == names


def test_every_alert_is_explained() -> None:
    page = (ROOT / "docs" / "operating.md").read_text("utf-8")
    assert [rule["alert"] for rule in RULES if f"| `{rule['alert']}` |" not in page] == []


def test_panels_have_places_of_their_own() -> None:
    panels = [*PANELS, ROW]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in panels}) == len(places)


def test_picture_shows_every_panel_of_one_target_and_is_small() -> None:
    picture = ROOT / "docs" / "panels.svg"
    text = picture.read_text("utf-8")
    assert [p["title"] for p in OWN_PANELS if f">{p['title']}" not in text] == []
    assert picture.stat().st_size < 200_000


# What promtool says

NEVER = "vector(0) > 0"
ALWAYS = "max by (job) (users_sync_lease_held) >= 0"


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed: it comes with Prometheus")
    return subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )


def test_rules_do_what_their_cases_say() -> None:
    ended = promtool("test", "rules", OPS / "alerts_test.yaml")
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("alert", [rule["alert"] for rule in RULES])
@pytest.mark.parametrize(
    "expression", ["vector(0) > 0", "max by (job) (users_sync_lease_held) >= 0"]
)
def test_rule_that_never_or_always_fires_fails_a_case(
    tmp_path: Path, alert: str, expression: str
) -> None:
    rules = [{**rule, "expr": expression} if rule["alert"] == alert else rule for rule in RULES]
    groups = {"groups": [{"name": "users-sync", "rules": rules}]}
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump(groups), "utf-8")
    cases = (OPS / "alerts_test.yaml").read_text("utf-8")
    (tmp_path / "alerts_test.yaml").write_text(cases, "utf-8")
    ended = promtool("test", "rules", tmp_path / "alerts_test.yaml")
    assert ended.returncode != 0
    assert alert in ended.stdout + ended.stderr


def test_prometheus_reads_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": expression.replace("$__rate_interval", "5m")}
        for number, (expression, _) in enumerate(ASKED_BY_PANELS)
    ]
    path = tmp_path / "panels.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}), "utf-8")
    ended = promtool("check", "rules", path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"{len(rules)} rules found" in ended.stdout
