"""Measures how soon a change is a row that the worker is told of, by the table or by a webhook."""

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from random import Random
from statistics import median
from uuid import uuid4

import httpx
import psycopg
from standardwebhooks.webhooks import Webhook

from tests.bench.api import FREE, REAL_SERVER, RemoteApi, started_api
from tests.bench.figures import Conditions, Figure
from tests.bench.postgres import Databases
from tests.bench.workers import EAGER, running
from tests.support.ports import free_port
from tests.support.waiting import PATIENCE_SECONDS

SECRET = "whsec_" + "YmVuY2htYXJr" * 2
NAME = "select name from neon_auth.users_sync where id = %s"
PAUSE_SECONDS = (0.05, 0.6)
LOOK_SECONDS = 0.004

Tell = Callable[[str], None]


def run(conditions: Conditions, databases: Databases) -> list[Figure]:
    users, changes = conditions.choose(20_000, 1_000_000), conditions.choose(20, 100)
    figures = []
    with started_api(users, FREE) as api, databases.fresh() as url:
        port = free_port()
        variables = {
            "USERS_SYNC_WEBHOOK__SECRETS": SECRET,
            "USERS_SYNC_WEBHOOK__PORT": str(port),
            "USERS_SYNC_SCHEDULE__SWEEP_SECONDS": "86400",
        }
        for name, more in (("between sweeps", {}), ("during a sweep", EAGER)):
            with running(api, url, {**variables, **more}) as worker:
                api.call("spend", FREE)
                worker.wait_for_sweeps(1)
                api.call("spend", REAL_SERVER)
                with psycopg.connect(url, autocommit=True) as conn:
                    ways: dict[str, Tell | None] = {
                        "activity": None,
                        "table": _by_table(conn),
                        "webhook": _by_webhook(f"http://127.0.0.1:{port}/webhooks/stack-auth"),
                    }
                    for way, tell in ways.items():
                        count = changes if tell else changes // 4
                        delays = sorted(_delays(api, conn, tell, count))
                        figures += _figures(f"{name}, {way}", delays, told=tell is not None)
    return figures


def _figures(name: str, delays: list[float], *, told: bool) -> list[Figure]:
    if not told:
        return [Figure(f"{name}: longest", delays[-1], "s", at_most=6)]
    within = delays[max(0, round(len(delays) * 0.96) - 1)]
    return [
        Figure(f"{name}: median", median(delays), "s", at_most=0.5),
        Figure(f"{name}: 96 of 100", within, "s", at_most=1.2),
    ]


def _by_table(conn: psycopg.Connection) -> Tell:
    def tell(user_id: str) -> None:
        conn.execute("select users_sync_worker.refresh(%s)", (user_id,))

    return tell


def _by_webhook(url: str) -> Tell:
    client, webhook = httpx.Client(), Webhook(SECRET)

    def tell(user_id: str) -> None:
        body = json.dumps({"type": "user.updated", "data": {"id": user_id}})
        message, now = f"msg_{uuid4().hex}", datetime.now(UTC)
        headers = {
            "svix-id": message,
            "svix-timestamp": str(int(now.timestamp())),
            "svix-signature": webhook.sign(message, now, body),
        }
        client.post(url, content=body, headers=headers).raise_for_status()

    return tell


def _delays(api: RemoteApi, conn: psycopg.Connection, tell: Tell | None, count: int) -> list[float]:
    """Change users of any age, one after the other, and see when each is a row.

    Without `tell` they have open sessions, and the worker finds them among the users active last.
    """
    chance, delays = Random(3), list[float]()
    for number in range(count):
        edit = "edit_one" if tell else "edit_active"
        user_id, name = api.call(edit, f"Changed {number} {chance.random()}")
        began = time.perf_counter()
        if tell is not None:
            tell(user_id)
        while conn.execute(NAME, (user_id,)).fetchall() != [(name,)]:
            if time.perf_counter() - began > PATIENCE_SECONDS:
                raise TimeoutError("a hinted change is no row")
            time.sleep(LOOK_SECONDS)
        delays.append(time.perf_counter() - began)
        time.sleep(chance.uniform(*PAUSE_SECONDS))
    return delays
