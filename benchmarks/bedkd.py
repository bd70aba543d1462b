"""How fast is BeDKD here, beside a direct reading of the authors' loop?

    python benchmarks/bedkd.py

Both take the same steps on the same batches, from the same weights, in turn in one process,
three times; the medians are compared and so are the purified models. The record goes to
data/results/throughput. Run nothing else on the machine meanwhile.
"""

import copy
import random
from dataclasses import replace
from statistics import median

import torch
import torch.nn.functional as F
from stopwatch import Stopwatch

from bdutils.attacks.text import TRIGGERS, triggered
from bdutils.data import load_task
from bdutils.defenses.bedkd import AUTHORS, BeDKDSettings, observer, purify
from bdutils.defenses.mapping import flip, mapping_module, prepare, scan, split_reserved
from bdutils.evaluation import victim
from bdutils.experiments import results
from bdutils.models.text import Classifier
from bdutils.roles import ReservedSet, TestSet, TrainingSet

RESERVED, SHARES = 400, AUTHORS.shares  # of each class: 80 and 320 rows
DMM_EPOCHS, CYCLES, PUNISHED, SCAN_CAP = 1, 2, 33, 128
TEST_ROWS, COMPARED, REPEATS = 1000, 64, 3
TARGET = 1  # of `victim`, which only the examiner knows
PHASES = ("module", "scan", "distillation", "evaluation")


def settings() -> BeDKDSettings:
    """Return the authors' settings, on a shorter schedule.

    Padding is masked in both loops, so that they differ in nothing but speed.
    """
    return replace(AUTHORS, seed=0, masked=True, shares=SHARES, dmm_epochs=DMM_EPOCHS,
                   cycles=CYCLES, punish_rows=PUNISHED, scan_cap=SCAN_CAP)


class Watch(Stopwatch):
    """What is told apart here."""

    phases = PHASES


def batches(rows, size: int, seed: int | None = None):
    """Yield texts and labels in the order of the file, or in that of `prepare`."""
    order = list(range(len(rows)))
    if seed is not None:
        order = random.Random(seed).sample(order, len(order))
    for start in range(0, len(order), size):
        part = rows.take(order[start:start + size])
        yield list(part.texts), torch.tensor(part.labels)


class DirectLoop:
    """What one writes from the paper: each batch is tokenized, and the teacher asked, anew."""

    def __init__(self, classifier: Classifier, chosen: BeDKDSettings) -> None:
        self.teacher, self.chosen = classifier.model, chosen
        self.tokenizer, self.max_length = classifier.tokenizer, classifier.max_length

    def tokens(self, texts: list[str]) -> dict:
        return self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt",
                              max_length=self.max_length).to(self.teacher.device)

    def distill(self, student, optimizer, rows, temperature: float, sign: int) -> None:
        """Make one pass over some rows."""
        student.train()
        for texts, labels in batches(rows, self.chosen.batch_size, self.chosen.seed):
            inputs = self.tokens(texts)
            with torch.no_grad():
                theirs = self.teacher(**inputs, output_hidden_states=True)
            ours = student(**inputs, output_hidden_states=True)
            ce = F.cross_entropy(ours.logits, labels.to(student.device))
            kl = F.kl_div(F.log_softmax(ours.logits / temperature, dim=1),
                          F.softmax(theirs.logits / temperature, dim=1), reduction="batchmean")
            square = (ours.hidden_states[-1] - theirs.hidden_states[-1]) ** 2
            mask = inputs["attention_mask"].unsqueeze(2)
            mse = ((square * mask).sum((1, 2)) / mask.sum((1, 2)) / square.shape[2]).mean()
            weight = self.chosen.ce_weight
            loss = sign * (weight * ce + (1 - weight) * (kl + mse))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def module(self, rows: ReservedSet):
        student = copy.deepcopy(self.teacher)
        optimizer = torch.optim.Adam(student.parameters(), lr=self.chosen.lr)
        for _ in range(self.chosen.dmm_epochs):
            self.distill(student, optimizer, rows, self.chosen.dmm_temperature, 1)
        return student.eval()

    @torch.no_grad()
    def scan(self, module, pool: TrainingSet) -> list[int]:
        flagged, agreed, row = [], [], 0
        for texts, labels in batches(pool, self.chosen.batch_size):
            inputs = self.tokens(texts)
            before, after = self.teacher(**inputs).logits, module(**inputs).logits
            gaps = (before.softmax(1) - after.softmax(1)).abs().mean(1)
            for delta, guess, label in zip(gaps, before.argmax(1), labels):
                if delta.item() < self.chosen.threshold:
                    flagged.append(row)
                    if guess.item() == label.item():
                        agreed.append(row)
                row += 1
                if len(flagged) == self.chosen.scan_cap:
                    return agreed
        return agreed

    @torch.no_grad()
    def hits(self, model, rows) -> float:
        model.eval()
        right = sum((model(**self.tokens(texts)).logits.argmax(1).cpu() == labels).sum().item()
                    for texts, labels in batches(rows, self.chosen.batch_size))
        return right / len(rows)

    def run(self, reserved: ReservedSet, pool: TrainingSet, tests: list[TestSet], watch: Watch):
        """Return the student, the punished rows and the last accuracies."""
        for_module, trust, _ = split_reserved(reserved, self.chosen)
        module = self.module(flip(for_module))
        watch.lap("module")
        suspects = self.scan(module, pool)[:self.chosen.punish_rows]
        watch.lap("scan")
        student, punish = copy.deepcopy(self.teacher), pool.take(suspects)
        optimizer = torch.optim.Adam(student.parameters(), lr=self.chosen.lr)
        for _ in range(self.chosen.cycles):
            self.distill(student, optimizer, trust, self.chosen.akd_temperature, 1)
            self.distill(student, optimizer, punish, self.chosen.akd_temperature, -1)
            watch.lap("distillation")
            measured = [self.hits(student, rows) for rows in tests]
            watch.lap("evaluation")
        return student.eval(), suspects, measured


