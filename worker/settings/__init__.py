"""What can be configured, within which bounds, and from where."""
