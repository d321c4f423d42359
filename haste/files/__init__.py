"""Files: artefacts that are whole or not there, locks, stores, archives, and what each says of itself. No torch."""
