"""Holds the fake Stack Auth API to the real one: to its raw answers, and to what is known of it."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.support.places import SAMPLES
from worker.sandbox.api import (
    APRIL,
    TODAY,
    FakeStackApi,
    Kind,
    Project,
    Reply,
    Request,
    bad_gateway_html,
    cut_off,
    html_ok,
    serve,
    server_error,
    too_many_requests,
)

SAMPLE_USER = "def71855-20c0-4707-aece-204488fdd06f"
CLEAN_END = b'{"items":[],"is_paginated":true,"pagination":{"next_cursor":null}}'
EVERYBODY = {"include_anonymous": "true"}
BY_SIGN_UP = {"order_by": "signed_up_at"}


def access(project: Project) -> dict[str, str]:
    return {
        "x-stack-access-type": "server",
        "x-stack-project-id": project.project_id,
        "x-stack-secret-server-key": project.secret_server_key,
    }


def connect(api: FakeStackApi) -> httpx.Client:
    # The address is the one that stands in the sample of an unknown path.
    return httpx.Client(
        transport=httpx.WSGITransport(api),
        base_url="http://localhost:8102/api/v1",
        headers=access(api.project),
    )


@pytest.fixture
def project() -> Project:
    return Project()


@pytest.fixture(params=[TODAY, APRIL], ids=["today", "april"])
def kind(request: pytest.FixtureRequest) -> Kind:
    """Return each kind of server in turn."""
    found: Kind = request.param
    return found


@pytest.fixture
def api(project: Project, kind: Kind) -> FakeStackApi:
    return FakeStackApi(project, kind)


@pytest.fixture
def client(api: FakeStackApi) -> Iterator[httpx.Client]:
    with connect(api) as client:
        yield client


def listed(client: httpx.Client, **query: Any) -> list[str]:
    return [user["id"] for user in client.get("/users", params=query).json()["items"]]


def next_cursor(client: httpx.Client, **query: Any) -> str | None:
    answer: str | None = client.get("/users", params=query).json()["pagination"]["next_cursor"]
    return answer


def known_error(answer: httpx.Response) -> tuple[int, str]:
    assert answer.headers["x-stack-known-error"] == answer.json()["code"]
    return answer.status_code, answer.json()["code"]


# The samples, answered by a project that holds the same users.


@dataclass(frozen=True)
class Replay:
    """The request that a sample answers."""

    path: str
    query: dict[str, str] = field(default_factory=dict)
    method: str = "GET"
    body: dict[str, Any] | None = None
    headers: dict[str, str | None] = field(default_factory=dict)


REPLAYS = {
    "create-user": Replay(
        "/users",
        method="POST",
        body={"display_name": "New", "primary_email": "New-B92478@Example.com"},
    ),
    "delete-user": Replay(f"/users/{SAMPLE_USER}", method="DELETE"),
    "error-client-access": Replay("/users", headers={"x-stack-access-type": "client"}),
    "error-no-headers": Replay(
        "/users",
        headers={
            "x-stack-access-type": None,
            "x-stack-project-id": None,
            "x-stack-secret-server-key": None,
        },
    ),
    "error-no-key": Replay("/users", headers={"x-stack-secret-server-key": None}),
    "error-unknown-path": Replay("/nothing-here"),
    "error-unknown-project": Replay(
        "/users", headers={"x-stack-project-id": "99999999-9999-4999-8999-999999999999"}
    ),
    "error-wrong-key": Replay("/users", headers={"x-stack-secret-server-key": "wrong"}),
    "get-deleted-user": Replay(f"/users/{uuid4()}"),
    "get-malformed-id": Replay("/users/demo-admin-456"),
    "list-cursor-of-deleted-user": Replay("/users", {"cursor": str(uuid4())}),
    "list-everything": Replay("/users", EVERYBODY),
    "list-first-page-limit-3": Replay("/users", BY_SIGN_UP | {"limit": "3"}),
    "list-limit-0": Replay("/users", {"limit": "0"}),
    "list-malformed-cursor": Replay("/users", {"cursor": "nobody"}),
    "list-newest-first-limit-2": Replay(
        "/users", BY_SIGN_UP | EVERYBODY | {"limit": "2", "desc": "true"}
    ),
    "list-second-page-by-last-user": Replay(
        "/users", BY_SIGN_UP | {"limit": "3", "cursor": SAMPLE_USER}
    ),
    "list-second-page-by-next-cursor": Replay(
        "/users", BY_SIGN_UP | {"limit": "3", "cursor": "b862a90a-bad7-4ba2-aecc-651d6cfe51ff"}
    ),
    "list-unknown-parameter": Replay("/users", {"frobnicate": "1"}),
    "today-list-cursor-of-unknown-user": Replay("/users", {"limit": "3", "cursor": str(uuid4())}),
    "today-list-first-page-limit-3": Replay("/users", BY_SIGN_UP | EVERYBODY | {"limit": "3"}),
    "today-list-limit-1001": Replay("/users", {"limit": "1001"}),
    "today-list-most-recently-active-limit-2": Replay(
        "/users", {"order_by": "last_active_at", "desc": "true", "limit": "2"}
    ),
    "today-list-second-page-by-last-user": Replay(
        "/users",
        BY_SIGN_UP | EVERYBODY | {"limit": "3", "cursor": "7f14e794-7fdc-4077-bdc7-88f50b4e6e45"},
    ),
    "today-list-second-page-by-second-last-user": Replay(
        "/users",
        BY_SIGN_UP | EVERYBODY | {"limit": "3", "cursor": "ae1d4793-65e3-494a-bd90-46d495a28883"},
    ),
    "user-rich": Replay("/users/daf71220-49a5-4505-81c9-a6f373e2ef55"),
}


def sample(name: str) -> tuple[int, dict[str, str], str]:
    text = (SAMPLES / f"{name}.http").read_bytes().decode().replace("\r\n", "\n")
    head, body = text.split("\n\n", 1)
    status, *headers = head.split("\n")
    return int(status.split()[1]), dict(line.split(": ", 1) for line in headers), body


def replay(client: httpx.Client, asked: Replay) -> httpx.Response:
    request = client.build_request(asked.method, asked.path, params=asked.query, json=asked.body)
    for name, value in asked.headers.items():
        if value is None:
            del request.headers[name]
        else:
            request.headers[name] = value
    return client.send(request)


def form(name: str, body: str) -> object:
    """Leave out what cannot be the same twice: the id and the moment of somebody new."""
    if not body.startswith("{"):
        return re.sub(r"Request ID: \w{16}", "Request ID", body)
    answer = json.loads(body)
    if name == "create-user":
        answer |= {"id": "new", "signed_up_at_millis": 0, "last_active_at_millis": 0}
    return body if "error" in answer else answer


def recorded(kind: Kind) -> dict[str, dict[str, Any]]:
    """Collect the users of one server's samples, each as the first in the alphabet has it."""
    users: dict[str, dict[str, Any]] = {}
    for name in [each for each in REPLAYS if kind_of(each) == kind]:
        body = sample(name)[2]
        for user in json.loads(body).get("items", []) if body.startswith("{") else []:
            users.setdefault(user["id"], user)
    return users


