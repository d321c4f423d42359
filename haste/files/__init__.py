"""Files: atomic artefacts, locks, stores, archives, and their provenance. No torch."""
