"""The disk under the table is full, and then it is not."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest

from tests.faults.servers import Server, running_server, user
from tests.faults.watched import Watched, logged, stopped_cleanly, watched
from tests.support.waiting import until
from worker.sandbox.postgres import create_database

pytestmark = pytest.mark.beside_api

MOVE = "alter table neon_auth.users_sync set tablespace small"
# Some hundred users with their index, and a few versions of each.
SIZE = "8m"


@contextmanager
def small_disk() -> Iterator[Path]:
    """Mount a disk of two megabytes; nobody but root may do that."""
    mount, umount = shutil.which("mount"), shutil.which("umount")
    if os.geteuid() != 0 or mount is None or umount is None:
        pytest.skip("mounting a small disk takes root and mount")
    folder = Path(tempfile.mkdtemp(prefix="users-sync-small-"))
    options = ("-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs")
    try:
        mounted = subprocess.run(
            [mount, *options, str(folder)], capture_output=True, text=True, check=False
        )
        if mounted.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
        shutil.chown(folder, user() or os.geteuid())
        try:
            yield folder
        finally:
            subprocess.run([umount, str(folder)], check=True)
    finally:
        folder.rmdir()


@pytest.fixture(scope="module")
def disk() -> Iterator[Path]:
    with small_disk() as folder:
        yield folder


@pytest.fixture(scope="module")
def server(disk: Path) -> Iterator[Server]:
    # It ends before its disk does.
    with running_server() as server, psycopg.connect(server.url, autocommit=True) as conn:
        conn.execute(f"create tablespace small location '{disk}'".encode())
        conn.close()
        yield server


@pytest.fixture
def world(server: Server, tmp_path: Path, users_api: str) -> Iterator[Watched]:
    with watched(create_database(server.url), tmp_path, users_api) as world:
        world.site.execute(MOVE)
        world.project.populate(300)
        yield world


@contextmanager
def filled(disk: Path) -> Iterator[None]:
    """Leave no room on the disk."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        filler.unlink()


@pytest.mark.fault(
    "the disk under the table is full",
    held="`--once` says so and exits with 4; once there is room, the next one completes the table",
)
def test_a_sweep_says_that_the_disk_is_full(world: Watched, disk: Path) -> None:
    with filled(disk):
        ended = world.shell.having(USERS_SYNC_DATABASE__RETRY_MINUTES="0.01").run("--once")
        assert ended.code == 4
        assert "(53100)" in ended.stderr
    assert world.as_far_as_the_checkpoint().items() <= world.rows().items()
    world.sweep()
    assert world.wanted() == world.rows()


@pytest.mark.fault(
    "the disk under the table fills up under a long-running worker",
    held="it says so, outlives it, and goes on as soon as there is room",
)
def test_a_worker_outlives_a_full_disk(world: Watched, disk: Path) -> None:
    worker = world.shell.start()
    world.catches_up()
    with filled(disk):
        for user_id in world.project.ids():
            world.project.edit(user_id, display_name="Edited")
        until("the worker says so", lambda: "(53100)" in worker.stdout.read_text("utf-8"))
        assert world.nobody_was_wronged()
    world.catches_up()
    until("the worker is content", lambda: logged(worker, "trouble.ended") > 0)
    stopped_cleanly(worker)
