"""Training as jobs of a SLURM cluster: what to ask for, what SLURM says, who waits, and what runs inside a job."""
