"""How it runs: one sweep, or until stopped."""
