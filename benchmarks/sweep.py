"""How much do two workers help a sweep, and what does the sweep itself cost?

    PYTHONPATH=.:tests python benchmarks/sweep.py

The same runs, plain arithmetic of some seconds, are made by one worker and by two, in turn, three
times; the medians go to data/results/throughput. Run nothing else meanwhile.
"""

import os
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from helpers.fake_study import FakeRun, make_record

from bdutils import sweep
from bdutils.experiments import results

TODO = [("benchmark", FakeRun(f"run{number}", "busy")) for number in range(12)]


def timed(workers: int) -> tuple[float, float]:
    """Return wall time, and the share of the workers' time that was not spent in runs."""
    with TemporaryDirectory() as folder:
        os.environ["FAKE_FOLDER"], start = folder, time.perf_counter()
        ended = sweep.run_all(TODO, make=make_record, folder=Path(folder), workers=workers)
        wall = time.perf_counter() - start
    return wall, 1 - sum(x.record["metrics"]["seconds"] for x in ended) / (wall * workers)


if __name__ == "__main__":
    load = os.getloadavg()[0]
    ones, twos = zip(*[(timed(1), timed(2)) for _ in range(3)])
    (one, alone), (two, both) = (map(median, zip(*pairs)) for pairs in (ones, twos))
    print(results.save(results.record(
        study="throughput", name="sweep", method="sweep", task="arithmetic", scale="small",
        settings={"runs": len(TODO), "cores": os.cpu_count(), "load_before": round(load, 2)},
        data="0" * 16, seed=0, command="python benchmarks/sweep.py",
        metrics={"two_workers_over_one": round(one / two, 2),
                 "overhead_one_worker": round(alone, 4), "overhead_two_workers": round(both, 4)},
        seconds={"one_worker": one, "two_workers": two})))
