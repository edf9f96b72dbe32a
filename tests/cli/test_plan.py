"""A plan says exactly what the next sweep does, and leaves no trace of itself."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from threading import Event
from typing import Any, NamedTuple

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from psycopg import sql
from psycopg.conninfo import make_conninfo
from structlog.testing import capture_logs

from tests.support.fake_time import real_millis
from tests.support.store_target import people
from tests.support.sweep_world import (
    IGNORED,
    PLAIN,
    World,
    before_page,
    delete_all,
    is_list,
    numbered,
    raw_record,
    settings,
    sign_up,
)
from tests.sync.test_convergence import CUT, Happening, Story, happenings
from worker.cli.plan.change import Change
from worker.cli.plan.json_diff import Difference
from worker.cli.plan.output import PlanPrinter, lines
from worker.cli.plan.plan import Plan, plan
from worker.cli.plan.recorder import PlanRecorder
from worker.errors import Misconfigured, SourceUnavailable, Stopped
from worker.model import Users
from worker.sandbox.api import Request, server_error
from worker.store.suspects import Suspects
from worker.sync.cache import Cache
from worker.sync.state import SweepState

SHAPES = pytest.mark.parametrize("id_type", [None, "text", "uuid"])
OWN_TABLES = (
    "lease",
    "checkpoint",
    "sweep",
    "deletion",
    "quarantine",
    "touched",
    "migration",
    "snapshot",
    "snapshot_chunk",
)
MILLIS = 1_600_000_000_001


@dataclass
class Planned:
    """What a plan told, and what it came to."""

    changes: list[Change] = field(default_factory=list)
    result: Plan = field(default_factory=lambda: Plan("", {}, difference=False))

    def lines(self, *, values: bool = False) -> list[str]:
        return [line for change in self.changes for line in lines(change, values=values)]

    def said(self, **options: Any) -> list[str]:
        """Give all that the command says."""
        said: list[str] = []
        telling = PlanPrinter(said.append, **options)
        for change in self.changes:
            telling.tell(change)
        telling.end(self.result)
        return said

    def kinds(self) -> dict[str, list[str]]:
        """Give the ids that were told of, by what would become of them."""
        found: dict[str, list[str]] = {}
        for change in self.changes:
            found.setdefault(change.kind, []).append(change.subject)
        return {kind: sorted(ids) for kind, ids in found.items()}


def planned(world: World, *, url: str = "", stop: Event | None = None, **options: Any) -> Planned:
    """Plan as `World.sweep` sweeps."""
    found = Planned()
    chosen = settings(world.project, **{"schema": world.schema, **options})
    transport = httpx.WSGITransport(world.api)
    found.result = plan(chosen, url or world.url, stop or Event(), found.changes.append, transport)
    return found


def adopt(world: World, id_type: str | None) -> None:
    """Create a plain table with this type of id; None leaves it to the worker."""
    if id_type:
        world.query(PLAIN.replace("{id_type}", id_type))


def everything(world: World) -> list[Any]:
    """Give every version of every row, of users_sync and of the worker's own tables."""
    tables = [("users_sync_worker", name) for name in OWN_TABLES]
    query = sql.SQL("select xmin::text, ctid::text, xmax::text, t.* from {} t order by 2")
    return [
        world.conn.execute(query.format(sql.Identifier(*table))).fetchall()
        for table in [(world.schema, "users_sync"), *tables]
    ]


@SHAPES
def test_each_kind_of_change_is_told_in_the_order_of_the_walk(
    world: World, id_type: str | None
) -> None:
    adopt(world, id_type)
    ids = sign_up(world.project, *range(12))
    world.sweep()
    world.project.delete(ids[1])
    world.sweep()
    sign_up(world.project, 1)
    world.project.edit(ids[5], display_name="New", client_metadata={"theme": "dark"})
    delete_all(world.project, [ids[3], ids[9]])
    world.project.touch(ids[6])
    [new] = sign_up(world.project, 20)
    before = everything(world)

    found = planned(world)

    assert before == everything(world)
    assert found.lines() == [
        f"+ {ids[1]} (restored)",
        f"~ {ids[5]} client_metadata",
        f"~ {ids[5]} display_name",
        f"+ {new}",
        f"- {ids[3]} gone: GET /users/{ids[3]} answered 404 USER_NOT_FOUND",
        f"- {ids[9]} gone: GET /users/{ids[9]} answered 404 USER_NOT_FOUND",
    ]
    assert found.said()[-1] == (
        "11 users: 1 to insert, 1 to restore, 1 to update, 2 to delete, 8 unchanged"
    )
    assert (found.result.outcome, found.result.difference) == ("complete", True)
    report = world.sweep()
    assert {name: found.result.counts[name] for name in report.counts} == report.counts


