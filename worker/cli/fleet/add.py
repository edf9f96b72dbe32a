"""The command `fleet add`: one more project, or a change of one."""

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from worker.cli.context import read_settings
from worker.cli.fleet.context import opened_control
from worker.cli.options import DONE, Config, LogFormat, LogLevel
from worker.errors import Misconfigured
from worker.fleet.projects import Project, checked


def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What to call it.")],
    *,
    project_id: Annotated[
        str, typer.Option("--project-id", metavar="ID", help="The Stack Auth project's id.")
    ],
    secret: Annotated[
        str,
        typer.Option(
            "--secret",
            metavar="REF",
            help="Where its secret server key is: env:NAME or file:NAME.",
        ),
    ],
    database: Annotated[
        str,
        typer.Option(
            "--database",
            metavar="REF",
            help="Where the URL of its database is: env:NAME or file:NAME.",
        ),
    ],
    schema: Annotated[
        str, typer.Option("--schema", metavar="SCHEMA", help="Schema of its table.")
    ] = "neon_auth",
    api_url: Annotated[
        str, typer.Option("--api-url", metavar="URL", help="Base URL of its API.")
    ] = "https://api.stack-auth.com",
    webhook: Annotated[
        str | None,
        typer.Option(
            "--webhook",
            metavar="REF",
            help="Where the signing secrets of its webhook are: env:NAME or file:NAME.",
        ),
    ] = None,
    own: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SETTING=VALUE",
            help="A setting of its own, as in schedule.sweep_seconds=300.",
        ),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Change the project of that name.")
    ] = False,
    config: Config = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> int:
    """Add a project to the fleet; its secrets are given by reference."""
    settings = read_settings(config, log_format, log_level)
    project = checked(
        Project(
            name, api_url, project_id, secret, database, schema, webhook, own_settings(own or ())
        )
    )
    with opened_control(settings) as control:
        control.add(project, replace=replace)
    print(f"{'Changed' if replace else 'Added'}: {name}. Workers visit it within seconds.")
    return DONE


def own_settings(given: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read `section.name=value`, values as JSON or else as text. Raises Misconfigured."""
    sections: dict[str, dict[str, Any]] = {}
    for each in given:
        setting, equals, text = each.partition("=")
        section, dot, name = setting.strip().partition(".")
        if not (equals and dot and section and name):
            raise Misconfigured("--set: should be like schedule.sweep_seconds=300")
        sections.setdefault(section, {})[name] = _value(text)
    return sections


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
