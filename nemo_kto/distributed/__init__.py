"""Collectives and log-probabilities over explicit process groups."""
