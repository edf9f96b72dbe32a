"""The algorithm: walk the list, prove it, compare, apply, confirm deletions."""
