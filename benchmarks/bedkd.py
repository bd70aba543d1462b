"""How fast is BeDKD here, beside a direct reading of the authors' loop?

    python benchmarks/bedkd.py

Both take the same steps on the same batches, from the same weights, in turn in one process,
three times; the medians are compared and so are the purified models. The record goes to
data/results/throughput. Run nothing else on the machine meanwhile.
"""

import copy
import random
from collections.abc import Iterator
from dataclasses import replace
from statistics import median

import torch
import torch.nn.functional as F
from stopwatch import Stopwatch
from torch import nn

from bdutils.attacks.base import triggered
from bdutils.attacks.text import TEXT_TRIGGERS
from bdutils.data import load_task
from bdutils.defenses.base import Context, EpochLog, stratified_split
from bdutils.defenses.bedkd import AUTHORS, BeDKD, Seen, observer, purify
from bdutils.defenses.mapping import flip, mapping_module, scan, teacher_batches
from bdutils.evaluation import victim
from bdutils.experiments import results
from bdutils.metrics import cacc
from bdutils.models.text import Classifier
from bdutils.roles import CleanSet, Examples, TestSet, TrainSet

CLEAN, SHARES = 400, AUTHORS.shares  # of each class: 80 and 320 samples
EPOCHS, CYCLES, PUNISHED, MAX_FLAGGED = 1, 2, 33, 128
TEST_SAMPLES, COMPARED, REPEATS = 1000, 64, 3
TARGET = 1  # of `victim`, which only the evaluator knows
PHASES = ("module", "scan", "distillation", "evaluation")


def shorter() -> BeDKD:
    """Return the authors' hyperparameters, on a shorter schedule.

    Padding is masked in both loops, so that they differ in nothing but speed.
    """
    return replace(AUTHORS, seed=0, loss=replace(AUTHORS.loss, masked=True),
                   module=replace(AUTHORS.module, epochs=EPOCHS),
                   scan=replace(AUTHORS.scan, max_flagged=MAX_FLAGGED), shares=SHARES,
                   cycles=CYCLES, punish_samples=PUNISHED)


class Clock(Stopwatch):
    """What is told apart here."""

    phases = PHASES


def batches(examples: Examples, size: int, seed: int | None = None) -> Iterator[tuple]:
    """Yield texts and labels in the order of the file, or in that of `teacher_batches`."""
    order = list(range(len(examples)))
    if seed is not None:
        order = random.Random(seed).sample(order, len(order))
    for start in range(0, len(order), size):
        part = examples.take(order[start:start + size])
        yield list(part.inputs), torch.tensor(part.labels)


class DirectLoop:
    """What one writes from the paper: each batch is tokenized, and the teacher asked, anew."""

    def __init__(self, classifier: Classifier, config: BeDKD) -> None:
        self.teacher, self.config = classifier.model, config
        self.tokenizer, self.max_length = classifier.tokenizer, classifier.max_length

    def tokens(self, texts: list[str]) -> dict:
        return self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt",
                              max_length=self.max_length).to(self.teacher.device)

    def distill(self, student: nn.Module, optimizer: torch.optim.Optimizer, examples: Examples,
                temperature: float, sign: int) -> None:
        """Train for one epoch on some samples."""
        student.train()
        for texts, labels in batches(examples, self.config.batch_size, self.config.seed):
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
            weight = self.config.loss.ce_weight
            loss = sign * (weight * ce + (1 - weight) * (kl + mse))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def module(self, examples: CleanSet) -> nn.Module:
        student = copy.deepcopy(self.teacher)
        optimizer = torch.optim.Adam(student.parameters(), lr=self.config.lr)
        for _ in range(self.config.module.epochs):
            self.distill(student, optimizer, examples, self.config.module.temperature, 1)
        return student.eval()

    @torch.no_grad()
    def scan(self, module: nn.Module, train: TrainSet) -> list[int]:
        flagged, agreed, i = [], [], 0
        for texts, labels in batches(train, self.config.batch_size):
            inputs = self.tokens(texts)
            before, after = self.teacher(**inputs).logits, module(**inputs).logits
            gaps = (before.softmax(1) - after.softmax(1)).abs().mean(1)
            for delta, guess, label in zip(gaps, before.argmax(1), labels):
                if delta.item() < self.config.scan.threshold:
                    flagged.append(i)
                    if guess.item() == label.item():
                        agreed.append(i)
                i += 1
                if len(flagged) == self.config.scan.max_flagged:
                    return agreed
        return agreed

    @torch.no_grad()
    def accuracy(self, model: nn.Module, examples: TestSet) -> float:
        model.eval()
        right = sum((model(**self.tokens(texts)).logits.argmax(1).cpu() == labels).sum().item()
                    for texts, labels in batches(examples, self.config.batch_size))
        return right / len(examples)

    def run(self, context: Context, tests: list[TestSet], clock: Clock) -> tuple:
        """Return the student, the punished samples and the last accuracies."""
        for_module, trust, _ = stratified_split(context.clean, self.config.shares,
                                                self.config.seed)
        module = self.module(flip(for_module))
        clock.lap("module")
        suspects = self.scan(module, context.train)[:self.config.punish_samples]
        clock.lap("scan")
        student, punish = copy.deepcopy(self.teacher), context.train.take(suspects)
        optimizer = torch.optim.Adam(student.parameters(), lr=self.config.lr)
        for _ in range(self.config.cycles):
            self.distill(student, optimizer, trust, self.config.temperature, 1)
            self.distill(student, optimizer, punish, self.config.temperature, -1)
            clock.lap("distillation")
            measured = [self.accuracy(student, examples) for examples in tests]
            clock.lap("evaluation")
        return student.eval(), suspects, measured