@SHAPES
def test_nothing_to_do_is_no_difference(world: World, id_type: str | None) -> None:
    adopt(world, id_type)
    ids = sign_up(world.project, *range(7))
    world.sweep()
    world.project.touch(ids[3])

    found = planned(world)

    assert found.said() == ["7 users: nothing to do"]
    assert not found.result.difference


@SHAPES
def test_an_empty_project_and_an_empty_table_are_equal(world: World, id_type: str | None) -> None:
    adopt(world, id_type)
    found = planned(world)
    assert found.said() == ["0 users: nothing to do"]
    assert not found.result.difference


def test_values_are_told_only_when_asked_for(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(3))
    quick_world.project.edit(ids[1], client_metadata={"theme": "light", "n": [1]})
    quick_world.sweep()
    metadata = {"theme": "dark", "my key": "Zoë", "n": [1, 2]}
    quick_world.project.edit(ids[1], primary_email="Z@Example.com", client_metadata=metadata)
    quick_world.project.delete(ids[2])
    sign_up(quick_world.project, 7)

    found = planned(quick_world)

    assert found.lines(values=True)[:4] == [
        f'~ {ids[1]} client_metadata."my key": (absent) → "Zoë"',
        f"~ {ids[1]} client_metadata.n: [1] → [1, 2]",
        f'~ {ids[1]} client_metadata.theme: "light" → "dark"',
        f'~ {ids[1]} primary_email: "1@example.com" → "z@example.com"',
    ]
    for options in ({}, {"as_objects": True}):
        said = "\n".join(found.said(**options)).lower()
        assert not any(text in said for text in ("example.com", "light", "dark", "user 7", "zo"))


def test_objects_say_the_same_for_programs(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(3))
    quick_world.sweep()
    quick_world.project.edit(ids[0], client_metadata={"rate": 0.1})
    quick_world.project.edit(ids[1], display_name="New")
    quick_world.project.delete(ids[2])

    found = planned(quick_world)

    *changes, summary = [json.loads(line) for line in found.said(as_objects=True, values=True)]
    proof = changes[2].pop("proof")
    assert changes == [
        {
            "change": "update",
            "id": ids[0],
            "fields": [{"path": "client_metadata", "old": None, "new": {"rate": 0.1}}],
        },
        {
            "change": "update",
            "id": ids[1],
            "fields": [{"path": "display_name", "old": "User 1", "new": "New"}],
        },
        {"change": "delete", "id": ids[2], "approved": False},
    ]
    assert (proof["status"], proof["code"]) == (404, "USER_NOT_FOUND")
    assert proof["asked_at"].endswith("+00:00")
    assert summary["change"] == "summary"
    counted = ("users", "updated", "deleted", "inserted", "outcome", "difference", "left_out")
    assert [summary[name] for name in counted] == [2, 2, 1, 0, "complete", True, 0]
    without = json.loads(found.said(as_objects=True)[0])
    assert without["fields"] == [{"path": "client_metadata"}]


def test_changes_beyond_the_limit_are_only_counted(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(9))
    found = planned(quick_world)
    assert found.said(limit=2) == [
        f"+ {ids[0]}",
        f"+ {ids[1]}",
        "… and 7 more",
        "9 users: 9 to insert",
    ]
    assert len(found.said(limit=9)) == len(found.said(limit=10)) == len(found.said()) == 10
    assert found.said(limit=0) == ["… and 9 more", "9 users: 9 to insert"]
    summary = json.loads(found.said(limit=2, as_objects=True)[-1])
    assert (summary["left_out"], summary["inserted"]) == (7, 9)