def test_every_sample_is_replayed() -> None:
    names = {path.stem for path in SAMPLES.glob("*.http")}
    assert names == REPLAYS.keys() | {"error-source-database-down"}


def kind_of(sample: str) -> Kind:
    """Say what kind of server a sample is of."""
    return TODAY if sample.startswith("today-") else APRIL


@pytest.mark.parametrize("name", REPLAYS)
def test_answers_like_the_sample(name: str, project: Project) -> None:
    for user in recorded(kind_of(name)).values():
        project.create(**user)
    status, headers, body = sample(name)

    with connect(FakeStackApi(project, kind_of(name))) as client:
        answer = replay(client, REPLAYS[name])

    assert answer.status_code == status
    assert form(name, answer.text) == form(name, body)
    for header in ("cache-control", "content-type", "x-stack-known-error"):
        assert answer.headers.get(header) == headers.get(header)
    assert re.fullmatch("[0-9a-z]{16}", answer.headers["x-stack-request-id"])


def test_fault_is_like_the_sample_of_a_server_whose_database_is_down(
    api: FakeStackApi, client: httpx.Client
) -> None:
    status, headers, body = sample("error-source-database-down")
    api.fail_next(server_error())

    answer = client.get("/users")

    assert (answer.status_code, answer.headers["content-type"]) == (status, headers["content-type"])
    assert form("", answer.text) == form("", body)
    assert answer.headers["x-stack-request-id"] in answer.text


