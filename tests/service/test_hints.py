"""Known changes reach the table at once: hints, webhooks, and the users active last."""

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx
import psycopg
import pytest
import svix
from psycopg.conninfo import make_conninfo
from structlog.testing import capture_logs

from tests.support.service_world import ServiceWorld, Worker, opened_service_world
from tests.support.waiting import until
from worker.sandbox.api import Request
from worker.sync.hints import FOLLOWED_AT_ONCE, MOST_HINTS

SECRET, OTHER_SECRET = "whsec_" + "c2VjcmV0" * 4, "whsec_" + "b3RoZXIh" * 4

# Nothing else finds a change of an older user.
HINTS_ONLY = {
    "poll_seconds": 3600,
    "sweep_seconds": 3600,
    "activity_seconds": 0,
    "port": 0,
}
WAITING = "select user_id from users_sync_worker.hint"
REFRESH = "select users_sync_worker.refresh(%s)"


@pytest.fixture
def world(database_url: str, connection: psycopg.Connection) -> Iterator[ServiceWorld]:
    with opened_service_world(database_url, connection) as world:
        world.project.populate(30)
        yield world


def name_of(world: ServiceWorld, user_id: str) -> str | None:
    rows = world.query("select name from neon_auth.users_sync where id = %s", user_id)
    return rows[0][0] if rows else None


def oldest(world: ServiceWorld, count: int = 1) -> list[str]:
    """Give users who are on no page of a poll."""
    users = world.project.users()
    return sorted(users, key=lambda user_id: users[user_id]["signed_up_at_millis"])[:count]


# Hints in the table


def test_hinted_change_is_a_row_although_no_sweep_is_due(world: ServiceWorld) -> None:
    world.at_work(**HINTS_ONLY)
    [user_id] = oldest(world)
    world.project.edit(user_id, display_name="Hinted")
    world.query(REFRESH, user_id.upper())
    until("the row is right", lambda: name_of(world, user_id) == "Hinted")
    until("the hint is gone", lambda: not world.query(WAITING))


def test_role_that_may_do_nothing_else_may_leave_a_hint(world: ServiceWorld) -> None:
    world.at_work(**HINTS_ONLY)
    [user_id] = oldest(world)
    world.project.edit(user_id, display_name="Hinted")
    role = f"hinting_{uuid4().hex[:8]}"
    world.query(f"create role {role} login password 'x'")
    try:
        with psycopg.connect(make_conninfo(world.url, user=role, password="x")) as conn:
            conn.execute(REFRESH, (user_id,))
            conn.commit()
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                conn.execute(WAITING.encode())
        until("the row is right", lambda: name_of(world, user_id) == "Hinted")
    finally:
        world.query(f"drop role {role}")


@pytest.mark.parametrize("hint", ["", "1", "robert'); drop table users;--", None])
def test_hint_that_names_no_user_is_refused_with_words(world: ServiceWorld, hint: str) -> None:
    world.at_work(**HINTS_ONLY)
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="a user id is a UUID"):
        world.query(REFRESH, hint)


def test_hint_for_a_table_that_was_never_synced_is_refused(world: ServiceWorld) -> None:
    world.at_work(**HINTS_ONLY)
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="never synced"):
        world.query("select users_sync_worker.refresh(%s, 'other')", str(uuid4()))


def test_forged_doubled_and_misordered_hints_change_nothing(world: ServiceWorld) -> None:
    worker = world.at_work(**HINTS_ONLY)
    before = world.query("select id, xmin::text from neon_auth.users_sync order by id")
    for user_id in [*oldest(world, 5), *oldest(world, 5)[::-1], str(uuid4())]:
        world.query(REFRESH, user_id)
    until("they were followed", lambda: len(world.query(WAITING)) <= 1)
    assert before == world.query("select id, xmin::text from neon_auth.users_sync order by id")
    assert worker.not_ready == ()


def test_user_who_is_hinted_at_before_the_sign_up_arrives(world: ServiceWorld) -> None:
    world.at_work(**HINTS_ONLY)
    user_id = "aaaaaaaa-0000-4000-8000-000000000001"
    world.query(REFRESH, user_id)
    asked = f"/api/v1/users/{user_id}"
    until("it was asked for", lambda: any(r.path == asked for r in world.api.requests))
    world.project.create(id=user_id)
    until("the new user has a row", lambda: user_id in world.live())


def test_hinted_user_who_left_is_deleted_on_proof(world: ServiceWorld) -> None:
    world.at_work(**HINTS_ONLY)
    [user_id] = oldest(world)
    world.project.delete(user_id)
    world.query(REFRESH, user_id)
    until("the row is marked", lambda: user_id not in world.live())
    until("the hint is gone", lambda: not world.query(WAITING))
    assert world.query("select count(*) from users_sync_worker.deletion") == [(0,)]
    assert world.query("select sum(deleted) from users_sync_worker.sweep") == [(1,)]