WRONG = {
    "name = 'Other'": ('column name: "Other" → "User 1"',),
    "email = null": ('column email: null → "1@example.com"',),
    "created_at = created_at + interval '1 ms'": (
        'column created_at: "2020-09-13T12:26:40.001+00:00" → "2020-09-13T12:26:40+00:00"',
    ),
    "created_at = 'infinity'": ('column created_at: "infinity" → "2020-09-13T12:26:40+00:00"',),
    "name = 'A', raw_json = raw_json || '{{\"display_name\": \"B\"}}'": (
        'display_name: "B" → "User 1"',
    ),
}


@pytest.mark.parametrize("id_type", ["text", "uuid"])
def test_a_column_that_disagrees_with_its_record_is_told(world: World, id_type: str) -> None:
    adopt(world, id_type)
    [user_id] = sign_up(world.project, 1)
    world.sweep()
    for wrong, told in WRONG.items():
        world.query(f"update {{users_sync}} set {wrong}")  # noqa: S608
        found = planned(world).lines(values=True)
        assert found == [f"~ {user_id} {text}" for text in told]
        world.sweep()
        assert planned(world).changes == []


@pytest.mark.parametrize("raw_json", ["null", "'null'", "'1'", "'[]'"])
def test_a_row_without_a_record_is_one_difference(world: World, raw_json: str) -> None:
    adopt(world, "text")
    [user_id] = sign_up(world.project, 1)
    world.sweep()
    world.query(f"update {{users_sync}} set raw_json = {raw_json}, email = 'wrong'")  # noqa: S608
    assert planned(world).lines() == [
        f"~ {user_id} column raw_json",
        f"~ {user_id} column email",
    ]


@pytest.mark.parametrize(
    ("levels", "told"),
    [
        (199, "client_metadata"),  # the record itself is a level
        (200, "column raw_json"),
        (900, "column raw_json"),
        (3000, "column raw_json"),
    ],
)
def test_a_record_deeper_than_any_that_is_stored_is_told_as_a_whole(
    world: World, levels: int, told: str
) -> None:
    adopt(world, "text")
    [user_id] = sign_up(world.project, 1)
    world.sweep()
    nested = f'{{"client_metadata": {"[" * levels}{"]" * levels}}}'
    world.query("update {users_sync} set raw_json = raw_json || %s::jsonb", nested)
    assert planned(world).lines() == [f"~ {user_id} {told}"]


def test_a_moved_user_is_an_update_and_nobody_is_missing(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(12))
    quick_world.sweep()
    quick_world.project.edit(ids[2], signed_up_at_millis=1_700_000_000_000)
    quick_world.project.edit(ids[9], signed_up_at_millis=5)

    found = planned(quick_world)

    assert found.lines() == [
        f"~ {ids[9]} signed_up_at_millis",
        f"~ {ids[2]} signed_up_at_millis",
    ]
    assert found.result.outcome == "complete"


# What would not be done


def test_held_deletions_are_told_with_their_reason(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(30))
    quick_world.sweep()
    delete_all(quick_world.project, ids[:12])

    found = planned(quick_world, max_fraction=0.2)
    quick_world.sweep(max_fraction=0.2)
    again = planned(quick_world, max_fraction=0.2)

    assert found.kinds() == again.kinds() == {"hold": ids[:12]}
    assert found.result.outcome == again.result.outcome == "held"
    assert {c.reason.split()[0] for c in found.changes} == {"more"}
    assert {c.reason.split()[0] for c in again.changes} == {"held"}
    assert found.said()[-1] == "18 users: 12 held, 18 unchanged"


def test_approved_deletions_are_told_as_such(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(30))
    quick_world.sweep()
    delete_all(quick_world.project, ids[:12])
    quick_world.sweep(max_fraction=0.2)
    Suspects("neon_auth").approve(quick_world.conn, 99)
    sign_up(quick_world.project, 4)

    found = planned(quick_world, max_fraction=0.2)

    gone = sorted(set(ids[:12]) - {ids[4]})
    assert found.kinds() == {"delete": gone}
    assert all(line.endswith("USER_NOT_FOUND (approved)") for line in found.lines())
    assert found.result.counts["approved"] == 11


def test_deletions_of_the_day_count_for_the_guard(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(20))
    quick_world.sweep()
    delete_all(quick_world.project, ids[:3])
    quick_world.sweep()
    delete_all(quick_world.project, ids[3:5])
    assert planned(quick_world, max_count=5).kinds() == {"delete": ids[3:5]}
    assert planned(quick_world, max_count=4).kinds() == {"hold": ids[3:5]}


