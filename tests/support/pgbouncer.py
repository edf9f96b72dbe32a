"""The configuration of a PgBouncer in front of a test's server."""


def configuration(database: str, port: int) -> str:
    """Write it: any client is let in, and taken for the user whom `database` names."""
    return f"""
[databases]
* = {database}
[pgbouncer]
pool_mode = transaction
auth_type = any
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
"""