# The list


def test_empty_project_answers_a_clean_end(client: httpx.Client) -> None:
    assert client.get("/users", params={"limit": 10}).content == CLEAN_END


def test_order_is_sign_up_then_id(project: Project, client: httpx.Client) -> None:
    low, high = sorted(str(uuid4()) for _ in range(2))
    late = project.create(signed_up_at_millis=2000)
    project.create(id=high, signed_up_at_millis=1000)
    project.create(id=low, signed_up_at_millis=1000)
    assert listed(client) == [low, high, late]
    assert project.ids() == [low, high, late]


def test_desc_reverses_sign_up_and_id(project: Project, client: httpx.Client) -> None:
    for _ in range(4):
        project.create(signed_up_at_millis=1000)
    assert listed(client, desc="true") == project.ids()[::-1]
    assert listed(client, desc="false") == project.ids()


def test_in_april_a_page_begins_with_the_cursor_and_names_the_first_of_the_next_page(
    project: Project,
) -> None:
    first, second, third, _ = ids = sorted(project.create(signed_up_at_millis=7) for _ in range(4))
    with connect(FakeStackApi(project, APRIL)) as client:
        assert next_cursor(client, limit=2) == third
        assert listed(client, limit=2, cursor=third) == ids[2:]
        assert listed(client, limit=2, cursor=second) == [second, third]
        assert listed(client, limit=9, cursor=second, desc="true") == [second, first]
        assert next_cursor(client, limit=1, cursor=second, desc="true") == first


def test_today_a_page_begins_behind_the_cursor_and_names_its_own_last_user(
    project: Project,
) -> None:
    first, second, third, last = sorted(project.create(signed_up_at_millis=7) for _ in range(4))
    with connect(FakeStackApi(project, TODAY)) as client:
        assert next_cursor(client, limit=2) == second
        assert listed(client, limit=2, cursor=second) == [third, last]
        assert next_cursor(client, limit=2, cursor=second) is None
        assert listed(client, limit=9, cursor=third, desc="true") == [second, first]
        assert next_cursor(client, limit=1, cursor=third, desc="true") == second
        assert client.get("/users", params={"cursor": last}).content == CLEAN_END


def test_server_may_change_its_kind_between_two_pages(project: Project) -> None:
    ids = [project.create(signed_up_at_millis=moment) for moment in range(4)]
    api = FakeStackApi(project, APRIL)
    with connect(api) as client:
        assert listed(client, limit=2, cursor=ids[1]) == ids[1:3]
        api.kind = TODAY
        assert listed(client, limit=2, cursor=ids[1]) == ids[2:4]


def test_limit_over_the_cap_is_refused_and_names_it(project: Project) -> None:
    with connect(FakeStackApi(project, replace(TODAY, cap=500))) as client:
        answer = client.get("/users", params={"limit": 501})
        assert known_error(answer) == (400, "SCHEMA_ERROR")
        message = answer.json()["details"]["message"]
        assert "query.limit must be less than or equal to 500" in message
        assert client.get("/users", params={"limit": 500}).status_code == 200


def test_today_more_than_a_thousand_users_need_a_limit(project: Project) -> None:
    project.populate(1_000)
    with connect(FakeStackApi(project)) as client:
        assert listed(client, **EVERYBODY) == project.ids()
        project.create()
        answer = client.get("/users", params=EVERYBODY)
        assert answer.status_code == 400
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        assert "x-stack-known-error" not in answer.headers


