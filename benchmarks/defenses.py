"""What does each defense cost, beside the training of the model that it defends?

    python benchmarks/defenses.py [texts | texts-older | images]

One after the other in one process and on one thread: a victim is trained, every defense is run
on it, and the plain and the defended model predict the same samples. All times are processor
time, so that other programs count little, and all that is recorded are ratios of two times of
this run. The record goes to data/results/throughput.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable

import torch

from bdutils import set_seed
from bdutils.data import load_task
from bdutils.defenses.base import Predictor
from bdutils.evaluation import victim
from bdutils.experiments import results
from bdutils.experiments.variants import VARIANTS, context_for
from bdutils.training import train, training_for, untrained

WHAT = {
    "texts": ("sentiment", "badnets", {"poison_rate": 0.2, "target_label": 1},
              ("bedkd", "dup", "ft-text", "ft_sam-text", "onion", "strip-text")),
    "texts-older": ("sentiment", "badnets", {"poison_rate": 0.2, "target_label": 1},
                    ("cube", "ac", "spectral")),
    "images": ("images", "badnets", {"poison_rate": 0.1, "target_label": 0},
               ("ntml", "bedkd-images", "ft", "ft_sweep", "fp", "nad", "ft_sam", "ibau", "clp",
                "spectral", "ac", "abl", "strip")),
}
SAMPLES, REPEATS = 200, 3


def timed(do: Callable, *inputs: object) -> tuple:
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
    task = load_task(name, scale="small")
    training = training_for(task)
    attacked = victim(task, attack, training=training, **how)
    samples = task.test.take(range(SAMPLES))
    _, seconds = timed(train, untrained(attacked.train, training), attacked.train, training)

    def predicting(model: Predictor) -> float:
        return statistics.median(timed(model.predict, samples.inputs)[1] for _ in range(REPEATS))

    ratios = {}
    for defense in defenses:
        outcome, purifying = timed(VARIANTS[defense], context_for(attacked, VARIANTS[defense]))
        ratios[defense] = purifying / seconds
        # The plain model right beside, since the machine may be slower by now.
        plain = predicting(attacked.classifier)
        ratios[f"{defense}_reading"] = predicting(outcome.model) / plain
        print(defense, {k: round(v, 3) for k, v in ratios.items() if k.startswith(defense)},
              flush=True)
    made = results.record(
        study="throughput", name=f"defenses-{kind}", method="defenses", task=task.name,
        scale="small",
        settings={"attack": attack, "samples_read": SAMPLES, "repeats": REPEATS, **how},
        data=task.fingerprint(), seed=0, command=f"python benchmarks/defenses.py {kind}",
        metrics={k: round(v, 4) for k, v in ratios.items()},
        seconds={"training_processor_time": seconds})
    print(results.save(made).name)
    return made


if __name__ == "__main__":
    for each in sys.argv[1:] or WHAT:
        main(each)
