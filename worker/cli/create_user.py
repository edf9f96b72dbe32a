"""The command `create-user`: create a user in the project, and return when the row is there."""

import json
import sys
from typing import Annotated, Any

import typer

from worker.cli.context import read_settings
from worker.cli.options import DONE, AsJson, Config, LogFormat, LogLevel
from worker.cli.session import command_session
from worker.errors import Misconfigured, UsersSyncError

# An answer may come from a replica that does not know the new user yet.
AWAITED_SECONDS = 10.0

WITHOUT_ROW = 4

# A password that is longer than this is a mistake, such as a file in its place.
MOST_PASSWORD_CHARACTERS = 1024


def create_user(
    *,
    email: Annotated[str, typer.Option("--email", help="Primary email address.")],
    name: Annotated[str | None, typer.Option("--name", help="Display name.")] = None,
    password_stdin: Annotated[
        bool, typer.Option("--password-stdin", help="Read a password from standard input.")
    ] = False,
    verified: Annotated[
        bool, typer.Option("--verified", help="Mark the email address as verified.")
    ] = False,
    metadata: Annotated[
        str | None,
        typer.Option("--metadata", metavar="JSON", help="Server metadata, as a JSON object."),
    ] = None,
    as_object: AsJson = False,
    config: Config = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> int:
    """Create a user in the project; return when the row is in the table."""
    settings = read_settings(config, log_format, log_level)
    fields: dict[str, Any] = {
        "primary_email": email.strip(),
        "primary_email_auth_enabled": True,
        "primary_email_verified": verified,
        "display_name": name,
        "server_metadata": _metadata(metadata),
    }
    if password_stdin:
        fields["password"] = _password()
    given = {field: value for field, value in fields.items() if value is not None}
    # The database first: if it cannot be used, no user is created.
    with command_session(settings) as session:
        user_id = session.fetcher.create_user(given)
        try:
            result = session.sync(user_id, session.await_user(user_id, AWAITED_SECONDS))
        except UsersSyncError as error:
            return _without_row(user_id, str(error), as_object=as_object)
    if result.became == "unknown":
        reason = "the API does not give the new user yet"
        return _without_row(user_id, reason, as_object=as_object)
    if result.exit_code != DONE:
        return _without_row(user_id, result.sentence(settings), as_object=as_object)
    print(json.dumps({"id": user_id, "in_table": True}) if as_object else user_id)
    return DONE


def _without_row(user_id: str, reason: str, *, as_object: bool) -> int:
    """Say that the user exists and the row does not: it is not to be created again."""
    if as_object:
        print(json.dumps({"id": user_id, "in_table": False, "error": reason}))
    print(
        f"users-sync: created {user_id}, which is not in the table yet: {' '.join(reason.split())};"
        f" the worker adds it, or `users-sync sync-user {user_id}`",
        file=sys.stderr,
    )
    return WITHOUT_ROW


def _metadata(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise Misconfigured('--metadata: should be a JSON object, such as \'{"plan": "free"}\'')
    return found


def _password() -> str:
    password = sys.stdin.readline(MOST_PASSWORD_CHARACTERS + 2).rstrip("\r\n")
    if not password or len(password) > MOST_PASSWORD_CHARACTERS:
        raise Misconfigured(
            "--password-stdin: should get one line on standard input, the password of at most"
            f" {MOST_PASSWORD_CHARACTERS} characters"
        )
    return password
