"""Whatever happens to users, pages and connections: in the end the table equals the project."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from threading import Event, RLock
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.support.fake_time import FakeTime, installed, real_millis
from tests.support.sweep_world import World, is_list, numbered
from tests.support.users_apis import api_of, every_server
from worker.errors import Stopped
from worker.sandbox.api import Project, Reply, Request, server_error

EVENTS = (
    "sign up",
    "sign up at once",
    "sign up anonymously",
    "edit",
    "touch",
    "delete",
    "delete two",
    "restore",
    "restrict",
    "unrestrict",
    "upgrade",
)
# These happen to a sweep, not to a user.
ACCIDENTS = ("stop", "fault", "cut")


class Happening(NamedTuple):
    """Something that happens to one of the users: to the nth, or near a page's cursor."""

    what: str
    nth: int


@dataclass
class Story:
    """A project with a history, and whoever of it came back after having left."""

    project: Project
    now_millis: Callable[[], int]
    gone: list[str] = field(default_factory=list)
    returned: set[str] = field(default_factory=set)
    lock: RLock = field(default_factory=RLock)
    numbers: Iterator[int] = field(default_factory=lambda: count(1))

    def __post_init__(self) -> None:
        # Somebody always stays, or the emptied project would wait for a person.
        self.project.create(id=numbered(0), signed_up_at_millis=1)

    def tell(self, happening: Happening, cursor: str | None = None) -> None:
        """Let it happen, near the cursor if there is one, for there it hurts most."""
        what, nth = happening
        with self.lock:
            if what.startswith("sign up"):
                self._sign_up(what)
                return
            ids = self.gone if what == "restore" else self.project.ids()[1:]
            if not ids:
                return
            near = ids.index(cursor) + nth % 4 - 2 if cursor in ids else nth
            self._happen(what, ids[near % len(ids)])
            if what == "delete two":
                self.tell(Happening("delete", near))

    def _sign_up(self, what: str) -> None:
        number = next(self.numbers)
        millis = self.now_millis() // 1000 * 1000 if what == "sign up at once" else None
        self.project.create(
            id=numbered(number * 7919 % 65_536),
            signed_up_at_millis=self.now_millis() if millis is None else millis,
            primary_email=f"{number}@example.com",
            **({"is_anonymous": True} if what == "sign up anonymously" else {}),
        )

    def _happen(self, what: str, user_id: str) -> None:
        match what:
            case "edit":
                self.project.edit(user_id, display_name=f"Name {next(self.numbers)}")
            case "touch":
                self.project.touch(user_id)
            case "delete" | "delete two":
                self.project.delete(user_id)
                self.gone.append(user_id)
            case "restore":
                self.gone.remove(user_id)
                self.returned.add(user_id)
                self.project.create(id=user_id, signed_up_at_millis=self.now_millis())
            case "restrict":
                self.project.restrict(user_id)
            case "unrestrict":
                self.project.unrestrict(user_id)
            case "upgrade" if self.project.is_anonymous(user_id):
                self.project.upgrade(user_id)

    def check(self, world: World) -> None:
        """See that nobody who is there, and never left, is marked deleted."""
        with self.lock:
            wrong = world.deleted() & set(self.project.ids()) - self.returned
        assert not wrong


@dataclass
class Trouble:
    """What happens during one sweep: before a page is answered, counted from 1."""

    world: World
    story: Story
    plan: list[tuple[int, Happening]]
    stop: Event = field(default_factory=Event)
    pages: Iterator[int] = field(default_factory=lambda: count(1))
    page: int = 0
    wrong: list[AssertionError] = field(default_factory=list)

    def __call__(self, request: Request) -> Reply | None:
        with self.story.lock:
            self._check()
            if is_list(request):
                self.page = next(self.pages)
            due = [happening for page, happening in self.plan if page == self.page]
            self.plan = [(page, happening) for page, happening in self.plan if page != self.page]
            replies = [self._happen(happening, request) for happening in due]
        return next((reply for reply in replies if reply), None)

    def _happen(self, happening: Happening, request: Request) -> Reply | None:
        match happening.what:
            case "fault":
                return server_error()
            case "stop":
                self.stop.set()
            case "cut":
                self.world.query(CUT)
            case _:
                self.story.tell(happening, request.query.get("cursor"))
        return None

    def _check(self) -> None:
        """Keep what is wrong: raised here, in the API's own thread, it might get lost."""
        try:
            self.story.check(self.world)
        except AssertionError as error:
            self.wrong.append(error)


CUT = """
select pg_terminate_backend(pid, 5000) from pg_stat_activity
where application_name = 'users-sync' and datname = current_database()
"""

happenings = st.builds(Happening, st.sampled_from(EVENTS), st.integers(0, 40))
accidents = st.builds(Happening, st.sampled_from(ACCIDENTS), st.just(0))
troubles = st.tuples(st.integers(1, 9), st.one_of(*[happenings] * 6, accidents))


class Round(NamedTuple):
    """What happens before a sweep, what during it, and its page size."""

    before: list[Happening]
    during: list[tuple[int, Happening]]
    page_size: int


