"""The command `init`: create the schema and the tables, or print the SQL for that."""

import sys
from functools import partial
from typing import Annotated

import typer

from worker.cli.context import opened, read_settings
from worker.cli.options import DONE, Config, LogFormat, LogLevel
from worker.errors import Misconfigured
from worker.store.migrate import (
    creation_sql,
    missing_migrations,
    prepare,
    schema_exists,
    shared_name,
)
from worker.store.row_security import row_security_sql


def init(
    *,
    print_sql: Annotated[
        bool, typer.Option("--print-sql", help="Print the SQL instead of running it.")
    ] = False,
    rls: Annotated[
        bool,
        typer.Option("--rls", help="With --print-sql: print row-level security, too."),
    ] = False,
    config: Config = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> int:
    """Create the schema, the tables and the index; keep existing ones."""
    settings = read_settings(config, log_format, log_level)
    target = settings.database.schema_name
    if print_sql:
        print(creation_sql(target), end="")
        if rls:
            print(f"\n{row_security_sql(target)}", end="")
        return DONE
    if rls:
        raise Misconfigured("--rls goes with --print-sql: the table's owner has to read and run it")
    with opened(settings) as database:
        missing = len(database.call(missing_migrations))
        created = not database.call(partial(schema_exists, schema=target))
        shape = prepare(database, target)
    print(f"{target}.users_sync: ready ({shape.value})")
    print(f"users_sync_worker: {f'{missing} SQL files applied' if missing else 'up to date'}")
    if created and (warning := shared_name(target)):
        print(f"users-sync: {warning}", file=sys.stderr)
    return DONE
