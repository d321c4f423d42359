"""Training as SLURM jobs: their resources, queries of SLURM, the waiting process, and what runs inside a job."""
