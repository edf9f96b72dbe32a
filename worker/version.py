"""Which version of this program runs."""

from importlib.metadata import PackageNotFoundError, version


def installed_version() -> str:
    """Give the version of the installed package, or "0" where only its files are there."""
    try:
        return version("users-sync")
    except PackageNotFoundError:
        return "0"
