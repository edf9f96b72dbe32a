"""users-sync: keeps a Postgres table of users equal to the users of a Stack Auth project."""
