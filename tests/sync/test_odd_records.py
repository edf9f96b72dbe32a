"""One odd record never costs the page it stands on."""

import json

import pytest

from tests.support.sweep_world import World, numbered, raw_record, row_of, sign_up

# Behind the second user of nine, so that every page size meets it among good ones.
MILLIS = 1_600_000_000_001
ODD = numbered(99)
FFFD = "\N{REPLACEMENT CHARACTER}"


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


UNSTORABLE = {
    "a sign-up that is text": raw_record(ODD, "1600000000001"),
    "a sign-up with a fraction": raw_record(ODD, 1.5),
    "a sign-up that is true": raw_record(ODD, True),  # noqa: FBT003  a value, not a flag
    "a sign-up that is null": raw_record(ODD, None),
    "no sign-up": f'{{"id":"{ODD}"}}'.encode(),
    "a sign-up out of range": raw_record(ODD, 10**17),
    "a sign-up over 64 bits": raw_record(ODD, 10**30),
    "nesting of 300": raw_record(ODD, MILLIS, f',"client_metadata":{nested(300)}'),
    "nesting of 100,000": raw_record(ODD, MILLIS, f',"client_metadata":{nested(100_000)}'),
    "NaN": raw_record(ODD, MILLIS, ',"client_metadata":{"rate":NaN}'),
    "infinity": raw_record(ODD, MILLIS, ',"client_metadata":{"rate":Infinity}'),
    "a number of 5,000 digits": raw_record(ODD, MILLIS, f',"client_metadata":{"9" * 5000}'),
}
NAMELESS = {
    "an id in upper case": raw_record(numbered(0xABC).upper(), MILLIS),
    "an id that is no UUID": raw_record("somebody", MILLIS),
    "an id with a NUL": raw_record(numbered(99)[:-1] + "\\u0000", MILLIS),
    "no id": b'{"signed_up_at_millis":1600000000001}',
    "an id that is a number": b'{"id":7,"signed_up_at_millis":1600000000001}',
    "null": b"null",
    "a text": b'"user"',
    "a list": b"[]",
}
REFUSED = {**UNSTORABLE, **NAMELESS}


def put(world: World, record: bytes) -> None:
    world.project.put_raw(ODD, MILLIS, record)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_stored_is_quarantined_and_its_neighbours_are_rows(
    quick_world: World, case: str
) -> None:
    sign_up(quick_world.project, *range(9))
    put(quick_world, REFUSED[case])

    report = quick_world.sweep(page_size=4)

    assert quick_world.wanted() == quick_world.rows()
    assert [ODD if case in UNSTORABLE else None] == list(quick_world.quarantined())
    assert (report.outcome, report.counts["quarantined"]) == ("complete", 1)
    assert (report.counts["users"], report.counts["inserted"]) == (10, 9)


def test_what_is_known_to_be_unstorable_is_not_written_again(quick_world: World) -> None:
    sign_up(quick_world.project, *range(9))
    # A page with a record that no parser reads whole is read in another way.
    records = [REFUSED[case] for case in REFUSED if case != "nesting of 100,000"]
    for n, record in enumerate(records):
        user_id = numbered(100 + n)
        quick_world.project.put_raw(user_id, MILLIS, record.replace(ODD.encode(), user_id.encode()))
    first = quick_world.sweep(page_size=12)
    before = quick_world.query("select q.*, xmin::text from users_sync_worker.quarantine q")

    report = quick_world.sweep(page_size=12)

    assert before == quick_world.query("select q.*, xmin::text from users_sync_worker.quarantine q")
    assert len(records) == first.counts["quarantined"] == report.counts["quarantined"]
    assert report.unchanged == 9


STORABLE = {
    "a NUL": (',"client_metadata":{"a":"x\\u0000y"}', {"a": f"x{FFFD}y"}),
    "a NUL in a name": (',"client_metadata":{"a\\u0000":1}', {f"a{FFFD}": 1}),
    "a lone surrogate": (',"client_metadata":[["\\ud800x"]]', [[f"{FFFD}x"]]),
    "a surrogate in a name": (',"client_metadata":[{"\\udfff":{}}]', [{FFFD: {}}]),
    "a backslash and u0000": (',"client_metadata":"\\\\u0000 \\\\ud800"', "\\u0000 \\ud800"),
    "a number that no float holds": (',"client_metadata":{"n":1e400}', {"n": 10**400}),
    "an integer over 64 bits": (f',"client_metadata":{{"n":{2**70}}}', {"n": 2**70}),
    "a metadata of 3 MB": (f',"client_metadata":"{"x" * 3_000_000}"', "x" * 3_000_000),
    "nesting of 190": (f',"client_metadata":{nested(190)}', json.loads(nested(190))),
    "a name twice": (',"client_metadata":1,"client_metadata":2', 2),
}


