"""Frozen vision encoders whose features and attention a student is aligned with."""
