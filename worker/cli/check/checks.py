"""Checks everything a sweep needs: a line for each check, with a fix for each failure."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from threading import Event

from worker.cli.check.other_writers import find_stale_rows
from worker.cli.check.refused_users import find_refusable, find_refused
from worker.cli.check.result import Finding
from worker.cli.check.rights import require_creation, require_own_rights, status_grant
from worker.cli.check.table import look_at_table
from worker.clock import Clock
from worker.errors import (
    DatabaseUnavailable,
    Misconfigured,
    SourceUnavailable,
    Stopped,
    UsersSyncError,
)
from worker.model import Page, User
from worker.net import is_loopback
from worker.retry import Retry
from worker.settings.names import Names
from worker.settings.settings import Settings
from worker.stack_auth.client import StackApi
from worker.store.connection import Connection
from worker.store.database import Database, see_check
from worker.store.migrate import OWN_SCHEMA, missing_migrations
from worker.sync.chain import Chain
from worker.sync.fetcher import Fetcher, NoLease
from worker.sync.page_size import PageSize
from worker.wiring import access

OLDEST_SERVER = 140000

_SERVER = """
select current_setting('server_version_num')::int, current_setting('server_version'),
       pg_is_in_recovery(), current_setting('default_transaction_read_only')::boolean
"""

_LEASE = """
select lower(project), holder, expires_at > clock_timestamp() from users_sync_worker.lease
where target = %s
"""


def check(settings: Settings, url: str, stop: Event) -> Iterator[Finding]:
    """Give the findings as they are made. Nothing is written anywhere. Raises Stopped."""
    yield Finding("ok", "configuration", "read, and complete")
    webhook = settings.webhook
    if webhook.secrets:
        where = f"POST /webhooks/stack-auth on {webhook.host}:{webhook.port}"
        yield Finding("ok", "webhook", f"the worker receives {where}")
    users: list[User] = []
    source = partial(_check_source, settings, users, stop)
    yield from _guarded("stack auth", source, settings.names)
    clock = Clock()
    retry = Retry("the database", 0, stop, DatabaseUnavailable)
    database = Database(url, clock, retry, names=settings.names)
    try:
        yield from _check_database(database, settings, users)
    finally:
        database.close()


def _check_database(
    database: Database, settings: Settings, users: Sequence[User]
) -> Iterator[Finding]:
    names, schema = settings.names, settings.database.schema_name

    def guarded(subject: str, look: Callable[[Connection], list[Finding]]) -> list[Finding]:
        return _guarded(subject, lambda: database.call(look), names)

    server = guarded("database", lambda conn: _check_server(conn, names))
    yield from server
    if any(finding.exit_code for finding in server):
        return  # the others could only say the same again
    yield from guarded("table", lambda conn: look_at_table(conn, schema, names.schema))
    yield from guarded("table", partial(find_refusable, schema=schema, users=users))
    yield from guarded("worker", lambda conn: _check_own(conn, settings))


def _guarded(subject: str, look: Callable[[], list[Finding]], names: Names) -> list[Finding]:
    try:
        return look()
    except Stopped:
        raise
    except (SourceUnavailable, DatabaseUnavailable) as error:
        code = 3 if isinstance(error, SourceUnavailable) else 4
        # Of its cause: it was asked once only, so for how long is of no interest.
        return [Finding("FAIL", subject, str(error.__cause__ or error), code)]
    except UsersSyncError as error:
        return [Finding("FAIL", subject, str(error).removesuffix(see_check(names)), 2)]


def _check_source(settings: Settings, users: list[User], stop: Event) -> list[Finding]:
    """Ask for pages as a sweep does, and see that the second one continues the first.

    The users on them are added to `users`.
    """
    retry = Retry("Stack Auth", 0, stop, SourceUnavailable)
    page_size, chain = PageSize(settings.stack.page_size), Chain()
    with StackApi(access(settings), clock=Clock(), stop=stop) as api:
        fetcher = Fetcher(api, retry, page_size=page_size, lease=NoLease())
        try:
            pages = [_ask_page(fetcher, chain, users)]
            proven = chain.take(pages[0]) is not None
            if proven and not chain.ended:
                pages.append(_ask_page(fetcher, chain, users))
                proven = chain.take(pages[1]) is not None
        finally:
            fetcher.close()
    has = "has users" if len(pages[0].places) or pages[0].next_cursor else "has no users yet"
    text = f"{settings.stack.api_url} answers; the project {has}; limit up to {page_size.limit:,}"
    found = [Finding("ok", "stack auth", text)]
    if not proven:
        text = (
            f"page {len(pages)} of the users list does not prove that no user was skipped: one"
            " may have left just now; if it stays so, this is no users API that can be synced"
        )
        found.append(Finding("warn", "stack auth", text))
    return found


def _ask_page(fetcher: Fetcher, chain: Chain, users: list[User]) -> Page:
    """Ask for the next page, and add the users to `users` that were not on the one before."""
    page = fetcher.await_answer(fetcher.submit_page(chain.request))
    known = {user.id for user in users}
    users += [user for user in page.users if user.id not in known]
    return page


def _check_server(conn: Connection, names: Names) -> list[Finding]:
    row = conn.execute(_SERVER).fetchone()
    if row is None:
        raise Misconfigured("the server does not describe itself")
    number, version, standby, read_only = row
    if number < OLDEST_SERVER:
        raise Misconfigured(f"PostgreSQL {version} is too old: 14 is the oldest that will do")
    if standby or read_only:
        raise Misconfigured(
            f"{names.database} takes no writes: set {names.database_url} to the primary"
        )
    finding = Finding("ok", "database", f"PostgreSQL {version}, takes writes")
    info, tls = conn.info, conn.pgconn.ssl_in_use
    return [finding, *judge_way(info.host, info.hostaddr, tls=tls, url=names.database_url)]


def judge_way(host: str, address: str, *, tls: bool, url: str) -> list[Finding]:
    """Warn of a way that others can listen on; a Unix socket has no address.

    `url` is what to call the setting of the database's URL.
    """
    if tls or not address or is_loopback(address):
        return []
    fix = f"add sslmode=require to {url}, better sslmode=verify-full"
    return [Finding("warn", "database", f"no TLS on the way to {host}: {fix}")]


def _check_own(conn: Connection, settings: Settings) -> list[Finding]:
    schema = settings.database.schema_name
    may_create = require_own_rights(conn)
    if missing := missing_migrations(conn):
        require_creation(conn, OWN_SCHEMA, may_create=may_create)
        text = f"{len(missing)} of the worker's SQL files to apply; `users-sync init` does it"
        return [Finding("ok", "worker", text)]
    row = conn.execute(_LEASE, (schema,)).fetchone()
    project, holder, live = row or (None, None, False)
    stack = settings.require_stack()
    if project not in {None, stack.project_id}:
        raise Misconfigured(
            f"the table belongs to Stack Auth project {project}: set {stack.names.project_id}"
            f" to it, or {stack.names.schema} to another schema"
        )
    text = f"at work: {holder}" if live else "ready; no worker is running"
    found = [
        Finding("ok", "worker", text),
        *find_stale_rows(conn, schema),
        *find_refused(conn, schema),
    ]
    if grant := status_grant(conn):
        text = f"the worker's role may not use `users-sync status`: let its owner run `{grant}`"
        found.append(Finding("warn", "worker", text))
    return found
