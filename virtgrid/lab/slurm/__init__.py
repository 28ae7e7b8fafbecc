"""A real Slurm of one's own on this machine, for tests, benches and the lab."""
