"""The benchmarks measure what they say; how fast anything is, is not looked at here."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import httpx
import orjson
import pytest

from tests.bench.__main__ import BENCHMARKS
from tests.bench.api import REAL_SERVER, Costs, SlowApi
from tests.bench.figures import Figure, Turns, in_turns, write_docs
from tests.bench.projects import Listed, Long
from tests.bench.simulation import Costs as FleetCosts
from tests.bench.simulation import Fleet, simulate
from tests.support.places import ROOT
from worker.sandbox.api import APRIL, FakeStackApi
from worker.stack_auth.page_reader import read_page

PAGE = ROOT / "docs" / "benchmarks.md"


def asked(api: FakeStackApi, **query: object) -> bytes:
    headers = {
        "x-stack-access-type": "server",
        "x-stack-project-id": api.project.project_id,
        "x-stack-secret-server-key": api.project.secret_server_key,
    }
    with httpx.Client(transport=httpx.WSGITransport(api), headers=headers) as client:
        params = {name: str(value) for name, value in query.items()}
        return client.get("http://127.0.0.1/api/v1/users", params=params).content


def test_every_benchmark_has_its_place_in_the_docs() -> None:
    text = PAGE.read_text("utf-8")
    assert [name for name in BENCHMARKS if f"<!-- measured: {name} -->" not in text] == []


def test_list_of_very_many_users_is_a_list_like_any_other() -> None:
    api = FakeStackApi(Long(10))
    first, now = asked(api, limit=4), datetime.now(UTC)
    page = read_page(first, now, ())
    assert page is not None
    second = read_page(asked(api, limit=4, cursor=page.places[-2].id), now, ())
    assert second is not None
    assert (second.places[0], len(second.places)) == (page.places[-1], 4)
    assert page.next_cursor == page.places[-1].id
    rest = orjson.loads(asked(api, limit=9, cursor=second.places[-1].id))
    assert (len(rest["items"]), rest["pagination"]) == (3, {"next_cursor": None})
    api.kind = APRIL
    inclusive = orjson.loads(asked(api, limit=2, cursor=page.places[0].id))
    assert inclusive["items"][0]["id"] == page.places[0].id
    assert inclusive["pagination"]["next_cursor"] == page.places[2].id


def test_newest_of_very_many_users_come_first_if_asked_so() -> None:
    api = FakeStackApi(Long(10))
    newest = orjson.loads(asked(api, limit=3, desc="true"))["items"]
    millis = [record["signed_up_at_millis"] for record in newest]
    assert millis == sorted(millis, reverse=True)
    found = api.project.find(newest[0]["id"])
    assert found is not None
    assert orjson.loads(found.bodies[0]) == newest[0]


def test_pages_are_those_of_the_fake_api_whatever_changes_between_them() -> None:
    project = Listed()
    ids = project.populate(20)
    fake, slow = FakeStackApi(project), SlowApi(project)
    for change in (
        lambda: None,
        lambda: project.edit(ids[3], display_name="Changed"),
        lambda: project.delete(ids[4]),
        lambda: project.create(display_name="New"),
    ):
        change()
        for cursor in (ids[0], ids[5], ids[19]) * 2:
            wanted, found = (
                orjson.loads(asked(api, limit=9, cursor=cursor)) for api in (fake, slow)
            )
            assert found == wanted


def test_page_is_sent_in_both_orders_of_keys() -> None:
    project = Listed()
    project.populate(3)
    api = SlowApi(project)
    first, second, third, fourth = (asked(api, limit=9) for _ in range(4))
    assert (first, second) == (third, fourth)
    assert first != second


def test_pages_wait_for_each_other_and_each_takes_its_time() -> None:
    project = Listed()
    project.populate(10)
    api = SlowApi(project, costs=Costs(request=0.02, user=0.001))
    began = time.monotonic()
    with ThreadPoolExecutor(3) as pool:
        pages = [pool.submit(asked, api, limit=10) for _ in range(3)]
        assert [len(orjson.loads(page.result())["items"]) for page in pages] == [10] * 3
    assert time.monotonic() - began >= 3 * 0.03


def test_costs_of_the_real_server_are_those_that_were_measured() -> None:
    """A sweep over 60,000 users took 64.2 s in pages of 1,000, and 32.2 s in pages of 10,000."""
    assert sweep_seconds(REAL_SERVER, 60_000, 1_000) == pytest.approx(64.2, rel=0.05)
    assert sweep_seconds(REAL_SERVER, 60_000, 10_000) == pytest.approx(32.2, rel=0.05)


def sweep_seconds(costs: Costs, users: int, page: int) -> float:
    starts = range(0, users, page)
    return sum(
        costs.page(min(page, users - start), users - start if start else 0) for start in starts
    )


def test_rounds_are_taken_in_turns_and_the_first_does_not_count() -> None:
    taken: list[str] = []

    def contestant(name: str) -> float:
        taken.append(name)
        return float(len(taken))

    found = in_turns(3, {"a": lambda: contestant("a"), "b": lambda: contestant("b")})
    assert taken == ["a", "b"] * 4
    assert (found.median("a"), found.median("b")) == (5.0, 6.0)


def test_contestants_are_compared_round_by_round() -> None:
    assert Turns({"a": [1, 20, 9], "b": [1, 10, 3]}).ratio("a", "b") == 2


@pytest.mark.parametrize(
    ("figure", "verdict"),
    [
        (Figure("", 1.0), ""),
        (Figure("", 1.0, at_most=1.0), "yes"),
        (Figure("", 1.01, at_most=1.0), "no"),
        (Figure("", 2.0, at_least=2.0), "yes"),
        (Figure("", 1.9, at_least=2.0), "no"),
    ],
)
def test_target_is_reached_or_not(figure: Figure, verdict: str) -> None:
    assert figure.verdict == verdict


def test_figures_take_their_place_on_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- measured: x -->\nold\n<!-- end -->\nb\n", "utf-8")
    write_docs({"x": [Figure("speed", 1234.5, "users/s", at_least=1000)]}, "a machine", page)
    text = page.read_text("utf-8")
    assert "| speed | 1,234 users/s | at least 1,000 | yes |" in text
    assert "Measured on a machine." in text
    assert "old" not in text
    assert text.endswith("<!-- end -->\nb\n")


def test_an_empty_place_on_the_page_leaves_what_is_behind_it(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    empty = "<!-- measured: {} -->\n<!-- end -->\n"
    page.write_text(empty.format("x") + "between\n" + empty.format("y"), "utf-8")
    write_docs({"x": [Figure("speed", 1)]}, "a machine", page)
    text = page.read_text("utf-8")
    assert text.count("| speed |") == 1
    assert text.endswith("between\n" + empty.format("y"))


def test_simulated_fleet_is_bound_by_its_budget_and_then_by_the_control_database() -> None:
    fleet = Fleet(projects=10_000, users=0, machines=4, budget=500)
    cheap = FleetCosts(visit_cpu=0.001, control_cpu=0.0005, api=0.05)
    seen = simulate(fleet, cheap)
    assert seen.cycle == pytest.approx(10_000 * 1.1 / 450)
    assert seen.median == pytest.approx(seen.cycle / 2, rel=0.05)
    assert seen.requests == pytest.approx(450, rel=0.1)
    assert seen.first_to_break == "the API's budget"
    assert (
        simulate(fleet, replace(cheap, control_cpu=0.05)).first_to_break == "the control database"
    )
    assert simulate(fleet, replace(cheap, visit_cpu=0.2)).first_to_break == "a worker's processor"
