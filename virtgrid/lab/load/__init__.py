"""Load on a guest's services, after SPECweb2005's Support workload, and what its clients felt."""