def test_young_row_of_a_hinted_user_waits_for_the_grace_period(world: ServiceWorld) -> None:
    world.at_work(**{**HINTS_ONLY, "grace_seconds": 3600})
    [user_id] = oldest(world)
    world.project.delete(user_id)
    world.query(REFRESH, user_id)
    suspects = "select user_id, state from users_sync_worker.deletion"
    until("it is suspected", lambda: world.query(suspects) == [(user_id, "candidate")])
    assert user_id in world.live()
    assert world.query(WAITING) == [(user_id,)]


def test_too_many_hinted_deletions_are_held_like_any_others(world: ServiceWorld) -> None:
    world.project.populate(800)
    worker = world.at_work(**HINTS_ONLY)
    ids = oldest(world, 600)
    for user_id in ids:
        world.project.delete(user_id)
    leave_together(world, ids)
    held = "select count(*) from users_sync_worker.deletion where state = 'held'"
    until("they are held", lambda: world.query(held) == [(600,)])
    until("no hint is left", lambda: not world.query(WAITING))
    assert set(ids) <= world.live()
    assert any("held" in reason for reason in worker.not_ready)


def test_hint_changes_nothing_about_deletions_that_are_held(world: ServiceWorld) -> None:
    worker = world.at_work(**{**HINTS_ONLY, "max_count": 5})
    ids = oldest(world, 12)
    for user_id in ids[:10]:
        world.project.delete(user_id)
    leave_together(world, ids[:10])
    until("they are held", lambda: any("10 deletions" in each for each in worker.not_ready))
    world.project.edit(ids[11], display_name="Hinted")
    world.query(REFRESH, ids[11])
    until("the row is right", lambda: name_of(world, ids[11]) == "Hinted")
    until("the hint is gone", lambda: not world.query(WAITING))
    assert any("10 deletions" in each for each in worker.not_ready)


def test_sweep_that_deletes_hinted_users_first_is_no_trouble(world: ServiceWorld) -> None:
    worker = world.at_work(**HINTS_ONLY)
    ids = oldest(world, FOLLOWED_AT_ONCE + 1)
    for user_id in ids:
        world.project.delete(user_id)
    leader, asked = worker.service._leader, []  # noqa: SLF001  a sweep at this very moment
    assert leader is not None

    def sweep_before_the_last(request: Request) -> None:
        asked.append(request.path)
        if len(asked) == len(ids):
            leader.sweep()

    with capture_logs() as logs:
        world.api.on_request(sweep_before_the_last)
        leave_together(world, ids)
        until("they are deleted", lambda: not world.live() & set(ids))
        until("the hints are followed", lambda: len(world.query(WAITING)) <= 1)
    assert [log["event"] for log in logs if log["event"] == "job.failed"] == []
    assert worker.not_ready == ()


def test_hint_for_a_locked_row_waits_for_the_lock(world: ServiceWorld) -> None:
    world.at_work(**HINTS_ONLY)
    [user_id] = oldest(world)
    world.project.edit(user_id, display_name="Hinted")
    with psycopg.connect(world.url) as other:
        other.execute("select from neon_auth.users_sync where id = %s for update", (user_id,))
        world.query(REFRESH, user_id)
        asked = f"/api/v1/users/{user_id}"
        until(
            "it was asked for twice", lambda: sum(r.path == asked for r in world.api.requests) > 1
        )
        assert world.query(WAITING) == [(user_id,)]
    until("the row is right", lambda: name_of(world, user_id) == "Hinted")


def leave_together(world: ServiceWorld, ids: list[str]) -> None:
    world.query(
        "insert into users_sync_worker.hint (target, user_id)"
        " select 'neon_auth', unnest(%s::text[])",
        ids,
    )


def test_more_hints_than_can_be_followed_begin_a_sweep(world: ServiceWorld) -> None:
    worker = world.at_work(**HINTS_ONLY)
    sweeps = worker.sweeps()
    [user_id] = oldest(world)
    world.project.edit(user_id, display_name="Swept")
    leave_together(world, [str(uuid4()) for _ in range(MOST_HINTS + 1)])
    until("a sweep found the change", lambda: name_of(world, user_id) == "Swept")
    until("no hint is left", lambda: not world.query(WAITING))
    until("it was a sweep", lambda: worker.sweeps() > sweeps)


