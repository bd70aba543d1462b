"""How long from a suspected model to a repaired one, here and on the authors' schedule?

    python benchmarks/repair.py [bedkd | dup] [--smoke]

Both schedules run on one victim with this package's code, one after the other in one process and
on one thread, and the record holds the quality of both beside the seconds. That flatters the
authors' schedule: their code asks the teacher at every step (BeDKD), takes two passes to detect
(DUP), and measures on test sets after each cycle or epoch, none of which is counted here.
The records go to data/results/throughput; `--smoke` tries all on few samples and records nothing.
Run nothing else on the machine meanwhile.
"""

import argparse
import math
import os
import warnings
from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import patch

import torch

from bdutils import set_seed
from bdutils.data import load_task
from bdutils.evaluation import evaluate, victim
from bdutils.experiments import results
from bdutils.experiments.variants import VARIANTS, changed
from bdutils.training import training_for

METHODS = {"bedkd": "bedkd-authors", "dup": "dup-authors"}
# What a smoke test changes; the authors' BeDKD goes through all batches in each cycle.
SHORT = {"bedkd": {"module__epochs": 1, "cycles": 1, "scan__alpha": 1.0, "scan__max_flagged": 40},
         "dup": {"unlearning__epochs": 1}}
FEW = {"train": 160, "clean": 80, "test": 40}


def blind(*given: object, **options: object) -> object:
    """Observe nothing, as the authors do: their number of cycles is fixed."""
    return lambda model: (math.nan,) * 3


def main(method: str, smoke: bool) -> dict:
    """Time both schedules of a method, measure what they made, and record it."""
    set_seed(0)
    task = load_task("sentiment", scale="small")
    if smoke:
        task = replace(task, **{name: getattr(task, name).stratified(n)
                                for name, n in FEW.items()})
    attacked = victim(task, "badnets", poison_rate=0.2, target_label=1,
                      training=training_for(task, **({"epochs": 1} if smoke else {})))
    clean = victim(task, None, training=attacked.training)
    before = evaluate(attacked.classifier, task, "badnets", clean_model=clean.classifier,
                      every_class=True)
    assert before.floor and before.clean_pacc
    metrics: dict = {"floor": before.floor, "clean_pacc": before.clean_pacc,
                     "cacc_before": before.cacc, "asr_before": before.asr}
    seconds: dict[str, float] = {}
    for who, name in (("ours", method), ("authors", METHODS[method])):
        defense = changed(VARIANTS[name], **(SHORT[method] if smoke else {}))
        with ExitStack() as stack:
            if name == "bedkd-authors":
                stack.enter_context(patch("bdutils.defenses.bedkd.observer", blind))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore" if smoke else "default")
            outcome = defense(attacked.context())
        after = evaluate(outcome.model, task, "badnets", every_class=True)
        seconds |= {f"{who}_{step}": value for step, value in outcome.seconds.items()}
        seconds[f"{who}_total"] = sum(outcome.seconds.values())
        metrics |= {f"{who}_{rate}": getattr(after, rate) for rate in ("cacc", "asr", "pacc")}
        print(method, who, outcome.verdict, f"{seconds[f'{who}_total']:.0f} s", after, flush=True)
    metrics["speedup"] = round(seconds["authors_total"] / seconds["ours_total"], 2)
    made = results.record(
        study="throughput", name=f"repair-{method}", method=method, task=task.name, scale="small",
        settings={"attack": "badnets", "poison_rate": 0.2, "threads": torch.get_num_threads()},
        data=task.fingerprint(), seed=0, command=f"python benchmarks/repair.py {method}",
        metrics=metrics, seconds=seconds)
    print(method, "speedup", metrics["speedup"], "" if smoke else results.save(made).name)
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", nargs="*", help="of bedkd and dup; both if left out")
    parser.add_argument("--smoke", action="store_true", help="few samples, no record")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["BDUTILS_QUIET"] = "1"
    for each in chosen.method or METHODS:
        main(each, chosen.smoke)
