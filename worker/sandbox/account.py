"""The system user as whom the embedded Postgres runs where root starts it, and what it owns."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from worker.errors import Misconfigured

if sys.platform != "win32":
    import fcntl
    import grp
    import pwd

# pgserver has this name in its code.
NAME = "pgserver"

# Only root may write in this folder, so that no other user can lay a link there, or hold the lock.
_LOCK = Path("/run/users-sync.lock")

# Where useradd is; cron's PATH does not lead there.
_SYSTEM_PROGRAMS = "/usr/sbin:/sbin"

# It waits 15 s itself for another process that changes the list of users.
_USERADD_SECONDS = 60

# A file of the server whose owner is taken for that of all; it is handed over last.
_MARK = "PG_VERSION"


def is_root() -> bool:
    return sys.platform != "win32" and os.geteuid() == 0


def make_account() -> None:
    """Make the user if there is none. Raises Misconfigured where that cannot be done.

    pgserver would do so without a lock. Of several that begin at once each then makes the user
    again, with another uid, and no user can read what the one before has written.
    """
    if _exists():
        return
    useradd = shutil.which(
        "useradd", path=f"{os.environ.get('PATH') or os.defpath}:{_SYSTEM_PROGRAMS}"
    )
    if useradd is None:
        raise _no_account("there is no useradd to make it with")
    try:
        with _lock() as lock:
            if not _exists():
                _run_useradd(useradd, lock)
    except (OSError, subprocess.SubprocessError) as error:
        # A program that does not know our lock may have been quicker.
        if not _exists():
            words = " ".join((getattr(error, "stderr", None) or str(error)).split())
            raise _no_account(f"it could not be made ({words})") from error


def _exists() -> bool:
    try:
        pwd.getpwnam(NAME)
    except KeyError:
        return False
    return True


@contextmanager
def _lock() -> Iterator[int]:
    """Wait until no other process of this machine is here, and give the lock's descriptor."""
    lock = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, mode=0o600)
    try:
        if os.fstat(lock).st_uid != 0:
            raise PermissionError(f"{_LOCK} is not root's own file; remove it")
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
    finally:
        os.close(lock)


def _run_useradd(useradd: str, lock: int) -> None:
    """Make a user without a password, home or shell."""
    subprocess.run(  # noqa: S603 - nothing in it comes from outside
        [useradd, "--system", "--no-create-home", "--shell=/bin/false", _group_option(), NAME],
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=_USERADD_SECONDS,
        # So the lock is held until useradd ends, also when this process is killed.
        pass_fds=[lock],
    )


def _group_option() -> str:
    """Take the group that was left when the user was removed; useradd trips over it."""
    try:
        grp.getgrnam(NAME)
    except KeyError:
        return "--user-group"
    return f"--gid={NAME}"


def _no_account(reason: str) -> Misconfigured:
    return Misconfigured(
        f"as root the embedded Postgres needs a system user {NAME}, and {reason}; "
        "make that user, run users-sync as another user than root, or set DATABASE_URL to a server"
    )


def hand_over(data: Path) -> None:
    """Give the user what one of the same name owned before it was removed and made again.

    Raise Misconfigured if that uid is another user's by now: who knows what they wrote there; and
    if a server runs on `data` as the former user. A call that was killed is finished by the next.
    """
    account = pwd.getpwnam(NAME)
    try:
        former = (data / _MARK).lstat().st_uid
    except FileNotFoundError:
        return
    if former == account.pw_uid:
        return
    if (data / "postmaster.pid").exists():
        raise Misconfigured(
            f"the embedded Postgres in {data} was started by another user, uid {former}; stop it: "
            "its process id is the first line of postmaster.pid there"
        )
    if (name := _name(former)) is not None:
        raise Misconfigured(
            f"the embedded Postgres cannot run in {data}, which belongs to the user {name}; "
            "remove that folder, or set database.embedded_dir to another one"
        )
    for *_, names, folder in os.fwalk(data, topdown=False):
        for name in (".", *sorted(names, key=_MARK.__eq__)):
            if os.stat(name, dir_fd=folder, follow_symlinks=False).st_uid == former:
                os.chown(name, account.pw_uid, account.pw_gid, dir_fd=folder, follow_symlinks=False)


def _name(uid: int) -> str | None:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None