@pytest.mark.parametrize("case", STORABLE)
def test_what_can_be_stored_is_and_stays_unchanged(quick_world: World, case: str) -> None:
    extra, wanted = STORABLE[case]
    sign_up(quick_world.project, *range(9))
    put(quick_world, raw_record(ODD, MILLIS, extra))

    quick_world.sweep(page_size=4)

    rows, before = quick_world.rows(), quick_world.versions()
    assert wanted == rows.pop(ODD)[0]["client_metadata"]
    assert (quick_world.wanted(), {}) == (rows, quick_world.quarantined())
    assert quick_world.sweep(page_size=4).unchanged == 10
    assert before == quick_world.versions()


@pytest.mark.parametrize("case", STORABLE)
def test_what_can_be_stored_is_the_same_beside_any_neighbour(quick_world: World, case: str) -> None:
    """A page with a lone surrogate is read by another parser."""
    put(quick_world, raw_record(ODD, MILLIS, STORABLE[case][0]))
    quick_world.sweep()
    before = quick_world.versions()
    quick_world.project.put_raw(numbered(1), 1, raw_record(numbered(1), 1, ',"a":"\\ud800"'))
    assert quick_world.sweep().unchanged == 1
    assert before < quick_world.versions()


@pytest.mark.parametrize("field", ["display_name", "primary_email"])
def test_odd_characters_are_replaced_in_columns_too(quick_world: World, field: str) -> None:
    sign_up(quick_world.project, *range(3))
    quick_world.project.edit(numbered(1), **{field: "a\0b\ud800c"})

    quick_world.sweep()

    _, name, email, _ = quick_world.rows()[numbered(1)]
    assert f"a{FFFD}b{FFFD}c" in {name, email}


def test_of_an_id_that_comes_twice_on_a_page_the_later_record_counts(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(5))
    twin = raw_record(ids[1], MILLIS + 1, ',"client_metadata":"later"')
    quick_world.project.put_raw(ODD, MILLIS + 1, twin)

    report = quick_world.sweep(page_size=100)

    assert set(ids) == quick_world.live()
    assert quick_world.rows()[ids[1]][0]["client_metadata"] == "later"
    assert report.outcome == "complete"


def test_a_repaired_record_is_stored_and_leaves_quarantine(quick_world: World) -> None:
    sign_up(quick_world.project, *range(9))
    put(quick_world, UNSTORABLE["NaN"])
    quick_world.sweep()
    quick_world.project.delete(ODD)
    sign_up(quick_world.project, 99)

    report = quick_world.sweep()

    assert quick_world.wanted() == quick_world.rows()
    assert (quick_world.quarantined(), report.counts["quarantined"]) == ({}, 0)


def test_a_record_that_is_gone_leaves_quarantine(quick_world: World) -> None:
    sign_up(quick_world.project, *range(9))
    put(quick_world, NAMELESS["no id"])
    quick_world.sweep()
    quick_world.project.delete(ODD)

    quick_world.sweep()

    assert quick_world.quarantined() == {}


def test_a_record_that_is_odd_in_another_way_is_written_again(quick_world: World) -> None:
    sign_up(quick_world.project, *range(3))
    put(quick_world, UNSTORABLE["NaN"])
    quick_world.sweep()
    put(quick_world, UNSTORABLE["nesting of 300"])

    quick_world.sweep()

    assert quick_world.query("select user_id, times from users_sync_worker.quarantine") == [
        (ODD, 2)
    ]
    assert "nested" in quick_world.quarantined()[ODD]


@pytest.mark.parametrize("case", ["no sign-up", "a sign-up out of range", "NaN"])
def test_a_user_whose_record_turns_unreadable_is_present(quick_world: World, case: str) -> None:
    """The row stays as it was last readable."""
    sign_up(quick_world.project, *range(9))
    sign_up(quick_world.project, 99, signed_up_at_millis=MILLIS)
    quick_world.sweep(page_size=4)
    before = quick_world.versions()
    put(quick_world, UNSTORABLE[case])

    report = quick_world.sweep(page_size=4)

    assert before == quick_world.versions()
    assert ({ODD}, set(), 0) == (
        set(quick_world.quarantined()),
        quick_world.suspects(),
        report.candidates,
    )


def test_a_user_whose_record_turned_unreadable_can_still_be_deleted(quick_world: World) -> None:
    sign_up(quick_world.project, *range(9))
    sign_up(quick_world.project, 99, signed_up_at_millis=MILLIS)
    quick_world.sweep()
    put(quick_world, UNSTORABLE["NaN"])
    quick_world.sweep()
    quick_world.project.delete(ODD)

    quick_world.sweep()

    assert ({ODD}, {}) == (quick_world.deleted(), quick_world.quarantined())


