"""Loads all users by dlt's merge: run by another Python, for dlt is no dependency of ours.

Arguments: the API's address, the project's id, its secret key, and the database's address.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import dlt  # type: ignore[import-not-found]
from dlt.sources.helpers import requests  # type: ignore[import-not-found]


def users(api_url: str, project_id: str, key: str) -> Iterator[list[dict[str, Any]]]:
    """Give the users of each page, with what is nested as JSON."""
    headers = {
        "x-stack-access-type": "server",
        "x-stack-project-id": project_id,
        "x-stack-secret-server-key": key,
    }
    cursor = None
    while True:
        query = {"limit": 1_000, "order_by": "signed_up_at", "include_anonymous": "true"}
        query |= {"cursor": cursor} if cursor else {}
        answer = requests.get(f"{api_url}/api/v1/users", params=query, headers=headers).json()
        yield answer["items"]
        cursor = answer["pagination"]["next_cursor"]
        if cursor is None:
            return


def main() -> None:
    api_url, project_id, key, database_url = sys.argv[1:]
    os.environ["RUNTIME__DLTHUB_TELEMETRY"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        pipeline = dlt.pipeline(
            "users",
            pipelines_dir=folder,
            destination=dlt.destinations.postgres(database_url),
            dataset_name="by_dlt",
        )
        resource = dlt.resource(
            users(api_url, project_id, key),
            name="users",
            primary_key="id",
            write_disposition="merge",
            max_table_nesting=0,
        )
        pipeline.run(resource)


if __name__ == "__main__":
    main()
