"""This host: what it has and what it lacks."""
