"""What people ask of a results folder: what will run and what it costs, what runs, what can go. No torch."""