def test_whatever_waits_for_the_grace_period_is_told(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(9))
    quick_world.sweep()
    quick_world.project.edit(ids[1], display_name="New")
    quick_world.project.delete(ids[6])
    quick_world.sweep()
    delete_all(quick_world.project, [ids[1], ids[3]])
    sign_up(quick_world.project, 6)

    found = planned(quick_world, grace_seconds=60)

    assert found.kinds() == {"delete": [ids[3]], "wait": [ids[1], ids[6]]}
    assert found.said()[-1] == "7 users: 1 to delete, 2 waiting, 6 unchanged"


def test_deletions_that_are_not_enabled_are_told(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(9))
    quick_world.sweep()
    delete_all(quick_world.project, ids[:2])

    found = planned(quick_world, enabled=False)

    assert found.lines() == [
        f"! {user_id} waiting: missing from the list, but deletions.enabled is false"
        for user_id in ids[:2]
    ]
    assert (found.said()[-1], found.result.difference) == (
        "7 users: 2 suspected, 7 unchanged",
        True,
    )


def test_hidden_users_are_told_and_are_no_difference(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(9))
    quick_world.sweep(include_anonymous=False)
    quick_world.project.edit(ids[4], is_anonymous=True, is_restricted=True)
    quick_world.sweep(include_anonymous=True)
    quick_world.query("delete from users_sync_worker.deletion")

    found = planned(quick_world, include_anonymous=False)

    assert found.lines() == [
        f"! {ids[4]} hidden: missing from the list, but GET still finds the user"
    ]
    assert not found.result.difference
    quick_world.sweep(include_anonymous=False)
    assert planned(quick_world, include_anonymous=False).changes == []


@pytest.mark.parametrize("known", [False, True])
def test_what_cannot_be_stored_is_told_with_its_error_and_no_value(
    quick_world: World, *, known: bool
) -> None:
    sign_up(quick_world.project, *range(6))
    odd = numbered(99)
    secret = raw_record(odd, None, ',"client_metadata":"secret"')
    quick_world.project.put_raw(odd, MILLIS, secret)
    quick_world.project.put_raw("odd", MILLIS, b'{"label":"secret"}')
    quick_world.sweep() if known else None

    found = planned(quick_world)

    quarantined = [change for change in found.changes if change.kind == "quarantine"]
    assert sorted(change.reason for change in quarantined) == [
        "id is not a lower-case UUID",
        "signed_up_at_millis is not an integer",
    ]
    assert f"! {odd} quarantined: signed_up_at_millis is not an integer" in found.lines()
    objects = [json.loads(line) for line in found.said(as_objects=True)]
    ids = {each["id"] for each in objects if each["change"] == "quarantine"}
    assert ids == {odd, None}
    assert "secret" not in str(found.said(as_objects=True)) + str(found.said())
    assert (found.result.counts["quarantined"], found.result.difference) == (2, True)


REFUSE = """
create function public.refuse() returns trigger language plpgsql as $$
begin
    raise exception using errcode = '22000', message = new.raw_json;
end $$;
create trigger refuse before insert on {users_sync}
for each row when (new.raw_json->>'display_name' = 'Rude') execute function public.refuse()
"""


def test_what_the_database_refused_before_would_not_be_tried_again(world: World) -> None:
    world.sweep()
    world.query(REFUSE)
    ids = sign_up(world.project, *range(3))
    world.project.edit(ids[1], display_name="Rude")
    world.sweep()

    assert planned(world).lines() == [
        f"! {ids[1]} quarantined: refused by the database: 22000",
    ]
    world.project.edit(ids[1], display_name="Polite")
    assert planned(world).lines() == [f"+ {ids[1]}"]


def test_those_are_asked_about_first_who_are_suspected_longest(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(12))
    quick_world.sweep()
    delete_all(quick_world.project, ids[6:8])
    quick_world.sweep(enabled=False)
    delete_all(quick_world.project, ids[:2])
    quick_world.api.requests.clear()

    found = planned(quick_world, max_count=0)

    assert quick_world.asked() == [ids[6]]
    assert found.kinds() == {"hold": [*ids[:2], *ids[6:8]]}


# Random histories