def our_loop(classifier: Classifier, chosen: BeDKDSettings, reserved: ReservedSet,
             pool: TrainingSet, tests: list[TestSet], watch: Watch):
    """Do the same by the functions of chapters 5 and 6."""
    for_module, trust, held_out = split_reserved(reserved, chosen)
    steps = prepare(classifier, flip(for_module), chosen)
    module = replace(classifier, model=mapping_module(classifier.model, steps, chosen))
    watch.lap("module")
    rows = scan(classifier, module, pool, held_out, chosen).rows
    suspects, others = list(rows[:chosen.punish_rows]), list(rows[chosen.punish_rows:])
    watch.lap("scan")
    measured = []

    def examine(model, reading) -> None:
        watch.lap("distillation")
        student = replace(classifier, model=model)
        measured[:] = [sum(a == b for a, b in zip(student.predict(rows.texts), rows.labels))
                       / len(rows) for rows in tests]
        watch.lap("evaluation")

    student, _ = purify(classifier.model, prepare(classifier, trust, chosen),
                        prepare(classifier, pool.take(suspects), chosen),
                        observer(classifier, pool, others[:64] or suspects, held_out), chosen,
                        watch=examine)
    watch.lap("distillation")
    return student, suspects, measured


def main() -> dict:
    """Time both in turn, compare what they made, and record the medians."""
    task, chosen = load_task("sentiment", scale="small"), settings()
    attacked = victim(task, "badnets", poison_rate=0.2)
    classifier, pool = attacked.classifier, attacked.train
    reserved = task.reserved.take([i for k in range(task.reserved.num_labels) for i in
                                   [i for i, y in enumerate(task.reserved.labels) if y == k]
                                   [:RESERVED]])
    marked = triggered(task.test, TRIGGERS["badnets"], TARGET)
    # As the authors' file of triggered tests: every row carries the target label.
    marked = replace(marked, labels=(TARGET,) * len(marked))
    tests = [rows.take(range(min(TEST_ROWS, len(rows)))) for rows in (task.test, marked)]
    compared = list(task.test.texts[:COMPARED])
    before = copy.deepcopy(classifier.model.state_dict())

    def ours_with(chosen, tests, watch):
        return our_loop(classifier, chosen, reserved, pool, tests, watch)

    def direct_with(chosen, tests, watch):
        return DirectLoop(classifier, chosen).run(reserved, pool, tests, watch)

    loops = {"ours": ours_with, "direct": direct_with}
    short = replace(chosen, shares=(4 / RESERVED, 4 / RESERVED, 0.0), cycles=1, scan_cap=8)
    for run in loops.values():  # warm-up: the first optimizer of a process costs seconds
        run(short, [task.test.take(range(4))], Watch())

    seconds: dict[str, list[dict[str, float]]] = {"ours": [], "direct": []}
    difference = 0.0
    for _ in range(REPEATS):
        made = {}
        for name, run in loops.items():
            watch = Watch()
            made[name] = run(chosen, tests, watch)
            seconds[name].append({**watch.seconds, "total": sum(watch.seconds.values())})
        (ours, rows, shares), (theirs, their_rows, their_shares) = made["ours"], made["direct"]
        assert rows == their_rows, "the two scans found different rows"
        probabilities = [replace(classifier, model=model).logits(compared).softmax(1)
                         for model in (ours, theirs, classifier.model)]
        difference = max(difference, (probabilities[0] - probabilities[1]).abs().max().item())
        assert difference < 1e-4, f"the purified models differ by {difference:.1e}"
        moved = (probabilities[0] - probabilities[2]).abs().max().item()
        assert moved > 100 * difference, "nothing was learned, so nothing was compared"
        print(f"{len(rows)} rows punished, CACC and ASR {shares} and {their_shares}, "
              f"largest difference {difference:.1e}, largest change {moved:.2f}", flush=True)
    assert all(torch.equal(before[k], v) for k, v in classifier.model.state_dict().items())

    def speedup(*names: str, without: str = "") -> float:
        pairs = zip(seconds["direct"], seconds["ours"])
        return round(median(sum(d[n] for n in names) / sum(o[n] for n in names if n != without)
                            for d, o in pairs), 2)

    made = results.record(
        study="throughput", name="bedkd", method="bedkd", task="snippets", scale="small",
        settings={"reserved": RESERVED, "shares": list(SHARES), "dmm_epochs": DMM_EPOCHS,
                  "cycles": CYCLES, "punished": len(rows), "scan_cap": SCAN_CAP,
                  "test_rows": [len(part) for part in tests], "compared": COMPARED,
                  "repeats": REPEATS},
        data=task.fingerprint(), seed=chosen.seed, command="python benchmarks/bedkd.py",
        # The authors' loop looks at the test sets after each cycle; ours never has to.
        metrics={"speedup_over_direct_loop": speedup("total"),
                 "speedup_if_only_theirs_evaluates": speedup(*PHASES, without="evaluation"),
                 **{f"speedup_{name}": speedup(name) for name in PHASES},
                 "speedup_without_evaluation": speedup(*PHASES[:3]),
                 "largest_difference": difference, "largest_change": round(moved, 3)},
        seconds={f"{name}_{phase}": median(s[phase] for s in seconds[name])
                 for name in seconds for phase in ("total", *PHASES)})
    print(made["metrics"], made["seconds"], results.save(made).name)
    return made


if __name__ == "__main__":
    main()
