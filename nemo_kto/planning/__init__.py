"""Sizes a run before it is started: memory of a rank, time of a step, and the layout to take. Arithmetic only."""
