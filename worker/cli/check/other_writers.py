"""Who else seems to write users_sync: applications, triggers, subscriptions."""

import re

from worker.cli.check.result import MOST_ALIKE, Finding, alike
from worker.store.connection import Connection

_STALE = """
select coalesce(sum(stale), 0)::bigint from users_sync_worker.sweep
where target = %(schema)s and coalesce(finished, started) > clock_timestamp() - interval '1 day'
"""

# A pooler may give all sessions one name, which is then ours, too: better to say nothing. What a
# session does is shown to its own role, and to roles with the rights of pg_read_all_stats. A
# statement may leave out the schema: that can only be ours where no other one has such a table.
_SESSIONS = """
select pid from pg_stat_activity
where datname = current_database()
  and application_name not in ('users-sync', current_setting('application_name'))
  and query_start > clock_timestamp() - interval '1 day'
  and (query ~* %(qualified)s or query ~* %(unqualified)s and not exists (
      select from pg_class
      where relname = 'users_sync' and relkind in ('r', 'p', 'v', 'f')
        and oid <> format('%%I.users_sync', %(schema)s::text)::regclass))
order by pid
"""

_SUBSCRIPTIONS = """
select quote_ident(s.subname) from pg_subscription_rel r join pg_subscription s on s.oid = r.srsubid
where r.srrelid = format('%%I.users_sync', %(schema)s::text)::regclass and s.subenabled
order by 1
"""

_TRIGGERS = """
select quote_ident(tgname) from pg_trigger
where tgrelid = format('%%I.users_sync', %(schema)s::text)::regclass
  and not tgisinternal and tgenabled in ('O', 'A')
order by 1
"""

_WRITES = r"\m(insert\s+into|merge\s+into|delete\s+from|update)(\s+only)?\s+"
_TABLE = r'"?users_sync\M'


def find_writers(conn: Connection, schema: str) -> list[Finding]:
    """Say who writes or may change what the worker writes; never what it is that they write."""
    ours = {"schema": schema}
    subscriptions = [
        f"the subscription {name} writes the table, too: leave it out of the publication"
        for (name,) in conn.execute(_SUBSCRIPTIONS, ours)
    ]
    triggers = [
        f"the trigger {name} may refuse or change what the worker writes"
        for (name,) in conn.execute(_TRIGGERS, ours)
    ]
    return [
        *find_sessions(conn, schema),
        *alike("warn", "other writers", subscriptions),
        *alike("note", "other writers", triggers),
    ]


def find_sessions(conn: Connection, schema: str) -> list[Finding]:
    """Say which sessions wrote the table with the last statement that we are shown of them."""
    quoted = schema.replace('"', '""')
    names = f'({re.escape(schema)}|"{re.escape(quoted)}")'
    patterns = {
        "qualified": rf"{_WRITES}{names}\s*\.\s*{_TABLE}",
        "unqualified": f"{_WRITES}{_TABLE}",
    }
    pids = [str(pid) for (pid,) in conn.execute(_SESSIONS, {"schema": schema, **patterns})]
    if not pids:
        return []
    shown = ", ".join(pids[:MOST_ALIKE] + ["…"] * (len(pids) > MOST_ALIKE))
    text = f"sessions of others write the table, too (pg_stat_activity, pid {shown})"
    return [Finding("warn", "other writers", f"{text}: let only the worker write it")]


def find_stale_rows(conn: Connection, schema: str) -> list[Finding]:
    """Say how many rows the worker left alone within a day, because they were not as it knew."""
    [(stale,)] = conn.execute(_STALE, {"schema": schema})
    if not stale:
        return []
    text = f"in a day {stale} rows were newer than Stack Auth's answer, or locked"
    return [Finding("warn", "other writers", f"{text}: let only the worker write the table")]
