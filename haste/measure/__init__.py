"""Diagnostics of a state other than its scores."""
