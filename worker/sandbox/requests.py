"""What a request to the fake API asks for, and whether the real server would let it pass."""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl
from wsgiref.types import WSGIEnvironment

from worker.sandbox.kinds import Kind
from worker.sandbox.project import Asked, Project, Shown
from worker.sandbox.replies import (
    ABOUT_AUTHENTICATION,
    Refused,
    Reply,
    known_error,
    schema_error,
    server_error,
)

ACCESS_TYPES = ("client", "server", "admin")
# An upper-case id is well-formed, which is why the list can answer it with an empty page.
UUID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
WRITABLE = {
    "display_name",
    "primary_email",
    "primary_email_verified",
    "primary_email_auth_enabled",
    "profile_image_url",
    "client_metadata",
    "client_read_only_metadata",
    "server_metadata",
    "has_password",
    "password",
    "otp_auth_enabled",
    "is_anonymous",
    "restricted_by_admin",
    "restricted_by_admin_reason",
    "restricted_by_admin_private_details",
    "country_code",
}


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it came; the names of headers are in lower case."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    url: str

    def malformed(self, *problems: str) -> Refused:
        return Refused(schema_error(self.method, self.path, *problems))


def read(environ: WSGIEnvironment) -> Request:
    """Take a request out of its WSGI environment; PEP 3333 has text there as latin-1."""
    path = environ.get("PATH_INFO", "").encode("latin-1").decode("utf-8", "replace")
    query = environ.get("QUERY_STRING", "")
    host = environ.get("HTTP_HOST") or f"{environ['SERVER_NAME']}:{environ['SERVER_PORT']}"
    length = environ.get("CONTENT_LENGTH")
    return Request(
        method=environ["REQUEST_METHOD"],
        path=path,
        query=dict(parse_qsl(query, keep_blank_values=True)),
        headers=_headers(environ),
        body=environ["wsgi.input"].read(int(length)) if length else b"",
        url=f"{environ['wsgi.url_scheme']}://{host}{path}" + (f"?{query}" if query else ""),
    )


def _headers(environ: WSGIEnvironment) -> dict[str, str]:
    return {
        name.removeprefix("HTTP_").replace("_", "-").lower(): value
        for name, value in environ.items()
        if name.startswith("HTTP_") or name == "CONTENT_TYPE"
    }


def _header(request: Request, kind: Kind, name: str) -> str | None:
    """Give a header under the first of the names that this kind of server knows."""
    values = (request.headers.get(prefix + name) for prefix in kind.header_prefixes)
    return next((value for value in values if value is not None), None)


def check_access(request: Request, project: Project, kind: Kind) -> None:
    """Raise Refused unless the headers open this project."""
    access_type = _header(request, kind, "access-type")
    project_id = _header(request, kind, "project-id")
    key = _header(request, kind, "secret-server-key")
    if access_type is None:
        raise Refused(_access_type_required())
    if project_id is None:
        raise Refused(_project_id_required(access_type))
    if project_id != project.project_id:
        raise Refused(_unknown_project(project_id))
    if access_type not in ACCESS_TYPES or access_type == "client":
        raise Refused(_insufficient(access_type))
    if key is None:
        raise Refused(_key_required())
    if key != project.secret_server_key:
        raise Refused(_wrong_key(project_id))


def _access_type_required() -> Reply:
    return known_error(
        400,
        "ACCESS_TYPE_REQUIRED",
        "You must specify an access level for this Stack project. Make sure project API keys are "
        "provided (eg. x-stack-publishable-client-key) and you set the x-stack-access-type header "
        f"to 'client', 'server', or 'admin'.\n\n{ABOUT_AUTHENTICATION}",
    )


def _project_id_required(access_type: str) -> Reply:
    return known_error(
        400,
        "ACCESS_TYPE_WITHOUT_PROJECT_ID",
        f"The x-stack-access-type header was '{access_type}', but the x-stack-project-id header "
        f"was not provided.\n\n{ABOUT_AUTHENTICATION}",
        {"request_type": access_type},
    )


def _unknown_project(project_id: str) -> Reply:
    return known_error(
        400,
        "CURRENT_PROJECT_NOT_FOUND",
        f"The current project with ID {project_id} was not found. Please check the value of the "
        "x-stack-project-id header.",
        {"project_id": project_id},
    )


