"""Slurm as whose nodes a site gives out: advance reservations, and pilots as jobs in them."""
