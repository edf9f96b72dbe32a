"""The embedded Postgres as root on a machine that it never ran on, or whose users changed."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import dedent

import psycopg
import pytest

from tests.conftest import remove_data
from tests.support.places import ROOT
from worker.sandbox.account import NAME
from worker.sandbox.postgres import EmbeddedPostgres

LISTS = ("passwd", "group", "shadow", "gshadow")

# No machine has a user of this number.
NEW_UID = 1_234_567_001

# Starts a server when it is told to, and stops it when it is told again.
SERVE = """
    import sys, pathlib, platformdirs, psutil, worker.sandbox.postgres as postgres
    from worker.errors import Misconfigured
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        with postgres.EmbeddedPostgres(pathlib.Path(sys.argv[1])) as server:
            print(server.url(), flush=True)
            sys.stdin.readline()
    except Misconfigured as error:
        print(error)
"""


@dataclass(frozen=True)
class Machine:
    """Processes for which `etc` is /etc; a shell runs `setup` before them, where they run."""

    etc: Path
    folder: Path
    setup: str = "true"
    path: str = "/usr/bin:/bin"  # as cron has it

    def data(self, name: str = "server") -> Path:
        return EmbeddedPostgres(self.folder / name).data

    def spawn(self, name: str = "server") -> subprocess.Popen[str]:
        shell = f'mount --bind "$0" /etc && {self.setup} && exec "$@"'
        python = [sys.executable, "-W", "error", "-c", dedent(SERVE), str(self.folder / name)]
        return subprocess.Popen(
            ["/usr/bin/unshare", "--mount", "/bin/sh", "-c", shell, str(self.etc), *python],
            cwd=ROOT,
            env={**os.environ, "PATH": self.path},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def serve(self, name: str = "server") -> str:
        """Start a server and stop it; return its URL, or what the error says."""
        with self.spawn(name) as process:
            out, _ = process.communicate("\n\n", timeout=60)
        return out.removeprefix("ready\n").strip()

    def entries(self, of: str) -> list[str]:
        return [line for line in self._lines(of) if line.startswith(f"{NAME}:")]

    def remove_user(self, *lists: str) -> None:
        for of in lists:
            self._write(of, [line for line in self._lines(of) if not line.startswith(f"{NAME}:")])

    def add_user(self, uid: int, name: str = NAME) -> None:
        self._write("passwd", [*self._lines("passwd"), f"{name}:x:{uid}:{uid}::/:/bin/false"])

    def _lines(self, of: str) -> list[str]:
        return (self.etc / of).read_text().splitlines()

    def _write(self, of: str, lines: list[str]) -> None:
        (self.etc / of).write_text("\n".join(lines) + "\n")


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """Return a machine without the user pgserver; the real one's users stay as they are."""
    etc, folder = tmp_path / "etc", tmp_path / "folder"
    subprocess.run(["/bin/cp", "-a", "/etc", str(etc)], check=True)
    folder.mkdir()
    machine = Machine(etc, folder)
    machine.remove_user(*LISTS)
    yield machine
    for name in ("server", "0", "1", "2", "3"):
        remove_data(EmbeddedPostgres(folder / name))


def _may_mount() -> bool:
    if sys.platform != "linux" or os.geteuid() != 0 or not Path("/usr/bin/unshare").exists():
        return False
    bind = ["/usr/bin/unshare", "--mount", "/bin/sh", "-c", "mount --bind /etc /etc"]
    return subprocess.run(bind, check=False, capture_output=True).returncode == 0


pytestmark = [
    pytest.mark.skipif(not _may_mount(), reason="only root may have an /etc of its own"),
    pytest.mark.skipif(not Path("/usr/sbin/useradd").exists(), reason="there is no useradd"),
]


def test_several_that_start_at_once_on_a_fresh_machine_all_run(
    machine: Machine, tmp_path: Path
) -> None:
    counting = tmp_path / "bin" / "useradd"
    counting.parent.mkdir()
    counting.write_text(f'#!/bin/sh\necho >> {tmp_path}/made\nexec /usr/sbin/useradd "$@"\n')
    counting.chmod(0o755)
    machine = replace(machine, path=f"{counting.parent}:{machine.path}")
    processes = [machine.spawn(str(number)) for number in (0, 1, 2, 2)]
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        print(file=process.stdin, flush=True)
    urls = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert all(url.startswith("postgresql://") for url in urls)
    assert urls[2] == urls[3]
    assert (tmp_path / "made").read_text() == "\n"
    assert len(machine.entries("passwd")) == 1


