"""By which names people set what is Stack Auth's and the database's, for reading and for errors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Setting = tuple[str, ...]  # section and name
Known = Mapping[Setting, tuple[str, ...]]  # with the variables that set it, strongest first

API_URL = ("stack", "api_url")
PROJECT_ID = ("stack", "project_id")
SECRET_SERVER_KEY = ("stack", "secret_server_key")
DATABASE_URL = ("database", "url")
SCHEMA = ("database", "schema")

PREFIX = "USERS_SYNC_"

# Names that users of Stack Auth and Postgres have set already. Stack Auth became Hexclave, and both
# names stay in use. Web frameworks hand what begins with NEXT_PUBLIC_ or VITE_ to every browser, so
# no secret is read under such a name.
WELL_KNOWN: Known = {
    API_URL: (
        "STACK_API_URL",
        "HEXCLAVE_API_URL",
        "NEXT_PUBLIC_STACK_API_URL",
        "NEXT_PUBLIC_HEXCLAVE_API_URL",
        "VITE_STACK_API_URL",
        "VITE_HEXCLAVE_API_URL",
    ),
    PROJECT_ID: (
        "STACK_PROJECT_ID",
        "HEXCLAVE_PROJECT_ID",
        "NEXT_PUBLIC_STACK_PROJECT_ID",
        "NEXT_PUBLIC_HEXCLAVE_PROJECT_ID",
        "VITE_STACK_PROJECT_ID",
        "VITE_HEXCLAVE_PROJECT_ID",
    ),
    SECRET_SERVER_KEY: ("STACK_SECRET_SERVER_KEY", "HEXCLAVE_SECRET_SERVER_KEY"),
    DATABASE_URL: ("DATABASE_URL",),
    ("fleet", "url"): ("FLEET_DATABASE_URL",),
}


def suggested(setting: Setting) -> str:
    """Give the variables to set where none is set yet."""
    return " or ".join(WELL_KNOWN.get(setting, (own_variable(setting),))[:2])


def own_variable(setting: Setting) -> str:
    """Give the variable that wins over all others."""
    return PREFIX + "__".join(setting).upper()


def named(setting: Setting, places: Sequence[str] = ()) -> str:
    """Name a setting with the variables or files that set it, or those that could."""
    return f"{'.'.join(setting)} ({' and '.join(places) or suggested(setting)})"


@dataclass(frozen=True, slots=True)
class Names:
    """What to call the settings of a project in an error: by what the person set.

    `database` is what to call the database itself, `check` the command that says what is wrong.
    """

    api_url: str = named(API_URL)
    project_id: str = named(PROJECT_ID)
    secret_server_key: str = named(SECRET_SERVER_KEY)
    database_url: str = named(DATABASE_URL)
    schema: str = named(SCHEMA)
    database: str = "the database"
    check: str = "users-sync check"


# For settings that no person gave.
USUAL_NAMES = Names()
