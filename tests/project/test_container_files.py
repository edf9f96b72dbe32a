"""What the Dockerfile promises; it is read here because not every machine can build it."""

import json
import re
import tomllib

import pytest

from tests.support.places import ROOT
from worker.settings.settings import Settings


@pytest.fixture(scope="module")
def stages() -> list[list[tuple[str, str]]]:
    """Return the instructions of each stage, as (name, arguments), continued lines joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    instructions = [
        (name, rest) for name, _, rest in (line.partition(" ") for line in lines) if name
    ]
    starts = [i for i, (name, _) in enumerate(instructions) if name == "FROM"]
    ends = [*starts[1:], len(instructions)]
    return [instructions[start:end] for start, end in zip(starts, ends, strict=True)]


@pytest.fixture(scope="module")
def final(stages: list[list[tuple[str, str]]]) -> dict[str, str]:
    """Return the last stage; where an instruction comes twice, the last one counts."""
    return dict(stages[-1])


@pytest.fixture(scope="module")
def environment(final: dict[str, str]) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in final["ENV"].split())


def test_runs_as_a_numbered_user_that_is_not_root(final: dict[str, str]) -> None:
    user, group = map(int, final["USER"].split(":"))
    assert user >= 1000
    assert group >= 1000


def test_signals_reach_the_worker(final: dict[str, str]) -> None:
    assert json.loads(final["ENTRYPOINT"]) == ["users-sync"]
    assert "CMD" not in final
    assert final["STOPSIGNAL"] == "SIGTERM"


def test_health_is_checked_without_a_shell_on_the_port_that_is_exposed(
    final: dict[str, str],
) -> None:
    assert json.loads(final["HEALTHCHECK"].removeprefix("CMD ")) == ["users-sync", "probe"]
    assert int(final["EXPOSE"]) == Settings().http.port


def test_entrypoint_is_a_script_of_the_project(final: dict[str, str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert json.loads(final["ENTRYPOINT"])[0] in project["scripts"]


def test_endpoints_can_be_reached_and_logs_are_not_held_back(environment: dict[str, str]) -> None:
    assert environment["USERS_SYNC_HTTP__HOST"] == "0.0.0.0"
    assert environment["PYTHONUNBUFFERED"] == "1"


def test_nothing_is_built_or_installed_in_the_final_image(final: dict[str, str]) -> None:
    assert "RUN" not in final
    assert final["COPY"].startswith("--from=build ")


def test_base_images_are_pinned_to_a_minor_version(stages: list[list[tuple[str, str]]]) -> None:
    bases = {stage[0][1].split()[0] for stage in stages}
    assert bases == {"python:3.13-slim"}


def test_no_extra_is_installed(stages: list[list[tuple[str, str]]]) -> None:
    installed = [rest for name, rest in stages[0] if name == "RUN"]
    assert "/wheels/*.whl" in installed[-1]
    assert "[" not in installed[-1]
    assert "embedded" not in installed[-1]


def test_what_the_build_copies_is_not_ignored(stages: list[list[tuple[str, str]]]) -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    let_in = {line[1:] for line in lines if line.startswith("!")}
    copied = {word for name, rest in stages[0] if name == "COPY" for word in rest.split()[:-1]}
    assert lines[1] == "*"
    assert let_in == copied
