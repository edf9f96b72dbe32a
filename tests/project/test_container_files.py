"""What the Dockerfile promises; it is read here, and built and run by `ci/image`."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.places import ROOT
from worker.cli import healthcheck
from worker.settings.settings import Settings

EMBEDDED_DATABASE = {
    "STACK_PROJECT_ID": "11111111-1111-4111-8111-111111111111",
    "STACK_SECRET_SERVER_KEY": "ssk_secret",
    "DATABASE_URL": "embedded",
}


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
def built(stages: list[list[tuple[str, str]]]) -> str:
    """Return what is run in the stage that builds."""
    return "\n".join(rest for name, rest in stages[1] if name == "RUN")


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
    command = json.loads(final["HEALTHCHECK"].removeprefix("CMD "))
    assert command == ["python", "-I", "-S", "/usr/local/lib/users-sync-healthcheck.py"]
    assert int(final["EXPOSE"]) == Settings().http.port


def test_health_check_is_the_one_that_is_tested(final: dict[str, str], built: str) -> None:
    source = Path(healthcheck.__file__).relative_to(ROOT)
    assert f"cp {source} /installed/lib/users-sync-healthcheck.py" in built
    assert final["COPY"] == "--from=build /installed /usr/local"


def test_entrypoint_is_a_script_of_the_project(final: dict[str, str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert json.loads(final["ENTRYPOINT"])[0] in project["scripts"]


def test_endpoints_can_be_reached_and_logs_are_not_held_back(environment: dict[str, str]) -> None:
    assert environment["USERS_SYNC_HTTP__HOST"] == "0.0.0.0"
    assert environment["PYTHONUNBUFFERED"] == "1"


def test_nothing_is_built_or_installed_in_the_final_image(
    stages: list[list[tuple[str, str]]],
) -> None:
    """What is run there takes away what could install."""
    commands = [rest for name, rest in stages[-1] if name == "RUN"]
    copies = [rest for name, rest in stages[-1] if name == "COPY"]
    assert [command.split()[0] for command in commands] == ["rm"]
    assert "site-packages/pip*" in commands[0]
    assert copies
    assert {copy.split()[0] for copy in copies} == {"--from=build"}


def test_all_stages_have_one_base_that_is_pinned_to_a_minor_version(
    stages: list[list[tuple[str, str]]],
) -> None:
    """Bytecode that is never checked must be that of the very Python that runs it."""
    bases = [stage[0][1] for stage in stages]
    assert bases == ["python:3.13-slim AS base", "base AS build", "base"]


def test_image_has_every_extra_that_production_can_use(built: str) -> None:
    """The embedded Postgres is for the demo, which is not in the image."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = sorted(project["optional-dependencies"].keys() - {"embedded", "test", "dev"})
    [install] = re.findall(r"pip install (.*?)&&", built)
    assert install.split()[-1] == f"'.[{','.join(extras)}]'"


def test_all_that_is_installed_has_bytecode(built: str) -> None:
    assert "--no-compile" in built
    assert "compileall -q -f --invalidation-mode unchecked-hash" in built
    assert re.findall(r"\$compile .*? (\S+) +(?=&&)", built) == ["/installed", '"$library"']


def test_what_the_build_copies_is_not_ignored(stages: list[list[tuple[str, str]]]) -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    let_in = {line[1:] for line in lines if line.startswith("!")}
    copied = {word for name, rest in stages[1] if name == "COPY" for word in rest.split()[:-1]}
    assert "*" in lines
    assert let_in == copied


def test_without_the_sandbox_only_the_demo_is_lacking(tmp_path: Path) -> None:
    """The image is built without it, as .dockerignore says."""
    assert "worker/sandbox" in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    shutil.copytree(ROOT / "worker", tmp_path / "worker", ignore=shutil.ignore_patterns("sandbox"))
    for command in ("demo", "check"):
        ended = subprocess.run(
            [sys.executable, "-m", "worker", command],
            env={"PATH": os.defpath, "PYTHONPATH": str(tmp_path), **EMBEDDED_DATABASE},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
        assert "pip install 'users-sync[embedded]'" in ended.stderr