def test_today_the_list_can_be_ordered_by_last_activity(project: Project) -> None:
    first, second, third = [project.create(signed_up_at_millis=moment) for moment in (1, 2, 3)]
    project.touch(second)
    project.touch(first)
    by_activity = {"order_by": "last_active_at", "desc": "true"}
    with connect(FakeStackApi(project)) as client:
        order = sorted(
            project.users().values(), key=lambda u: (u["last_active_at_millis"], u["id"])
        )
        assert listed(client, **by_activity) == [user["id"] for user in reversed(order)]
        assert listed(client, **by_activity)[-1] == third
        assert next_cursor(client, limit=1, **by_activity) == order[-1]["id"]
        assert listed(client, cursor=order[-1]["id"], **by_activity) == [order[-2]["id"], third]
    with connect(FakeStackApi(project, APRIL)) as client:
        answer = client.get("/users", params=by_activity)
        assert known_error(answer) == (400, "SCHEMA_ERROR")


def test_today_a_trailing_or_double_slash_is_redirected(project: Project) -> None:
    with connect(FakeStackApi(project)) as client:
        for path in ("/users/", "//users"):
            answer = client.get(f"http://localhost:8102/api/v1{path}")
            assert (answer.status_code, answer.headers["location"]) == (308, "/api/v1/users")


def test_today_answers_are_packed_for_who_takes_it(project: Project) -> None:
    project.create()
    with connect(FakeStackApi(project)) as client:
        packed = client.get("/users", headers={"accept-encoding": "gzip"})
        plain = client.get("/users", headers={"accept-encoding": "identity"})
        assert packed.headers["content-encoding"] == "gzip"
        assert "content-encoding" not in plain.headers
        assert packed.json() == plain.json()


def test_today_known_errors_and_access_have_a_second_name(project: Project) -> None:
    with connect(FakeStackApi(project)) as client:
        answer = client.get(f"/users/{uuid4()}")
        assert answer.headers["x-hexclave-known-error"] == "USER_NOT_FOUND"
        assert known_error(answer) == (404, "USER_NOT_FOUND")
        wrong = client.get("/users", headers={"x-hexclave-secret-server-key": "wrong"})
        assert known_error(wrong) == (401, "INVALID_SECRET_SERVER_KEY")
        newer = {
            name.replace("stack", "hexclave"): value for name, value in access(project).items()
        }
        assert (
            httpx.Client(transport=httpx.WSGITransport(FakeStackApi(project)))
            .get("http://localhost/api/v1/users", headers=newer)
            .is_success
        )
    with connect(FakeStackApi(project, APRIL)) as client:
        assert "x-hexclave-known-error" not in client.get(f"/users/{uuid4()}").headers


def test_reads_may_lag_behind_what_was_written(project: Project) -> None:
    api = FakeStackApi(project)
    old = project.create(signed_up_at_millis=1)
    with connect(api) as client:
        api.lag()
        project.delete(old)
        new = client.post("/users", json={}).json()["id"]
        assert listed(client) == [old]
        assert [client.get(f"/users/{each}").status_code for each in (old, new)] == [200, 404]
        api.catch_up()
        assert listed(client) == [new]
        assert [client.get(f"/users/{each}").status_code for each in (old, new)] == [404, 200]


def test_full_last_page_has_no_next_cursor(project: Project, client: httpx.Client) -> None:
    project.create()
    project.create()
    assert next_cursor(client, limit=2) is None


@pytest.fixture(scope="module")
def crowd() -> Project:
    """More users than the real server can put into one page."""
    project = Project()
    project.populate(32_001)
    return project


def test_in_april_everybody_comes_in_one_answer_without_limit(crowd: Project) -> None:
    with connect(FakeStackApi(crowd, APRIL)) as client:
        assert listed(client, **EVERYBODY) == crowd.ids()


def test_in_april_a_limit_over_32000_users_is_a_server_error(crowd: Project) -> None:
    with connect(FakeStackApi(crowd, APRIL)) as client:
        answer = client.get("/users", params=EVERYBODY | {"limit": "32001"})
        assert answer.status_code == 500
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        assert len(listed(client, limit=32_000, **EVERYBODY)) == 32_000


def test_in_april_a_large_limit_is_no_trouble_for_few_users(project: Project) -> None:
    project.create()
    with connect(FakeStackApi(project, APRIL)) as client:
        assert len(listed(client, limit=100_000)) == 1


