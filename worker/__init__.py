"""users-sync: keeps a Postgres table equal to the users of a Stack Auth (now Hexclave) project."""


def installed_version() -> str:
    """Give the version of the installed package, or "0" where only its files are there."""
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415  20 ms, seldom

    try:
        return version("users-sync")
    except PackageNotFoundError:
        return "0"
