"""Lets `python -m worker` do what `users-sync` does."""

from worker.cli.main import main

main()