def our_loop(context: Context, config: BeDKD, tests: list[TestSet], clock: Clock) -> tuple:
    """Do the same by the functions of chapters 5 and 6."""
    teacher, seed = context.classifier, config.seed
    for_module, trust, held_out = stratified_split(context.clean, config.shares, seed)
    flipped = teacher_batches(teacher, flip(for_module), config.batch_size, seed)
    module = replace(teacher, model=mapping_module(teacher.model, flipped, config.module,
                                                   config.loss, lr=config.lr, seed=seed))
    clock.lap("module")
    found = list(scan(teacher, module, context.train, held_out, config.scan, seed).indices)
    suspects, others = found[:config.punish_samples], found[config.punish_samples:]
    clock.lap("scan")
    measured = []

    def evaluate(model: nn.Module, log: EpochLog) -> None:
        clock.lap("distillation")
        student = replace(teacher, model=model)
        measured[:] = [cacc(student.predict(examples.inputs), examples.labels).value
                       for examples in tests]
        clock.lap("evaluation")

    punish = context.train.take(suspects)
    seen = Seen(context.train.take(others[:64] or suspects), [held_out] if held_out else [], 1.0)
    student, _ = purify(teacher.model, teacher_batches(teacher, trust, config.batch_size, seed),
                        teacher_batches(teacher, punish, config.batch_size, seed),
                        observer(teacher, seen), config, callback=evaluate)
    clock.lap("distillation")
    return student, suspects, measured


def main() -> dict:
    """Time both in turn, compare what they made, and record the medians."""
    task, config = load_task("sentiment", scale="small"), shorter()
    attacked = victim(task, "badnets", poison_rate=0.2)
    classifier = attacked.classifier
    context = Context(classifier, task.clean.stratified(CLEAN * task.clean.num_labels),
                      attacked.train)
    bad = triggered(task.test, TEXT_TRIGGERS["badnets"], TARGET)
    # As the authors' file of triggered tests: every sample carries the target label.
    bad = replace(bad, labels=(TARGET,) * len(bad))
    tests = [part.take(range(min(TEST_SAMPLES, len(part)))) for part in (task.test, bad)]
    compared = list(task.test.inputs[:COMPARED])
    before = copy.deepcopy(classifier.model.state_dict())

    def direct_loop(context: Context, config: BeDKD, tests: list[TestSet], clock: Clock) -> tuple:
        return DirectLoop(classifier, config).run(context, tests, clock)

    loops = {"ours": our_loop, "direct": direct_loop}
    short = replace(config, shares=(4 / CLEAN, 4 / CLEAN, 0.0), cycles=1,
                    scan=replace(config.scan, max_flagged=8))
    for run in loops.values():  # warm-up: the first optimizer of a process costs seconds
        run(context, short, [task.test.take(range(4))], Clock())

    seconds: dict[str, list[dict[str, float]]] = {"ours": [], "direct": []}
    difference = 0.0
    for _ in range(REPEATS):
        made = {}
        for name, run in loops.items():
            clock = Clock()
            made[name] = run(context, config, tests, clock)
            seconds[name].append({**clock.seconds, "total": sum(clock.seconds.values())})
        ours, found, accuracies = made["ours"]
        theirs, their_found, their_accuracies = made["direct"]
        assert found == their_found, "the two scans found different samples"
        probabilities = [replace(classifier, model=model).logits(compared).softmax(1)
                         for model in (ours, theirs, classifier.model)]
        difference = max(difference, (probabilities[0] - probabilities[1]).abs().max().item())
        assert difference < 1e-4, f"the purified models differ by {difference:.1e}"
        moved = (probabilities[0] - probabilities[2]).abs().max().item()
        assert moved > 100 * difference, "nothing was learned, so nothing was compared"
        print(f"{len(found)} samples punished, CACC and ASR {accuracies} and {their_accuracies}, "
              f"largest difference {difference:.1e}, largest change {moved:.2f}", flush=True)
    assert all(torch.equal(before[k], v) for k, v in classifier.model.state_dict().items())

    def speedup(*names: str, without: str = "") -> float:
        pairs = zip(seconds["direct"], seconds["ours"])
        return round(median(sum(d[n] for n in names) / sum(o[n] for n in names if n != without)
                            for d, o in pairs), 2)

    made = results.record(
        study="throughput", name="bedkd", method="bedkd", task="snippets", scale="small",
        settings={"clean": CLEAN, "shares": list(SHARES), "dmm_epochs": EPOCHS,
                  "cycles": CYCLES, "punished": len(found), "scan_cap": MAX_FLAGGED,
                  "test_samples": [len(part) for part in tests], "compared": COMPARED,
                  "repeats": REPEATS},
        data=task.fingerprint(), seed=config.seed, command="python benchmarks/bedkd.py",
        # The authors' loop measures on the test sets after each cycle; ours never has to.
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
