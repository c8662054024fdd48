"""Memory, work and time of a run, counted before it starts."""