def test_a_page_of_nothing_but_odd_records_is_walked_past(quick_world: World) -> None:
    """Records without an id cannot be cursors; wider pages reach over them."""
    sign_up(quick_world.project, *range(4))
    for n in range(7):
        quick_world.project.put_raw(f"odd {n}", MILLIS, f'{{"label":{n}}}'.encode())

    report = quick_world.sweep(page_size=3)

    assert (report.outcome, report.counts["quarantined"]) == ("complete", 7)
    assert quick_world.wanted() == quick_world.rows()


def test_a_list_of_nothing_but_odd_records_is_not_an_empty_one(quick_world: World) -> None:
    for n in range(3):
        quick_world.project.put_raw(f"odd {n}", MILLIS, f'{{"label":{n}}}'.encode())

    report = quick_world.sweep()

    assert (report.outcome, report.counts["users"], report.unchanged) == ("complete", 3, 0)


def test_a_user_found_unreadable_by_asking_is_quarantined_and_no_candidate(
    quick_world: World,
) -> None:
    """Hidden from the list and odd at once."""
    ids = sign_up(quick_world.project, *range(9))
    quick_world.sweep()
    quick_world.project.restrict(ids[4])

    def spoil(request: object) -> None:
        path = getattr(request, "path", "")
        if path.endswith(ids[4]):
            quick_world.project.put_raw(ids[4], MILLIS, raw_record(ids[4], None))

    quick_world.api.on_request(spoil)
    report = quick_world.sweep(include_anonymous=False)

    assert (report.outcome, report.candidates) == ("complete", 0)
    assert ({ids[4]}, set()) == (set(quick_world.quarantined()), quick_world.suspects())
    assert ids[4] in quick_world.live()


CHECK = "alter table {users_sync} add constraint polite check (name <> 'Rude')"
TRIGGER = """
create function public.refuse() returns trigger language plpgsql as $$
begin
    if new.raw_json->>'display_name' = 'Rude' then
        raise exception using message = new.raw_json;
    end if;
    return new;
end $$;
create trigger refuse before insert or update on {users_sync}
for each row execute function public.refuse()
"""


@pytest.mark.parametrize("guard", ["check", "trigger"])
def test_a_user_whom_the_table_refuses_is_quarantined_and_tried_again(
    world: World, guard: str
) -> None:
    world.sweep()
    world.query(CHECK if guard == "check" else TRIGGER)
    ids = sign_up(world.project, *range(12))
    for user_id in (ids[3], ids[9]):
        world.project.edit(user_id, display_name="Rude", primary_email="secret@example.com")

    report = world.sweep(page_size=8)
    again = world.sweep(page_size=8)

    assert set(ids) - {ids[3], ids[9]} == world.live()
    assert report.counts["quarantined"] == again.counts["quarantined"] == 2
    assert (report.outcome, report.counts["users"]) == ("complete", 12)
    assert {ids[3], ids[9]} == set(world.quarantined())
    assert all("secret" not in error for error in world.quarantined().values())
    assert world.query("select distinct times from users_sync_worker.quarantine") == [(2,)]


def test_a_user_whom_the_table_refuses_no_longer_is_stored(world: World) -> None:
    world.sweep()
    world.query(CHECK)
    ids = sign_up(world.project, *range(6))
    world.project.edit(ids[3], display_name="Rude")
    world.sweep()
    world.query("alter table {users_sync} drop constraint polite")

    report = world.sweep()

    assert world.wanted() == world.rows()
    assert (report.counts["inserted"], world.quarantined()) == (1, {})


def test_an_update_that_the_table_refuses_leaves_the_row_as_it_was(world: World) -> None:
    ids = sign_up(world.project, *range(6))
    world.sweep()
    wanted = world.wanted()
    world.query(CHECK)
    world.project.edit(ids[3], display_name="Rude")

    report = world.sweep()

    assert wanted == world.rows()
    assert (report.counts["quarantined"], report.unchanged, world.suspects()) == (1, 5, set())


def test_two_users_who_swap_a_unique_email_are_settled_by_the_next_sweeps(world: World) -> None:
    """Each alone is refused while the other has its address; what is possible is written."""
    ids = sign_up(world.project, *range(6))
    world.sweep()
    world.query("create unique index on {users_sync} (email)")
    world.project.edit(ids[2], primary_email="3@example.com")
    world.project.edit(ids[3], primary_email="third@example.com")
    world.project.edit(ids[4], display_name="Other")

    world.sweep()
    world.sweep()

    assert world.wanted() == world.rows()
    assert world.quarantined() == {}


def test_a_row_that_was_odd_before_is_brought_into_line(world: World) -> None:
    ids = sign_up(world.project, *range(3))
    world.sweep()
    world.query("update {users_sync} set raw_json = raw_json || '{{\"display_name\": 7}}'")

    world.sweep()

    assert {user_id: row_of(world.project.users()[user_id]) for user_id in ids} == world.rows()