@pytest.mark.parametrize("limit", ["0", "-1", "1.5", "many", "", "inf"])
def test_limit_that_is_no_natural_number_is_refused(limit: str, client: httpx.Client) -> None:
    answer = client.get("/users", params={"limit": limit})
    assert known_error(answer) == (400, "SCHEMA_ERROR")
    assert "query.limit must be" in answer.json()["error"]


def test_who_is_in_which_list(project: Project, client: httpx.Client) -> None:
    plain = project.create(signed_up_at_millis=1)
    restricted = project.create(signed_up_at_millis=2, is_restricted=True)
    anonymous = project.create(signed_up_at_millis=3, is_anonymous=True)
    everybody = [plain, restricted, anonymous]
    assert listed(client) == [plain]
    assert listed(client, include_restricted="true") == [plain, restricted]
    assert listed(client, include_anonymous="true") == everybody
    assert listed(client, include_restricted="true", include_anonymous="true") == everybody
    assert listed(client, include_restricted="false", include_anonymous="false") == [plain]
    assert [client.get(f"/users/{user_id}").status_code for user_id in everybody] == [200] * 3


def test_hidden_users_do_not_shorten_a_page(project: Project, client: httpx.Client) -> None:
    shown = [project.create(signed_up_at_millis=moment) for moment in (1, 3, 5)]
    for moment in (2, 4):
        project.create(signed_up_at_millis=moment, is_anonymous=True)
    assert listed(client, limit=2) == shown[:2]
    assert next_cursor(client, limit=2) in shown[1:]


@pytest.mark.parametrize(
    "query", [{"order_by": "id"}, {"desc": "yes"}, {"include_restricted": "1"}, {"updated": "1"}]
)
def test_there_is_no_other_filter_or_order(query: dict[str, str], client: httpx.Client) -> None:
    assert known_error(client.get("/users", params=query)) == (400, "SCHEMA_ERROR")


def test_old_server_says_which_parameter_it_does_not_know(project: Project) -> None:
    with connect(FakeStackApi(project, replace(APRIL, knows_include_anonymous=False))) as client:
        answer = client.get("/users", params=EVERYBODY)
        assert known_error(answer) == (400, "SCHEMA_ERROR")
        assert "query contains unknown properties: include_anonymous" in answer.json()["error"]
        assert client.get("/users", params={"include_restricted": "true"}).status_code == 200


# The four ways a list lies


@pytest.fixture
def cursor(project: Project) -> str:
    """The second of three users: somebody is left after the cursor."""
    return [project.create(signed_up_at_millis=moment) for moment in (1, 2, 3)][1]


def test_cursor_of_a_deleted_user_looks_like_a_clean_end(
    cursor: str, project: Project, client: httpx.Client
) -> None:
    project.delete(cursor)
    assert client.get("/users", params={"cursor": cursor}).content == CLEAN_END


def test_cursor_of_a_hidden_user_looks_like_a_clean_end(
    cursor: str, project: Project, client: httpx.Client
) -> None:
    project.restrict(cursor)
    assert client.get("/users", params={"cursor": cursor}).content == CLEAN_END
    assert listed(client, cursor=cursor, include_restricted="true")
    project.unrestrict(cursor)
    assert listed(client, cursor=cursor)


@pytest.mark.parametrize("spelling", [str.upper, lambda _: str(uuid4())])
def test_unknown_or_upper_case_cursor_looks_like_a_clean_end(
    spelling: Callable[[str], str], cursor: str, client: httpx.Client
) -> None:
    assert client.get("/users", params={"cursor": spelling(cursor)}).content == CLEAN_END


def test_user_who_signs_up_properly_moves_to_the_end_and_takes_the_next_page_along(
    project: Project, client: httpx.Client, kind: Kind
) -> None:
    moved = project.create(is_anonymous=True, signed_up_at_millis=1)
    project.create(signed_up_at_millis=2)

    project.upgrade(moved)

    page = client.get("/users", params=EVERYBODY | {"limit": "1", "cursor": moved}).json()
    assert [user["id"] for user in page["items"]] == ([moved] if kind is APRIL else [])
    assert page["pagination"]["next_cursor"] is None
    assert project.ids()[-1] == moved
    record = project.users()[moved]
    assert (record["is_anonymous"], record["is_restricted"]) == (False, False)
    assert record["restricted_reason"] is None


