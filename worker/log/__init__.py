"""The log, and standard output: neither ever blocks the work."""