def test_user_who_moves_in_the_list_is_followed(world: ServiceWorld) -> None:
    world.at_work(**HINTS_ONLY)
    [user_id] = oldest(world)
    moved = max(user["signed_up_at_millis"] for user in world.project.users().values()) + 5
    world.project.edit(user_id, signed_up_at_millis=moved)
    world.query(REFRESH, user_id)
    millis = (
        "select (raw_json->>'signed_up_at_millis')::bigint from neon_auth.users_sync where id = %s"
    )
    until("the row is right", lambda: world.query(millis, user_id) == [(moved,)])
    assert user_id in world.live()


def test_quiet_worker_leaves_the_database_alone_without_hints(world: ServiceWorld) -> None:
    world.at_work(**{**HINTS_ONLY, "quiet": True, "poll_seconds": 0.05})
    until("it rests", lambda: world.connections() == 0)
    before = world.lease("writes"), world.lease("epoch")
    polls = world.polls()
    until("it polls", lambda: world.polls() > polls + 20)
    assert (world.connections(), world.lease("writes"), world.lease("epoch")) == (0, *before)


# Webhooks


def receiving(world: ServiceWorld, *secrets: str, **options: Any) -> tuple[Worker, str]:
    chosen = {**HINTS_ONLY, "secrets": secrets or (SECRET,), **options}
    worker = world.start(**chosen)
    until("it listens", lambda: worker.service.webhook_port)
    until("it stands ready", lambda: worker.state in {"working", "quiet", "standing by"})
    return worker, f"http://127.0.0.1:{worker.service.webhook_port}/webhooks/stack-auth"


def send(
    url: str,
    body: bytes,
    secret: str = SECRET,
    moment: datetime | None = None,
    signature: str | None = None,
) -> int:
    moment = moment or datetime.now(UTC)
    message = f"msg_{uuid4().hex}"
    headers = {
        "svix-id": message,
        "svix-timestamp": str(int(moment.timestamp())),
        "svix-signature": signature or svix.Webhook(secret).sign(message, moment, body.decode()),
    }
    if signature is not None:
        headers["svix-signature"] = signature
    return httpx.post(url, content=body, headers=headers, timeout=20).status_code


def event(kind: str, user_id: object) -> bytes:
    return json.dumps({"type": kind, "data": {"id": user_id}}).encode()


@pytest.mark.parametrize("quiet", [False, True])
def test_webhook_makes_a_change_a_row(world: ServiceWorld, *, quiet: bool) -> None:
    _, url = receiving(world, quiet=quiet)
    until("the table is right", lambda: world.live() == set(world.project.ids()))
    [user_id] = oldest(world)
    world.project.edit(user_id, display_name="Hooked")
    assert send(url, event("user.updated", user_id)) == 204
    until("the row is right", lambda: name_of(world, user_id) == "Hooked")
    if quiet:
        until("it rests", lambda: world.connections() == 0)


def test_webhook_is_taken_with_any_of_several_secrets(world: ServiceWorld) -> None:
    _, url = receiving(world, OTHER_SECRET, SECRET)
    statuses = [
        send(url, event("user.created", str(uuid4())), each) for each in (SECRET, OTHER_SECRET)
    ]
    assert statuses == [204, 204]


def test_webhook_that_is_not_genuine_is_refused_without_words(world: ServiceWorld) -> None:
    _, url = receiving(world)
    body = event("user.deleted", oldest(world)[0])
    now = datetime.now(UTC)
    assert send(url, body, OTHER_SECRET) == 400
    assert send(url, body, moment=now - timedelta(minutes=6)) == 400
    assert send(url, body, moment=now + timedelta(minutes=6)) == 400
    assert send(url, b"not JSON") == 400
    answer = httpx.post(url, content=body)
    assert (answer.status_code, answer.content) == (400, b"")
    for signature in ("", "v1", "v1,", "v1,###", "v1,=", "v2,AAAA", "v1,a v1,b"):
        assert send(url, body, signature=signature) == 400
    assert world.query(WAITING) == []


def test_webhook_that_is_too_large_is_refused(world: ServiceWorld) -> None:
    _, url = receiving(world)
    body = json.dumps({"type": "user.updated", "data": {"id": "x" * 300 * 1024}}).encode()
    assert send(url, body) == 413


def test_webhooks_about_anything_else_are_answered_and_dropped(world: ServiceWorld) -> None:
    _, url = receiving(world)
    bodies = [
        event("team.created", str(uuid4())),
        event("user.updated", "no user id"),
        event("user.updated", 5),
        b"[]",
        b"null",
        b'{"type": "user.updated"}',
    ]
    assert [send(url, body) for body in bodies] == [204] * len(bodies)
    assert world.query(WAITING) == []


def test_replayed_and_misordered_webhooks_change_nothing_that_is_right(world: ServiceWorld) -> None:
    _, url = receiving(world)
    until("the table is right", lambda: world.live() == set(world.project.ids()))
    [user_id] = oldest(world)
    for kind in ("user.deleted", "user.updated", "user.created", "user.deleted"):
        assert send(url, event(kind, user_id)) == 204
    until("they were followed", lambda: not world.query(WAITING))
    assert user_id in world.live()


