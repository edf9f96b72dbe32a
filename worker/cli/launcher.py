"""The package `users_sync` of the wheel: this one file, and the folder `worker` beside it.

Two distributions with a package named `worker` would overwrite each other's files in one
environment. So an installed worker is found here alone, and by this program alone. Of an editable
install only this file is installed, and `worker` is where it was written.
"""

import sys
from pathlib import Path
from typing import NoReturn


def main() -> NoReturn:
    """Start the program with the `worker` that came with it, whatever else has that name."""
    folder = Path(__file__).parent
    if (folder / "worker").is_dir():
        sys.path.insert(0, str(folder))
    from worker.cli.main import main as run  # noqa: PLC0415  only now it is the right one

    run()
