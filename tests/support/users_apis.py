"""The users APIs that tests run on: both kinds of server, and one that changes between pages."""

import pytest

from worker.sandbox.api import APRIL, TODAY, FakeStackApi, Kind, Project

BOTH_SERVERS = ("today", "april")
USERS_APIS = (*BOTH_SERVERS, "changing")

# The kind of a server that changes is another one after so many requests.
REQUESTS_OF_A_KIND = 3

# Marks tests that run on several of them; their fixtures ask for `users_api`.
every_server = pytest.mark.parametrize("users_api", USERS_APIS, indirect=True)
both_servers = pytest.mark.parametrize("users_api", BOTH_SERVERS, indirect=True)


class ChangingApi(FakeStackApi):
    """A hosted server that is replaced by one of the other kind, again and again."""

    @property
    def kind(self) -> Kind:
        return (TODAY, APRIL)[len(self.requests) // REQUESTS_OF_A_KIND % 2]

    @kind.setter
    def kind(self, kind: Kind) -> None:
        """Leave it: this server has no kind of its own."""


def api_of(project: Project, users_api: str = "today") -> FakeStackApi:
    """Make the users API of a project, by name."""
    if users_api == "changing":
        return ChangingApi(project)
    return FakeStackApi(project, {"today": TODAY, "april": APRIL}[users_api])
