"""The command `haste`. Start at `main`."""
