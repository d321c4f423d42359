"""From the table of runs to file names: trajectories, states, samples, scores. No torch. Start at `plan.plan`."""

from haste import moved

__getattr__ = moved.names(__name__)
