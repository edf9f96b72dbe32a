"""The recipes for backends do what they say: Python blocks are run, TypeScript blocks read."""

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import jwt
import psycopg
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.support.places import ROOT
from tests.support.service_world import ServiceWorld, opened_service_world
from tests.support.token_api import TokenApi
from worker.sandbox.api import FakeStackApi, Project, serve
from worker.store.row_security import row_security_sql

PAGE = (ROOT / "docs" / "backend-auth.md").read_text("utf-8")
NODE = shutil.which("node")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def api() -> Iterator[TokenApi]:
    project = Project()
    project.populate(3)
    tokens = TokenApi(FakeStackApi(project))
    with serve(tokens) as url:
        tokens.base_url = url
        yield tokens


@pytest.fixture
def recipes(api: TokenApi, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Run all Python blocks, one after the other, as one program."""
    monkeypatch.setenv("STACK_PROJECT_ID", api.project.project_id)
    monkeypatch.setenv("STACK_API_URL", api.base_url)
    monkeypatch.setenv("STACK_SECRET_SERVER_KEY", api.project.secret_server_key)
    names: dict[str, Any] = {}
    for block in blocks("python"):
        exec(compile(block, "backend-auth.md", "exec"), names)  # noqa: S102  it is our own page
    return SimpleNamespace(**names)


def proper(api: TokenApi) -> str:
    return next(i for i, user in api.project.users().items() if not user["is_restricted"])


def test_token_of_a_signed_in_user_is_verified(api: TokenApi, recipes: SimpleNamespace) -> None:
    user_id = proper(api)
    api.passwords["ada@example.org"] = ("correct horse", user_id)
    answer = httpx.post(
        f"{api.base_url}/api/v1/auth/password/sign-in",
        json={"email": "ada@example.org", "password": "correct horse"},
    ).json()
    assert recipes.verified(answer["access_token"])["sub"] == answer["user_id"] == user_id


@pytest.mark.parametrize("host", ["https://api.stack-auth.com", "https://api.hexclave.com"])
def test_both_names_of_the_service_may_issue(
    api: TokenApi, recipes: SimpleNamespace, host: str
) -> None:
    issuer = f"{host}/api/v1/projects/{api.project.project_id}"
    token = api.token(proper(api), iss=issuer)
    assert recipes.verified(token)["iss"] == issuer


@pytest.mark.parametrize(
    "claims",
    [
        {"exp": 1},
        {"aud": "11111111-1111-4111-8111-111111111112"},
        {"aud": "x:anon"},
        {"iss": "https://evil.example/api/v1/projects/x"},
        {"sub": None},
    ],
    ids=str,
)
def test_token_that_is_not_for_us_is_refused(
    api: TokenApi, recipes: SimpleNamespace, claims: dict[str, Any]
) -> None:
    with pytest.raises((jwt.PyJWTError, TypeError)):
        recipes.verified(api.token(proper(api), **claims))


def test_tampered_and_foreign_tokens_are_refused(api: TokenApi, recipes: SimpleNamespace) -> None:
    token = api.token(proper(api))
    head, body, signature = token.split(".")
    foreign = api.token(proper(api), key=ec.generate_private_key(ec.SECP256R1()))
    unsigned = jwt.encode({"sub": "x"}, "", "none")
    for bad in (f"{head}.{body[:-2]}AA.{signature}", foreign, unsigned, "rubbish", ""):
        with pytest.raises(jwt.PyJWTError):
            recipes.verified(bad)
        assert recipes.user_of(bad) is None


def test_anonymous_and_restricted_users_are_refused(
    api: TokenApi, recipes: SimpleNamespace
) -> None:
    anonymous, restricted = api.project.create(is_anonymous=True), api.project.create()
    api.project.restrict(restricted)
    for user_id in (anonymous, restricted):
        with pytest.raises(jwt.PyJWTError):
            recipes.verified(api.token(user_id))


def test_api_tells_whose_token_it_is(api: TokenApi, recipes: SimpleNamespace) -> None:
    user_id = proper(api)
    assert recipes.user_of(api.token(user_id))["id"] == user_id
    assert recipes.user_of(api.token(user_id, exp=int(time.time()) - 1)) is None


@pytest.fixture
def world(database_url: str, connection: psycopg.Connection) -> Iterator[ServiceWorld]:
    with opened_service_world(database_url, connection) as world:
        world.project.populate(10)
        world.at_work(sweep_seconds=3600, poll_seconds=3600)
        yield world


def test_row_of_a_new_user_is_awaited(world: ServiceWorld, recipes: SimpleNamespace) -> None:
    created = world.project.create(display_name="Just signed up")
    with psycopg.connect(world.url) as conn:
        assert recipes.row_of(conn, {"sub": created}) is None
        conn.rollback()
        assert recipes.awaited_row(conn, {"sub": created})[:2] == (created, "Just signed up")
        conn.execute(
            "create table posts (author_id text references neon_auth.users_sync (id) not null)"
        )
        conn.execute("insert into posts values (%s)", (created,))


def test_signed_in_user_sees_the_own_row_alone(
    world: ServiceWorld, recipes: SimpleNamespace
) -> None:
    world.query(row_security_sql("neon_auth"))
    user_id = world.project.ids()[3]
    with (
        psycopg.connect(world.url) as conn,
        recipes.signed_in(conn, {"sub": user_id}) as signed_in,
    ):
        rows = signed_in.execute("select id::text from neon_auth.users_sync").fetchall()
    assert rows == [(user_id,)]


@pytest.mark.skipif(NODE is None, reason="Node is not installed")
@pytest.mark.parametrize("block", blocks("typescript"), ids=lambda block: block.split("\n")[0][:40])
def test_typescript_is_well_formed(block: str, tmp_path: Path) -> None:
    script = tmp_path / "block.mjs"
    script.write_text(block, "utf-8")
    ended = subprocess.run(
        [str(NODE), "--check", script], check=False, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.skipif(NODE is None, reason="Node is not installed")
def test_typescript_asks_the_api_as_python_does(api: TokenApi, tmp_path: Path) -> None:
    [block] = [block for block in blocks("typescript") if "userOf" in block]
    user_id = proper(api)
    script = tmp_path / "ask.mjs"
    script.write_text(
        block + "for (const token of process.argv.slice(2))"
        " console.log((await userOf(token))?.id ?? null);\n"
    )
    ended = subprocess.run(
        [str(NODE), script, api.token(user_id), "rubbish"],
        check=False,
        capture_output=True,
        text=True,
        env={
            "STACK_API_URL": api.base_url,
            "STACK_PROJECT_ID": api.project.project_id,
            "STACK_SECRET_SERVER_KEY": api.project.secret_server_key,
        },
        timeout=60,
    )
    assert (ended.stdout.split(), ended.stderr) == ([user_id, "null"], "")
