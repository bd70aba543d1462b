"""Time by phase, for the benchmarks."""

import time


class Stopwatch:
    """Seconds by phase: `lap(phase)` books the time since the last lap."""

    phases: tuple[str, ...]

    def __init__(self) -> None:
        """Start now."""
        self.seconds, self.last = dict.fromkeys(self.phases, 0.0), time.perf_counter()

    def lap(self, phase: str) -> None:
        """Book the time since the last lap.

        Args:
            phase: One of `phases`.
        """
        now = time.perf_counter()
        self.seconds[phase] += now - self.last
        self.last = now
