"""What is measured of a state beside its scores."""
