"""What a worker of the fleet tells over HTTP, and the webhooks that it receives."""

import json
import re
import urllib.error
import urllib.request
from base64 import b64encode
from datetime import UTC, datetime
from uuid import uuid4

import pytest
from standardwebhooks.webhooks import Webhook

from tests.support.fleet_world import FleetWorld, Member
from tests.support.waiting import until
from worker.fleet.control import Overview
from worker.fleet.page import SHOWN_PROJECTS, TONES, render
from worker.fleet.telemetry import FLEET_METRICS, FleetTelemetry
from worker.fleet.work import FleetWorker
from worker.service.metrics import Metrics

SECRET = f"whsec_{b64encode(b'x' * 24).decode()}"
ROW = {
    "name": "<acme>",
    "state": "held",
    "fresh_seconds": 3.0,
    "swept_seconds": None,
    "users": 1200,
    "waits_for_a_person": "12 deletions are held",
    "error": None,
}


def send(worker: FleetWorker, member: Member, user_id: str, secret: str = SECRET) -> int:
    """Send a webhook as Stack Auth does; returns the status of the answer."""
    body = json.dumps({"type": "user.updated", "data": {"id": user_id}})
    now = datetime.now(UTC)
    headers = {
        "svix-id": "msg_1",
        "svix-timestamp": str(int(now.timestamp())),
        "svix-signature": Webhook(secret).sign("msg_1", now, body),
    }
    url = f"http://127.0.0.1:{worker.webhook_port}/webhooks/stack-auth/{member.name}"
    request = urllib.request.Request(url, body.encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_webhook_has_its_project_visited_before_its_time(fleet: FleetWorld) -> None:
    # Polled once an hour, swept once an hour: nothing but a hint tells of an edit.
    rarely = {"poll_seconds": 3600, "sweep_seconds": 3600}
    a = fleet.add("a", 250, schedule=rarely)
    none = fleet.add("none", 1)
    (fleet.folder / "a.hook").write_text(SECRET)
    fleet.query("update users_sync_fleet.project set webhook_ref = 'file:a.hook' where name = 'a'")
    with fleet.at_work(webhooks=True) as worker:
        until("a is fresh", lambda: fleet.states()["a"] == "fresh")
        first = a.project.ids()[0]
        a.project.edit(first, display_name="changed")
        assert send(worker, a, first, f"whsec_{b64encode(b'y' * 24).decode()}") == 400
        assert send(worker, none, first) == 404
        assert send(worker, a, first) == 204
        until("the hint was followed", lambda: a.name_of(first) == "changed")
        a.project.delete(first)
        assert send(worker, a, first) == 204
        until("the deletion was followed", lambda: a.in_step)
        hinted = "select name from users_sync_fleet.visit where hinted_at is not null"
        until("no hint is left", lambda: fleet.query(hinted) == [])


@pytest.fixture
def telemetry() -> FleetTelemetry:
    telemetry = FleetTelemetry("here:1:abc", metrics_projects=1)
    telemetry.overview = Overview({"held": 1}, [ROW], [("api.example.com", 1, 2.0)])
    return telemetry


def test_page_shows_the_worst_first_and_escapes(telemetry: FleetTelemetry) -> None:
    page = render(telemetry)
    assert "Some need a look" in page
    assert "&lt;acme&gt;" in page
    assert "<acme>" not in page
    assert "12 deletions are held" in page
    assert "1,200" in page
    assert "1 of 3" not in page


def test_page_says_how_many_projects_it_leaves_out_and_how_old_it_is() -> None:
    now = 0.0
    telemetry = FleetTelemetry("here:1:abc", metrics_projects=1, monotonic=lambda: now)
    telemetry.see(Overview({"held": 1, "fresh": 2}, [ROW], [("api.example.com", 3, 2.0)]))
    now = 7.0
    telemetry.control_answered()
    page = render(telemetry)
    assert "1 of 3" in page
    assert "saw the fleet 7.0 s ago" in page


def test_metrics_name_projects_up_to_a_bound(telemetry: FleetTelemetry) -> None:
    text = Metrics(None, telemetry).render()[0].decode()
    assert 'users_sync_fleet_fresh_seconds{project="<acme>"} 3.0' in text
    assert {each.name for each in FLEET_METRICS if f"# HELP {each.name}" not in text} <= {
        each.name for each in FLEET_METRICS if each.name.endswith("_total")
    }
    telemetry.overview = Overview({"paused": 1}, [{**ROW, "state": "paused"}], ())
    assert "fresh_seconds{" not in Metrics(None, telemetry).render()[0].decode()
    telemetry.overview = Overview({"held": 2}, [ROW, {**ROW, "name": "b"}], ())
    assert "fresh_seconds{" not in Metrics(None, telemetry).render()[0].decode()


# Of projects whose secrets are not there, so that their visits end at once.
MANY = """
with added as (
    insert into users_sync_fleet.project
        (name, api_url, api_host, project_id, secret_ref, database_ref, schema)
    select 'p' || n, 'https://api.example.com', 'api.example.com', 'p' || n, 'file:none.key',
           'file:none.url', 's' || n
    from generate_series(1, 120) n
    returning name
)
insert into users_sync_fleet.visit (name, fresh_at) select name, clock_timestamp() from added
"""


@pytest.mark.parametrize(("most", "named"), [(120, 120), (119, 0)])
def test_metrics_name_each_project_or_none_and_the_page_shows_the_worst(
    fleet: FleetWorld, most: int, named: int
) -> None:
    fleet.query(MANY)
    with fleet.at_work(metrics_projects=most) as worker:
        until("it saw the fleet", lambda: worker.telemetry.overview.counts)
        text = worker.metrics.render()[0].decode()
        assert len(set(re.findall(r'fresh_seconds\{project="(p\d+)"\}', text))) == named
        html = render(worker.telemetry)
    assert html.count("<tr><td") == SHOWN_PROJECTS == 100
    assert "100 of 120" in html


def test_every_state_is_counted_from_the_start(telemetry: FleetTelemetry) -> None:
    text = Metrics(None, telemetry).render()[0].decode()
    shown = re.findall(r'users_sync_fleet_projects\{state="(.*?)"\} (\d)', text)
    assert dict(shown) == {**dict.fromkeys(TONES, "0"), "held": "1"}


def test_worker_without_the_control_database_is_not_ready() -> None:
    now = 0.0
    telemetry = FleetTelemetry(str(uuid4()), 1, monotonic=lambda: now)
    assert not telemetry.not_ready
    now = 31.0
    telemetry.beat()
    assert "".join(telemetry.not_ready) == "the control database has not answered for 31 s"
    assert "Not at work" in render(telemetry)
