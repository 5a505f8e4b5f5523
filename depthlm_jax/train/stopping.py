"""SIGTERM, which schedulers send before they take a machine away: the run saves, ends with status 0 and can go on.

Several processes agree through JAX's preemption service on one step, whichever of them got the signal.
"""

import signal

import jax
from jax.experimental import multihost_utils


class Stopped(Exception):
    """What was being done need not be finished."""


class Stop:
    """Made once, by the main thread, before the first step."""

    def __init__(self):
        self.received, self.asked = False, 0
        self.together = jax.process_count() > 1
        if not self.together:  # else the service listens to the signal
            self.before = signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, *_) -> None:
        self.received = True

    def now(self) -> bool:
        """Returns whether the run has to stop here; all processes ask it at the same places."""
        self.asked += 1
        if self.together:
            self.received = self.received or multihost_utils.reached_preemption_sync_point(self.asked)
        return self.received

    def close(self) -> None:
        """Gives the signal back."""
        if not self.together:
            signal.signal(signal.SIGTERM, self.before)
