"""SIGTERM, which schedulers send before they take a machine away: the run saves, ends with status 0 and can go on.

Several processes agree through JAX's preemption service on one step, whichever of them got the signal.
"""

import signal

import jax
from jax.experimental import multihost_utils


class Stop:
    """Made once, by the main thread, before the first step."""

    def __init__(self):
        self.received = False
        self.together = jax.process_count() > 1
        if not self.together:  # else the service listens to the signal
            self.before = signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, *_) -> None:
        self.received = True

    def after(self, step: int) -> bool:
        """Returns whether the run has to stop after this step; all processes ask it at every step."""
        if self.together:
            self.received = self.received or multihost_utils.reached_preemption_sync_point(step)
        return self.received

    def close(self) -> None:
        """Gives the signal back."""
        if not self.together:
            signal.signal(signal.SIGTERM, self.before)