def _insufficient(access_type: str) -> Reply:
    return known_error(
        401,
        "INSUFFICIENT_ACCESS_TYPE",
        f"The x-stack-access-type header must be 'server' or 'admin', but was '{access_type}'.",
        {"actual_access_type": access_type, "allowed_access_types": ["server", "admin"]},
    )


def _key_required() -> Reply:
    return known_error(
        401, "SERVER_AUTHENTICATION_REQUIRED", "The secret server key must be provided."
    )


def _wrong_key(project_id: str) -> Reply:
    return known_error(
        401,
        "INVALID_SECRET_SERVER_KEY",
        f'The secret server key is not valid for the project "{project_id}". Does the project '
        "and/or the key exist?",
        {"project_id": project_id},
    )


def listing(request: Request, kind: Kind) -> Asked:
    """Read the parameters of the list. Raises Refused naming each one that is wrong."""
    problems = list(_problems(request.query, _parameters(kind)))
    if problems:
        raise request.malformed(*problems)
    query = request.query
    shown = Shown.RESTRICTED if query.get("include_restricted") == "true" else Shown.DEFAULT
    return Asked(
        limit=int(float(query["limit"])) if "limit" in query else None,
        cursor=query.get("cursor"),
        newest_first=query.get("desc") == "true",
        shown=Shown.ANONYMOUS if query.get("include_anonymous") == "true" else shown,
        inclusive=kind.inclusive,
        by_activity=query.get("order_by") == "last_active_at",
    )


Check = Callable[[str], str | None]


def _problems(query: dict[str, str], checks: dict[str, Check]) -> Iterator[str]:
    for name, text in query.items():
        if name in checks and (problem := checks[name](text)):
            yield f"query.{name} {problem}"
    if unknown := query.keys() - checks:
        yield f"query contains unknown properties: {', '.join(sorted(unknown))}"


def _limit_problem(text: str, cap: int | None) -> str | None:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        found = f'`NaN` (cast from the value `"{text}"`)'
        return f"must be a `number` type, but the final value was: {found}."
    if number < 1:
        return "must be greater than or equal to 1"
    if cap is not None and number > cap:
        return f"must be less than or equal to {cap}"
    return None if number.is_integer() else "must be an integer"


def _one_of(*allowed: str) -> Check:
    problem = f"must be one of the following values: {', '.join(allowed)}"
    return lambda text: None if text in allowed else problem


def _uuid_problem(text: str) -> str | None:
    return None if UUID.fullmatch(text) else "must be a valid UUID"


def _parameters(kind: Kind) -> dict[str, Check]:
    flag = _one_of("true", "false")
    known: dict[str, Check] = {
        "limit": lambda text: _limit_problem(text, kind.cap),
        "cursor": _uuid_problem,
        "order_by": _one_of(*kind.orders),
        "desc": flag,
        "include_restricted": flag,
    }
    return known | ({"include_anonymous": flag} if kind.knows_include_anonymous else {})


def check_user_id(request: Request, user_id: str) -> None:
    """Raise Refused for an id that is no UUID, and for parameters, which only the list takes."""
    problem = _uuid_problem(user_id)
    problems = [f"params.user_id {problem}"] if problem else []
    problems += _problems(request.query, {})
    if problems:
        raise request.malformed(*problems)


def fields(request: Request) -> dict[str, Any]:
    """Read the fields to set. Raises Refused for no JSON, unknown fields and NUL characters."""
    try:
        asked = json.loads(request.body)
    except ValueError:
        raise Refused(
            known_error(400, "BODY_PARSING_ERROR", "Invalid JSON in request body")
        ) from None
    if not isinstance(asked, dict):
        raise request.malformed("body must be an object")
    if unknown := asked.keys() - WRITABLE:
        names = ", ".join(sorted(unknown))
        raise request.malformed(f"body contains unknown properties: {names}")
    if _holds_nul(asked):
        # Postgres, under the real server, has no room for it.
        raise Refused(server_error())
    return asked


def _holds_nul(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_holds_nul(name) or _holds_nul(held) for name, held in value.items())
    if isinstance(value, list):
        return any(map(_holds_nul, value))
    return isinstance(value, str) and "\0" in value
