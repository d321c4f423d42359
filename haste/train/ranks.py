"""The process that forks a launcher's ranks: imported in it, and in no other.

Ranks share what it has imported: torch, and its compiler, which every optimiser asks for. It ends with the launcher,
and the ranks with it. TERM to all processes of a job is for the ranks, which save: it is kept from this process, and
from a rank until it listens.
"""

from __future__ import annotations

import signal

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

import torch._dynamo  # noqa: E402, F401

from haste.train import launch  # noqa: E402

launch.die_with_parent()