ODD = {
    numbered(70_000): raw_record(numbered(70_000), None),
    numbered(70_001): raw_record(numbered(70_001), MILLIS, ',"client_metadata":NaN'),
    "odd": b'{"label":1}',
}


class History(NamedTuple):
    """What happened before the first sweep, and what between it and the plan."""

    first: list[Happening]
    later: list[Happening]
    odd: set[str]
    approved: bool
    options: dict[str, Any]


histories = st.builds(
    History,
    st.lists(happenings, min_size=6, max_size=20),
    st.lists(happenings, max_size=20),
    st.sets(st.sampled_from(sorted(ODD))),
    st.booleans(),
    st.fixed_dictionaries(
        {
            "include_anonymous": st.booleans(),
            "max_count": st.sampled_from([0, 2, 500]),
            "grace_seconds": st.sampled_from([0, 0, 60]),
            "audit_hours": st.sampled_from([24, 1e-9]),
            "enabled": st.sampled_from([True, True, True, False]),
            "page_size": st.sampled_from([3, 4, 6]),
        }
    ),
)

Row = tuple[dict[str, Any], bool, str]


def rows(world: World) -> dict[str, Row]:
    """Give record, whether it is live, and version of each row."""
    if world.query("select to_regclass('neon_auth.users_sync')") == [(None,)]:
        return {}
    found = world.query(
        "select id::text, raw_json - %s, deleted_at is null, xmin::text || ctid::text"
        " from {users_sync}",
        IGNORED,
    )
    return {row[0]: (row[1], row[2], row[3]) for row in found}


def done(before: dict[str, Row], after: dict[str, Row]) -> dict[str, list[str]]:
    """Say what happened to rows, as `Planned.kinds` says it."""
    found: dict[str, list[str]] = {}
    for user_id in sorted(after):
        was, now = before.get(user_id), after[user_id]
        if was is None:
            found.setdefault("insert", []).append(user_id)
        elif was[1] != now[1]:
            found.setdefault("restore" if now[1] else "delete", []).append(user_id)
        elif was[2] != now[2]:
            found.setdefault("update", []).append(user_id)
    return found


def names(fields: Iterable[Difference]) -> set[str]:
    return {each.path.split(".")[0] for each in fields}