def test_mischief_between_two_pages(
    cursor: str, project: Project, api: FakeStackApi, client: httpx.Client
) -> None:
    def delete(request: Request) -> Reply | None:
        if request.query.get("cursor") == cursor:
            project.delete(cursor)
        return None

    api.on_request(delete)
    assert next_cursor(client, limit=1) in project.ids()
    assert client.get("/users", params={"limit": 1, "cursor": cursor}).content == CLEAN_END
    api.on_request(None)
    assert len(listed(client)) == 2


# The user


def test_touch_changes_the_last_activity_alone(project: Project) -> None:
    user_id = project.create(display_name="Ada")
    before = project.users()[user_id]
    project.touch(user_id)
    after = project.users()[user_id]
    assert after.pop("last_active_at_millis") > before.pop("last_active_at_millis")
    assert after == before


def test_order_of_keys_differs_from_answer_to_answer(
    project: Project, client: httpx.Client
) -> None:
    path = f"/users/{project.create(client_metadata={'b': 1, 'a': [None]})}"
    one, other = client.get(path), client.get(path)
    assert one.json() == other.json()
    assert list(one.json()) != list(other.json())
    one, other = client.get("/users"), client.get("/users")
    assert one.json() == other.json()
    assert list(one.json()) != list(other.json())


def test_metadata_is_replaced_whole(project: Project) -> None:
    user_id = project.create(client_metadata={"a": 1, "b": 2})
    project.edit(user_id, client_metadata={"c": 3})
    assert project.users()[user_id]["client_metadata"] == {"c": 3}


def test_email_is_lower_cased_and_an_empty_name_is_null(project: Project) -> None:
    user_id = project.create(primary_email="Ada@Example.COM", display_name="")
    record = project.users()[user_id]
    assert (record["primary_email"], record["display_name"]) == ("ada@example.com", None)


def test_nul_is_refused_over_http(project: Project, client: httpx.Client) -> None:
    user_id = project.create()
    for asked in ({"display_name": "a\0b"}, {"client_metadata": [{"\0": 1}]}):
        assert client.post("/users", json=asked).status_code == 500
        assert client.patch(f"/users/{user_id}", json=asked).status_code == 500


def test_nul_and_lone_surrogates_from_elsewhere_arrive_as_escapes(
    project: Project, client: httpx.Client
) -> None:
    user_id = project.create(display_name="a\0b", client_metadata={"k\ud800": "é", "big": 10**30})
    answer = client.get(f"/users/{user_id}")
    assert rb"a\u0000b" in answer.content
    assert rb"k\ud800" in answer.content
    record = json.loads(answer.content)
    assert record["client_metadata"] == {"k\ud800": "é", "big": 10**30}
    assert project.users()[user_id] == record


# Errors


def test_key_of_another_project_is_refused(client: httpx.Client) -> None:
    other = Project(secret_server_key="ssk_of_another")
    answer = client.get("/users", headers={"x-stack-secret-server-key": other.secret_server_key})
    assert known_error(answer) == (401, "INVALID_SECRET_SERVER_KEY")


def test_access_is_checked_on_single_users_too(client: httpx.Client) -> None:
    answer = client.get(f"/users/{uuid4()}", headers={"x-stack-secret-server-key": "wrong"})
    assert known_error(answer) == (401, "INVALID_SECRET_SERVER_KEY")


def test_project_id_is_required(client: httpx.Client) -> None:
    answer = replay(client, Replay("/users", headers={"x-stack-project-id": None}))
    assert known_error(answer) == (400, "ACCESS_TYPE_WITHOUT_PROJECT_ID")


def test_unknown_parameter_of_a_single_user_is_refused(
    project: Project, client: httpx.Client
) -> None:
    answer = client.get(f"/users/{project.create()}", params={"limit": 1})
    assert known_error(answer) == (400, "SCHEMA_ERROR")


