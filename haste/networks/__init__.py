"""Public networks by name, and what is known of a network before it is built."""
