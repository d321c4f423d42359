"""Processes (what a network predicts, and how samples follow), samplers as plain functions, and guidance."""