def test_deleted_user_is_not_found_by_any_method(project: Project, client: httpx.Client) -> None:
    path = f"/users/{project.create()}"
    assert client.delete(path).json() == {"success": True}
    for answer in (client.get(path), client.patch(path, json={}), client.delete(path)):
        assert known_error(answer) == (404, "USER_NOT_FOUND")


def test_upper_case_id_in_the_path_is_found(project: Project, client: httpx.Client) -> None:
    user_id = project.create()
    assert client.get(f"/users/{user_id.upper()}").json()["id"] == user_id


@pytest.mark.parametrize("path", ["/nothing", "/users/a/b"])
def test_unknown_path_is_plain_text(path: str, client: httpx.Client) -> None:
    answer = client.get(path)
    assert answer.status_code == 404
    assert "x-stack-known-error" not in answer.headers
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"


def test_other_methods_are_not_allowed(project: Project, client: httpx.Client) -> None:
    assert client.put("/users").status_code == 405
    assert client.post(f"/users/{project.create()}").status_code == 405


@pytest.mark.parametrize("retry_after", [None, 3, 0.5, "Sat, 21 Nov 2026 00:43:42 GMT"])
def test_retry_after_is_on_some_answers_only(
    retry_after: float | str | None, api: FakeStackApi, client: httpx.Client
) -> None:
    api.fail_next(too_many_requests(retry_after))
    answer = client.get("/users")
    assert (answer.status_code, list(answer.json())) == (429, ["message"])
    assert answer.headers.get("retry-after") == (retry_after and str(retry_after))


@pytest.mark.parametrize(
    ("fault", "status", "content_type"),
    [(bad_gateway_html(), 502, "text/html"), (html_ok(), 200, "text/html")],
)
def test_proxy_can_answer_in_html(
    fault: Reply, status: int, content_type: str, api: FakeStackApi, client: httpx.Client
) -> None:
    api.fail_next(fault)
    answer = client.get("/users")
    assert answer.status_code == status
    assert answer.headers["content-type"].startswith(content_type)


def test_body_can_be_cut_off(api: FakeStackApi, client: httpx.Client) -> None:
    api.fail_next(cut_off(), cut_off(b'{"id":"x"}'))
    for _ in range(2):
        answer = client.get("/users")
        assert answer.status_code == 200
        with pytest.raises(json.JSONDecodeError):
            answer.json()


# Users over HTTP


def test_edit_over_http(project: Project, client: httpx.Client) -> None:
    user_id = project.create(display_name="Ada")
    answer = client.patch(f"/users/{user_id}", json={"primary_email": "A@b.example"})
    assert answer.status_code == 200
    assert answer.json() == project.users()[user_id]
    assert (answer.json()["display_name"], answer.json()["primary_email"]) == ("Ada", "a@b.example")


def test_restrict_and_sign_up_properly_over_http(project: Project, client: httpx.Client) -> None:
    path = f"/users/{project.create(is_anonymous=True, signed_up_at_millis=5)}"
    assert client.patch(path, json={"is_anonymous": False}).json()["signed_up_at_millis"] > 5
    assert client.patch(path, json={"restricted_by_admin": True}).json()["is_restricted"]
    assert listed(client) == []
    assert not client.patch(path, json={"restricted_by_admin": False}).json()["is_restricted"]
    assert len(listed(client)) == 1


def test_sign_up_of_somebody_who_is_not_anonymous_changes_nothing(
    project: Project, client: httpx.Client
) -> None:
    user_id = project.create(signed_up_at_millis=5)
    client.patch(f"/users/{user_id}", json={"is_anonymous": False})
    assert project.users()[user_id]["signed_up_at_millis"] == 5


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "BODY_PARSING_ERROR"),
        (b"[]", "SCHEMA_ERROR"),
        (b'{"id":"x"}', "SCHEMA_ERROR"),
    ],
)
def test_malformed_body_is_refused(body: bytes, code: str, client: httpx.Client) -> None:
    assert known_error(client.post("/users", content=body)) == (400, code)


# The project