@hypothesis_settings(
    max_examples=10,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(histories)
def test_after_any_history_a_sweep_does_exactly_what_was_planned(
    quick_world: World, history: History
) -> None:
    world = quick_world
    world.forget_everything()
    # Long ago, or everybody who left would wait.
    story = Story(world.project, lambda: real_millis() - 3_600_000)
    for happening in history.first:
        story.tell(happening)
    world.sweep(**history.options)
    # Not just now: a worker's clock lags behind the database's by up to a round trip.
    world.query("update users_sync_worker.deletion set asked_at = asked_at - interval '1 minute'")
    for happening in history.later:
        story.tell(happening)
    if history.approved:
        Suspects("neon_auth").approve(world.conn, 99)
    for label in history.odd:
        world.project.put_raw(label, MILLIS, ODD[label])
    before, untouched = rows(world), everything(world)
    world.api.requests.clear()

    found = planned(world, **history.options)

    assert untouched == everything(world)
    asked = sorted(world.asked())
    world.api.requests.clear()
    report = world.sweep(**history.options)
    after, kinds = rows(world), found.kinds()
    assert done(before, after) == {
        kind: ids
        for kind, ids in kinds.items()
        if kind in {"insert", "restore", "update", "delete"}
    }
    for change in found.changes:
        if change.kind == "update":
            was, now = before[change.subject][0], after[change.subject][0]
            differing = {name for name in was.keys() | now.keys() if was.get(name) != now.get(name)}
            assert differing == names(change.fields)
    assert set(kinds.get("hold", ())) == world.suspects("held")
    assert len(kinds.get("hide", ())) == report.counts["hidden"]
    left = world.suspects("candidate") | world.suspects("approved")
    assert len(kinds.get("wait", ())) == len(left) + report.counts["stale"]
    assert left <= set(kinds.get("wait", ()))
    assert len(kinds.get("quarantine", ())) == len(world.quarantined()) == len(history.odd)
    assert asked == sorted(world.asked())
    assert found.result.outcome == report.outcome
    counts = {"unchanged": report.unchanged, "waiting": report.waiting, **report.counts}
    assert {**counts, "candidates": report.candidates} == found.result.counts
    assert all(len(ids) == len(set(ids)) for ids in kinds.values())


# Nothing is written

CATALOG = "select oid, xmin::text, relname from pg_class order by oid"
READS = """
grant usage on schema neon_auth, users_sync_worker to {role};
grant select on all tables in schema neon_auth, users_sync_worker to {role}
"""


def read_only(url: str, role: str) -> str:
    """Give the URL of sessions that may only read, were it for their role or for themselves."""
    return make_conninfo(url, options=f"-c role={role} -c default_transaction_read_only=on")


def test_tables_of_a_newer_version_are_refused_as_by_a_sweep(world: World) -> None:
    sign_up(world.project, 1)
    world.sweep()
    world.query(
        "insert into users_sync_worker.migration (number, name, version)"
        " values (999, '999_newer.sql', '7.5.0')"
    )
    for refused in (planned, World.sweep):
        with pytest.raises(Misconfigured, match=r"made by users-sync 7\.5\.0"):
            refused(world)


def test_a_role_that_may_only_read_can_plan(world: World, plain_role: str) -> None:
    ids = sign_up(world.project, *range(12))
    world.sweep()
    world.conn.execute(sql.SQL(READS).format(role=sql.Identifier(plain_role)))
    world.project.edit(ids[4], display_name="New")
    delete_all(world.project, ids[6:8])
    world.project.put_raw("odd", MILLIS, b"{}")
    before = everything(world)

    found = planned(world, url=read_only(world.url, plain_role))

    assert before == everything(world)
    assert found.result.counts["deleted"] == 2
    assert set(found.kinds()) == {"update", "delete", "quarantine"}


def test_in_an_empty_database_everybody_would_be_inserted(world: World, plain_role: str) -> None:
    ids = sign_up(world.project, *range(12))
    before = world.query(CATALOG)

    found = planned(world, url=read_only(world.url, plain_role))

    assert before == world.query(CATALOG)
    assert found.lines() == [f"+ {user_id}" for user_id in ids]
    assert found.result.difference


def test_who_moved_behind_all_others_is_told_once_and_nobody_is_new(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(5), is_anonymous=True)
    quick_world.sweep()
    for user_id in ids[:3]:
        quick_world.project.upgrade(user_id)

    found = planned(quick_world, page_size=3)

    assert [(change.kind, change.subject) for change in found.changes] == [
        ("update", user_id) for user_id in ids[:3]
    ]
    assert (found.result.counts["inserted"], found.result.counts["updated"]) == (0, 3)


@pytest.mark.parametrize("id_type", ["text", "uuid"])
def test_a_table_that_no_sweep_has_seen_yet_is_compared(world: World, id_type: str) -> None:
    adopt(world, id_type)
    known, gone, deleted, wrong = (numbered(n) for n in (1, 2, 3, 4))
    sign_up(world.project, 1, 3, 4, 5)
    record = json.dumps(world.project.users()[known])
    world.query(
        "insert into {users_sync} select raw->>'id', raw, 'User 1', '1@example.com',"
        " to_timestamp(1600000000) from (select %s::text::jsonb) r (raw)".replace(
            "raw->>'id'", "(raw->>'id')::" + id_type
        ),
        record,
    )
    for user_id, moment in ((gone, "null"), (deleted, "now()"), (wrong, "null")):
        world.query(
            f"insert into {{users_sync}} (id, deleted_at) values (%s, {moment})",  # noqa: S608
            user_id,
        )
    catalog = world.query(CATALOG)

    found = planned(world)

    assert catalog == world.query(CATALOG)
    assert found.kinds() == {
        "insert": [numbered(5)],
        "restore": [deleted],
        "update": [wrong],
        "delete": [gone],
    }
    report = world.sweep()
    assert {name: found.result.counts[name] for name in report.counts} == report.counts


def test_a_plan_begins_at_the_start_and_leaves_the_checkpoint(quick_world: World) -> None:
    stop = Event()
    sign_up(quick_world.project, *range(40))
    with pytest.raises(Stopped):
        quick_world.sweep(lambda _: stop.set(), stop)
    before = everything(quick_world)
    quick_world.api.requests.clear()

    found = planned(quick_world)

    assert quick_world.cursors()[0] is None
    assert before == everything(quick_world)
    live = len(quick_world.live())
    assert (found.result.counts["users"], found.result.counts["inserted"]) == (40, 40 - live)


def test_a_plan_is_not_logged_as_a_sweep(quick_world: World) -> None:
    sign_up(quick_world.project, *range(4))
    with capture_logs() as logs:
        planned(quick_world)
    assert {(line["event"], line["log_level"]) for line in logs} == {
        ("sweep.started", "debug"),
        ("sweep.finished", "debug"),
    }


# What comes in between


def test_a_worker_that_is_at_work_is_in_nobodys_way(quick_world: World) -> None:
    sign_up(quick_world.project, *range(4))
    quick_world.sweep()
    quick_world.query(
        "update users_sync_worker.lease set holder = 'other', expires_at = now() + interval '1 h'"
    )
    before = everything(quick_world)
    assert planned(quick_world).result.outcome == "complete"
    assert before == everything(quick_world)


def test_after_a_lost_connection_nothing_is_told_twice(quick_world: World) -> None:
    sign_up(quick_world.project, *range(9))
    quick_world.sweep()
    ids = sign_up(quick_world.project, *range(9), display_name="New")

    def cut(_: Request) -> None:
        quick_world.query(CUT)

    quick_world.api.on_request(before_page(2, cut))
    assert planned(quick_world).lines() == [f"~ {user_id} display_name" for user_id in ids]


def test_what_is_asked_twice_is_told_once() -> None:
    """A batch is tried again from its start."""
    told: list[Change] = []
    users = people(1, 2, 3)
    recorder = PlanRecorder(told.append, ())
    for _ in range(2):
        recorder.compared(Users.of(users), "is=", [json.dumps({"was_deleted": True})])
    state = SweepState(1, "plan", datetime.min.replace(tzinfo=UTC), Cache())
    recorder.turn_page(state)
    recorder.compared(Users.of(users[1:]), "s=", [json.dumps({"was_deleted": False})])
    recorder.turn_page(state)
    assert [(change.kind, change.subject) for change in told] == [
        ("insert", users[0].id),
        ("wait", users[1].id),
    ]


# What ends it


def test_lines_are_told_while_pages_are_read(quick_world: World) -> None:
    sign_up(quick_world.project, *range(20))
    told: list[Change] = []
    when: list[int] = []
    quick_world.api.on_request(before_page(5, lambda _: when.append(len(told))))

    chosen = settings(quick_world.project)
    plan(chosen, quick_world.url, Event(), told.append, httpx.WSGITransport(quick_world.api))

    assert 0 < when[0] < len(told) == 20


def test_a_stop_ends_it(quick_world: World) -> None:
    stop = Event()
    sign_up(quick_world.project, *range(40))
    quick_world.sweep()
    before = everything(quick_world)
    quick_world.api.on_request(before_page(3, lambda _: stop.set()))
    with pytest.raises(Stopped):
        planned(quick_world, stop=stop)
    assert before == everything(quick_world)


def test_without_every_proof_there_is_no_plan(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(4))
    quick_world.sweep()
    quick_world.project.delete(ids[1])
    quick_world.api.on_request(lambda r: None if is_list(r) else server_error())
    before = everything(quick_world)
    with pytest.raises(SourceUnavailable):
        planned(quick_world, retry_minutes=0)
    assert before == everything(quick_world)


def test_the_table_of_another_project_is_refused(quick_world: World) -> None:
    sign_up(quick_world.project, 1)
    quick_world.sweep()
    quick_world.project.project_id = "22222222-2222-4222-8222-222222222222"
    quick_world.api.requests.clear()
    with pytest.raises(Misconfigured, match="another Stack Auth project"):
        planned(quick_world)
    assert quick_world.api.requests == []


def test_a_table_whose_users_the_project_does_not_know_is_refused(world: World) -> None:
    adopt(world, "text")
    world.query("insert into {users_sync} (id) values (%s)", numbered(1))
    sign_up(world.project, 2)
    with pytest.raises(Misconfigured, match="knows none of 1 that were asked for"):
        planned(world)


def test_a_table_of_another_shape_is_refused(world: World) -> None:
    world.query("create schema neon_auth; create table neon_auth.users_sync (id int)")
    with pytest.raises(Misconfigured, match="cannot be used"):
        planned(world)
