"""What does each defense cost, beside the training of the model that it defends?

    python benchmarks/defenses.py [texts | pictures]

One after the other in one process and on one thread: a victim is trained, every defense is run
on it, and the plain and the defended model read the same rows. All times are processor time, so
that other programs count little, and all that is recorded are ratios of two times of this run.
The record goes to data/results/throughput.
"""

import os
import statistics
import sys
import time

import torch

from bdutils import set_seed
from bdutils.data import load_task
from bdutils.defenses.base import repair
from bdutils.evaluation import victim
from bdutils.experiments import results
from bdutils.experiments.variants import VARIANTS, case_of
from bdutils.training import settings_for, train, untrained

WHAT = {
    "texts": ("sentiment", "badnets", {"poison_rate": 0.2, "target_label": 1},
              ("bedkd", "dup", "tuning-text", "sam-text", "onion", "strip-text")),
    "pictures": ("images", "patch", {"poison_rate": 0.1, "target_label": 0},
                 ("ntml", "bedkd-pictures", "tuning", "pruning", "nad", "sam", "ibau", "strip")),
}
READ, REPEATS = 200, 3


def timed(do, *inputs) -> tuple:
    """Return what a call gives, and its processor time."""
    start = time.process_time()
    found = do(*inputs)
    return found, time.process_time() - start


def main(kind: str) -> dict:
    """Time the defenses for a kind of input and record the ratios."""
    torch.set_num_threads(1)
    os.environ["BDUTILS_QUIET"] = "1"
    set_seed(0)
    name, attack, how, defenses = WHAT[kind]
    task = load_task(name)
    settings = settings_for(task)
    attacked = victim(task, attack, settings=settings, **how)
    rows = task.test.take(range(READ))
    fresh = untrained(attacked.train, settings)
    _, training = timed(train, fresh, attacked.train, settings)

    def reading(model) -> float:
        return statistics.median(timed(model.predict, rows.texts)[1] for _ in range(REPEATS))

    ratios = {}
    for defense in (d for d in defenses if d in VARIANTS):
        found, purifying = timed(repair, VARIANTS[defense], case_of(attacked, VARIANTS[defense]))
        ratios[defense] = purifying / training
        # The plain model right beside, since the machine may be slower by now.
        plain = reading(attacked.classifier)
        ratios[f"{defense}_reading"] = reading(found.model) / plain
        print(defense, {k: round(v, 3) for k, v in ratios.items() if k.startswith(defense)},
              flush=True)
    made = results.record(
        study="throughput", name=f"defenses-{kind}", method="defenses", task=task.name,
        scale="small", settings={"attack": attack, "rows_read": READ, "repeats": REPEATS, **how},
        data=task.fingerprint(), seed=0, command=f"python benchmarks/defenses.py {kind}",
        metrics={k: round(v, 4) for k, v in ratios.items()},
        seconds={"training_processor_time": training})
    print(results.save(made).name)
    return made


if __name__ == "__main__":
    for each in sys.argv[1:] or WHAT:
        main(each)
