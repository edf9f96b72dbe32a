"""The least that anybody can do: read the pages and drop them, or copy ready-made rows."""

import time
from collections.abc import Iterator, Sequence

import httpx
import orjson
import psycopg

from tests.bench.api import RemoteApi

COPY = "copy neon_auth.users_sync (raw_json) from stdin"


def opened_client(api: RemoteApi) -> httpx.Client:
    headers = {
        "x-stack-access-type": "server",
        "x-stack-project-id": api.project_id,
        "x-stack-secret-server-key": api.secret_server_key,
    }
    return httpx.Client(headers=headers, timeout=60, trust_env=False)


def read_pages(api: RemoteApi, urls: Sequence[str]) -> float:
    """Read these pages one after another, as parsed and as soon forgotten; returns seconds."""
    began = time.perf_counter()
    with opened_client(api) as client:
        for url in urls:
            orjson.loads(client.get(url).content)
    return time.perf_counter() - began


def read_bodies(api: RemoteApi, urls: Sequence[str]) -> list[bytes]:
    """Read these pages and keep them as they came."""
    with opened_client(api) as client:
        return [client.get(url).content for url in urls]


def read_list(api: RemoteApi, limit: int) -> float:
    """Walk the list by `next_cursor`, and believe it; returns seconds."""
    began = time.perf_counter()
    for _ in pages(api, limit):
        pass
    return time.perf_counter() - began


def pages(api: RemoteApi, limit: int) -> Iterator[list[dict[str, object]]]:
    """Walk the list by `next_cursor`, and believe it."""
    query = f"{api.url}/api/v1/users?limit={limit}&order_by=signed_up_at&desc=false"
    query += "&include_anonymous=true"
    cursor = ""
    with opened_client(api) as client:
        while True:
            answer = orjson.loads(client.get(query + cursor).content)
            yield answer["items"]
            following = answer["pagination"]["next_cursor"]
            if following is None:
                return
            cursor = f"&cursor={following}"


def copy_rows(url: str, rows: Sequence[bytes]) -> float:
    """Copy rows, made ready before, into an empty table; returns seconds."""
    with psycopg.connect(url) as conn:
        began = time.perf_counter()
        with conn.cursor() as cursor, cursor.copy(COPY) as copy:
            for row in rows:
                copy.write(row)
        conn.commit()
        return time.perf_counter() - began


def ready_rows(bodies: Sequence[bytes]) -> list[bytes]:
    """Make of records what COPY takes, in pieces of some megabytes."""
    lines = [body.replace(b"\\", b"\\\\") + b"\n" for body in bodies]
    return [b"".join(lines[at : at + 10_000]) for at in range(0, len(lines), 10_000)]
