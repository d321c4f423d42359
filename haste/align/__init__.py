"""Alignment of a student's tokens and attention with a teacher's, and when to stop it."""