def test_webhook_of_another_projects_user_adds_no_row(world: ServiceWorld) -> None:
    _, url = receiving(world)
    stranger = str(uuid4())
    assert send(url, event("user.updated", stranger)) == 204
    asked = f"/api/v1/users/{stranger}"
    until("it was asked for", lambda: any(r.path == asked for r in world.api.requests))
    assert world.query("select 1 from neon_auth.users_sync where id = %s", stranger) == []


def test_standby_receives_webhooks_for_the_leader(world: ServiceWorld) -> None:
    world.at_work(**HINTS_ONLY)
    standby, url = receiving(world)
    assert standby.state == "standing by"
    [user_id] = oldest(world)
    world.project.edit(user_id, display_name="Told to the standby")
    assert send(url, event("user.updated", user_id)) == 204
    until("the row is right", lambda: name_of(world, user_id) == "Told to the standby")


def test_webhook_is_answered_with_503_while_it_cannot_be_stored(world: ServiceWorld) -> None:
    _, url = receiving(world)
    until("the table is right", lambda: world.live() == set(world.project.ids()))
    world.query("alter table users_sync_worker.hint rename to hint_elsewhere")
    try:
        assert send(url, event("user.updated", oldest(world)[0])) == 503
    finally:
        world.query("alter table users_sync_worker.hint_elsewhere rename to hint")
    assert send(url, event("user.updated", oldest(world)[0])) == 204


def test_other_paths_and_methods_are_refused(world: ServiceWorld) -> None:
    _, url = receiving(world)
    assert httpx.get(url).status_code == 405
    assert httpx.post(url + "/other").status_code == 404


def test_many_webhooks_at_once_are_all_stored_or_a_sweep_follows(world: ServiceWorld) -> None:
    worker, url = receiving(world)
    until("the table is right", lambda: world.live() == set(world.project.ids()))
    ids = world.project.ids()
    for user_id in ids:
        world.project.edit(user_id, display_name="In the burst")
    with ThreadPoolExecutor(16) as senders:
        bodies = [event("user.updated", ids[n % len(ids)]) for n in range(300)]
        assert set(senders.map(lambda body: send(url, body), bodies)) == {204}
    until(
        "all rows are right",
        lambda: {name_of(world, user_id) for user_id in ids} == {"In the burst"},
    )
    assert worker.service.health.not_alive == ()


def test_slow_and_silent_clients_keep_no_webhook_waiting(world: ServiceWorld) -> None:
    _, url = receiving(world)
    port = httpx.URL(url).port
    with ExitStack() as opened:
        for number in range(200):
            client = opened.enter_context(socket.create_connection(("127.0.0.1", port), 5))
            if number % 2:
                client.sendall(b"POST /webhooks/stack-auth HTTP/1.1\r\nContent-Length: 100\r\n")
        assert send(url, event("user.updated", oldest(world)[0])) == 204


# The users active last


def asked_for_activity(world: ServiceWorld) -> int:
    return sum(r.query.get("order_by") == "last_active_at" for r in world.lists())


def test_edit_by_an_active_user_is_a_row_although_no_sweep_is_due(world: ServiceWorld) -> None:
    world.at_work(**{**HINTS_ONLY, "activity_seconds": 0.1})
    [user_id] = oldest(world)
    world.project.edit(user_id, display_name="Active")
    world.project.touch(user_id)
    until("the row is right", lambda: name_of(world, user_id) == "Active")


def test_server_that_cannot_list_by_activity_is_not_asked_again(
    database_url: str, connection: psycopg.Connection
) -> None:
    with opened_service_world(database_url, connection, "april") as world:
        world.project.populate(30)
        worker = world.at_work(**{**HINTS_ONLY, "poll_seconds": 0.02, "activity_seconds": 0.05})
        until("it asked", lambda: asked_for_activity(world))
        polls = world.polls()
        until("it polls on", lambda: world.polls() > polls + 20)
        assert asked_for_activity(world) == 1
        assert worker.not_ready == ()


def test_unchanged_active_users_cost_no_statement(world: ServiceWorld) -> None:
    world.at_work(**{**HINTS_ONLY, "activity_seconds": 0.02, "quiet": True})
    until("it rests", lambda: world.connections() == 0)
    before, writes = asked_for_activity(world), world.lease("writes")
    for user_id in oldest(world, 3):
        world.project.touch(user_id)
    until("it asked", lambda: asked_for_activity(world) > before + 10)
    assert (world.connections(), world.lease("writes")) == (0, writes)
