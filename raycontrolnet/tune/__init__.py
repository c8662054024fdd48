"""Sweeps: many runs of the same `fit`, sharing everything that does not differ, on Ray Tune."""