rounds = st.builds(
    Round,
    st.lists(happenings, max_size=8),
    st.lists(troubles, max_size=5),
    st.sampled_from([3, 4, 6]),
)
moderate = hypothesis_settings(
    max_examples=10,
    deadline=None,
    # Each attempt at a smaller history takes a second: a failing one is printed as it is.
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def sweep_through(world: World, story: Story, told: Round, **options: Any) -> None:
    """Sweep while all that happens, and see that at no moment anything false is in the table."""
    trouble = Trouble(world, story, list(told.during))
    world.api.on_request(trouble)
    with suppress(Stopped):
        world.sweep(lambda _: story.check(world), trouble.stop, page_size=told.page_size, **options)
    world.api.on_request(None)
    story.check(world)
    assert trouble.wrong == []


@moderate
@given(
    st.lists(happenings, min_size=4, max_size=16),
    st.lists(rounds, min_size=1, max_size=3),
    st.sampled_from(["everybody", "nobody hidden"]),
)
@every_server
def test_after_any_history_two_sweeps_make_table_and_project_equal(
    quick_world: World, first: list[Happening], later: list[Round], listed: str
) -> None:
    world = quick_world
    world.forget_everything()
    story = Story(world.project, real_millis)
    # Whoever is hidden is asked for in each sweep.
    all_listed = listed == "everybody"
    options: dict[str, Any] = {"include_anonymous": all_listed, "audit_hours": 1e-9}
    for happening in first:
        story.tell(happening)

    for told in later:
        for happening in told.before:
            story.tell(happening)
        sweep_through(world, story, told, **options)
    outcomes = {world.sweep(**options).outcome for _ in range(2)}

    assert outcomes == {"complete"}
    assert_equal(world, all_listed=all_listed)


def assert_equal(world: World, *, all_listed: bool) -> None:
    """See that the table is right; hidden users need no row, but a row of theirs must be right."""
    rows, everybody = world.rows(), world.wanted()
    assert world.wanted(hidden_too=all_listed).keys() <= rows.keys()
    assert rows.items() <= everybody.items()


GRACE_SECONDS = 60
# More than what passes between two sweeps, less than the grace period.
STEP_SECONDS = 25


@pytest.fixture
def fake_time(quick_world: World) -> Iterator[FakeTime]:
    """Return the clock of a database whose `clock_timestamp()` is ours."""
    with installed(quick_world.query) as clock:
        yield clock


def copy_of(project: Project) -> Project:
    """Copy a project as it is now: what a replica that lags will show."""
    copy = Project()
    for record in project.users().values():
        copy.create(**record)
    return copy


class Lagging(NamedTuple):
    """What happens before a sweep, and whether that reads a replica that knows nothing of it."""

    before: list[Happening]
    lags: bool
    steps: int


lagging = st.builds(
    Lagging, st.lists(happenings, max_size=6), st.booleans(), st.sampled_from([1, 1, 1, 2, 9])
)


@moderate
@given(
    st.lists(happenings, min_size=4, max_size=12),
    st.lists(lagging, min_size=2, max_size=5),
)
def test_within_the_grace_period_a_replica_that_lags_makes_nothing_false(
    quick_world: World, fake_time: FakeTime, first: list[Happening], later: list[Lagging]
) -> None:
    world = quick_world
    world.forget_everything()
    story = Story(world.project, fake_time.millis)
    for happening in first:
        story.tell(happening)
    shown_dead: set[str] = set()

    for told in later:
        replica = api_of(copy_of(story.project)) if told.lags else world.api
        fake_time.pass_by(STEP_SECONDS * (1 if told.lags else told.steps))
        for happening in told.before:
            story.tell(happening)
        before = world.deleted() if world.query(HAS_TABLE) != [(None,)] else set()
        reader = World(world.url, world.conn, replica.project)
        reader.sweep(lambda _: story.check(world), grace_seconds=GRACE_SECONDS)
        story.check(world)
        shown_dead |= before & world.live() - set(story.project.ids()) - story.returned
    for _ in range(2):
        fake_time.pass_by(3 * GRACE_SECONDS)
        world.sweep(grace_seconds=GRACE_SECONDS)

    assert shown_dead == set()
    assert_equal(world, all_listed=True)
    assert world.deleted().isdisjoint(world.project.ids())


HAS_TABLE = "select to_regclass('neon_auth.users_sync')"


def test_deletions_wait_for_exactly_the_grace_period(
    quick_world: World, fake_time: FakeTime
) -> None:
    story = Story(quick_world.project, fake_time.millis)
    young = quick_world.project.create(signed_up_at_millis=fake_time.millis())
    quick_world.sweep(grace_seconds=GRACE_SECONDS)
    quick_world.project.delete(young)
    waited = []

    for seconds in (0, 30, 25, 10):
        fake_time.pass_by(seconds)
        report = quick_world.sweep(grace_seconds=GRACE_SECONDS)
        waited.append((report.waiting, report.counts["deleted"]))

    assert waited == [(1, 0), (1, 0), (1, 0), (0, 1)]
    story.check(quick_world)


def test_a_user_who_comes_back_waits_for_exactly_the_grace_period(
    quick_world: World, fake_time: FakeTime
) -> None:
    story = Story(quick_world.project, fake_time.millis)
    story.tell(Happening("sign up", 0))
    quick_world.sweep(grace_seconds=0)
    story.tell(Happening("delete", 0))
    quick_world.sweep(grace_seconds=0)
    story.tell(Happening("restore", 0))
    restored = []

    for seconds in (0, 55, 10):
        fake_time.pass_by(seconds)
        report = quick_world.sweep(grace_seconds=GRACE_SECONDS)
        restored.append((report.counts["stale"], report.counts["restored"]))

    assert restored == [(1, 0), (1, 0), (0, 1)]
    assert quick_world.wanted() == quick_world.rows()