def test_populate_is_the_same_for_a_seed() -> None:
    one, other, different = Project(), Project(), Project()
    assert one.populate(200, seed=1) == other.populate(200, seed=1)
    different.populate(200, seed=2)
    assert one.users() == other.users()
    assert one.users().keys().isdisjoint(different.users())


def test_populate_shares_milliseconds_and_adds_to_who_is_there() -> None:
    project = Project()
    first, second = project.populate(300), project.populate(300)
    assert len(project) == len({*first, *second}) == 600
    keys = [(user["signed_up_at_millis"], user["id"]) for user in project.users().values()]
    assert keys == sorted(keys)
    assert len({millis for millis, _ in keys}) < 600
    assert {user["is_anonymous"] for user in project.users().values()} == {True, False}


def test_populate_with_nobody(project: Project) -> None:
    assert project.populate(0) == []


def test_odd_record_stands_in_its_place(project: Project, client: httpx.Client) -> None:
    first = project.create(signed_up_at_millis=1)
    last = project.create(signed_up_at_millis=3)
    odd = str(uuid4())
    project.put_raw(odd, 2, b'{"id":null,"n":1e400}')
    project.put_raw("label", 4, b'"no user at all"')
    assert project.ids() == [first, odd, last, "label"]
    assert list(project.users()) == [first, last]
    body = client.get("/users").content
    assert b',{"id":null,"n":1e400},{' in body
    assert b'},"no user at all"]' in body
    assert client.get(f"/users/{odd}").content == b'{"id":null,"n":1e400}'
    project.delete("label")
    assert len(project) == 3


def test_odd_record_takes_the_place_of_a_user(project: Project, client: httpx.Client) -> None:
    user_id = project.create(signed_up_at_millis=1)
    project.put_raw(user_id, 1, b"{}")
    assert client.get(f"/users/{user_id}").content == b"{}"
    project.create(id=user_id, display_name="healed")
    assert client.get(f"/users/{user_id}").json()["display_name"] == "healed"
    assert len(project) == 1


@pytest.mark.parametrize("act", [Project.delete, Project.touch, Project.restrict, Project.edit])
def test_who_is_not_there_cannot_be_changed(
    act: Callable[[Project, str], None], project: Project
) -> None:
    with pytest.raises(KeyError):
        act(project, str(uuid4()))


def test_clock_is_that_of_the_project() -> None:
    project = Project(now_millis=lambda: 1234)
    user_id = project.create()
    record = project.users()[user_id]
    assert (record["signed_up_at_millis"], record["last_active_at_millis"]) == (1234, 1234)


# What was asked for, and serving it


def test_requests_are_kept_and_a_hook_may_answer_them(
    api: FakeStackApi, client: httpx.Client
) -> None:
    api.fail_next(server_error())
    api.on_request(lambda request: html_ok() if "limit" in request.query else None)
    assert client.get("/users", params={"limit": 1}).text.startswith("<!doctype")
    assert client.get("/users").status_code == 500
    assert client.get("/users").content == CLEAN_END
    assert [(request.method, request.path) for request in api.requests] == [
        ("GET", "/api/v1/users")
    ] * 3
    assert api.requests[0].query == {"limit": "1"}
    assert api.requests[0].headers["x-stack-access-type"] == "server"


def test_served_over_a_socket(project: Project, api: FakeStackApi) -> None:
    ids = project.populate(900)
    with serve(api) as base_url, httpx.Client(headers=access(project)) as client:
        answer = client.get(f"{base_url}/api/v1/users", params=EVERYBODY)
        assert "content-length" in answer.headers
        assert [user["id"] for user in answer.json()["items"]] == ids
        new = client.post(f"{base_url}/api/v1/users", json={"display_name": "Zoë"})
        assert new.status_code == 201
        assert project.users()[new.json()["id"]]["display_name"] == "Zoë"
        assert client.get(f"{base_url}/nothing").status_code == 404


def test_taken_port_is_an_error(api: FakeStackApi) -> None:
    with serve(api) as base_url:
        taken = serve(api, port=httpx.URL(base_url).port or 0)
        with pytest.raises(OSError, match="in use"):
            taken.__enter__()