def test_a_second_start_makes_no_other_user(machine: Machine) -> None:
    url = machine.serve()
    before = machine.entries("passwd")
    assert machine.serve() == url
    assert machine.entries("passwd") == before


def test_a_group_without_its_user_is_taken(machine: Machine) -> None:
    machine.serve()
    machine.remove_user("passwd", "shadow")
    assert machine.serve().startswith("postgresql://")


def test_a_user_that_was_made_by_half_serves(machine: Machine) -> None:
    machine.add_user(NEW_UID)
    assert machine.serve().startswith("postgresql://")
    assert machine.entries("shadow") == []


@pytest.mark.parametrize(
    ("setup", "expected"),
    [
        pytest.param(
            "mount --bind /dev/null /usr/sbin/useradd", "there is no useradd", id="no useradd"
        ),
        pytest.param("mount -o remount,bind,ro /etc", "cannot lock /etc", id="read-only /etc"),
        pytest.param(
            'mkdir "$0/run" && ln -s "$0/there" "$0/run/users-sync.lock"'
            ' && mount --bind "$0/run" /run',
            "/run/users-sync.lock",
            id="a link in the lock's place",
        ),
    ],
)
def test_a_user_that_cannot_be_made_is_one_line(
    machine: Machine, setup: str, expected: str
) -> None:
    found = replace(machine, setup=setup).serve()
    assert found.startswith(f"as root the embedded Postgres needs a system user {NAME}, and ")
    assert expected in found
    assert "\n" not in found
    assert not (machine.etc / "there").exists()


@pytest.mark.parametrize("interrupted", [False, True])
def test_data_of_a_removed_user_go_to_the_one_made_again(
    machine: Machine, *, interrupted: bool
) -> None:
    machine.serve()
    former = (machine.data() / "PG_VERSION").stat().st_uid
    machine.remove_user(*LISTS)
    machine.add_user(NEW_UID)
    if interrupted:
        for path in (machine.data() / "base").rglob("*"):
            os.chown(path, NEW_UID, NEW_UID)
    assert machine.serve().startswith("postgresql://")
    assert former not in {path.lstat().st_uid for path in machine.data().rglob("*")}


def test_what_links_in_the_data_lead_to_is_not_handed_over(
    machine: Machine, tmp_path: Path
) -> None:
    machine.serve()
    former = (machine.data() / "PG_VERSION").stat().st_uid
    targets = [tmp_path / "a file", tmp_path / "a folder"]
    targets[0].touch()
    targets[1].mkdir()
    for target in targets:
        os.chown(target, former, former)
        (machine.data() / target.name).symlink_to(target)
    machine.remove_user(*LISTS)
    machine.add_user(NEW_UID)
    assert machine.serve().startswith("postgresql://")
    assert [target.stat().st_uid for target in targets] == [former, former]


def test_data_that_are_another_users_by_now_are_left_alone(machine: Machine) -> None:
    machine.serve()
    former = (machine.data() / "PG_VERSION").stat().st_uid
    machine.remove_user(*LISTS)
    machine.add_user(NEW_UID)
    machine.add_user(former, "somebody")
    found = machine.serve()
    assert found.startswith(f"the embedded Postgres cannot run in {machine.data()}, which belongs")
    assert "the user somebody; remove that folder" in found
    assert (machine.data() / "base").stat().st_uid == former


def test_a_server_that_runs_as_a_removed_user_is_left_alone(machine: Machine) -> None:
    with machine.spawn() as running:
        assert running.stdin
        assert running.stdout
        print(file=running.stdin, flush=True)
        url = [running.stdout.readline().strip() for _ in range(2)][1]
        machine.remove_user(*LISTS)
        machine.add_user(NEW_UID)
        assert "was started by another user" in machine.serve()
        with psycopg.connect(url) as conn:
            assert conn.execute("select true").fetchone() == (True,)
        machine.remove_user("passwd")
        machine.add_user((machine.data() / "PG_VERSION").stat().st_uid)
        running.communicate("\n", timeout=60)
