"""Everything users-sync needs to be tried out and tested on one machine, without an account."""
