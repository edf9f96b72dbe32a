"""users-sync: keeps a Postgres table equal to the users of a Stack Auth (now Hexclave) project."""
