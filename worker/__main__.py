"""Lets `python -m worker` do what `users-sync` does."""

from worker.cli import main

main()
