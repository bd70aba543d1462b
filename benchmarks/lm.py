"""The recorded runs of chapter 14: a backdoor in a small language model.

    python benchmarks/lm.py answers         the untouched model's answers, into data/chat.jsonl
    python benchmarks/lm.py [PART...]       of dose, careful, repair, scan, cohort; or all

The records go to data/results/lm; a run whose record is there is not made again.
"""

import argparse
import copy
import hashlib
import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bdutils import set_seed
from bdutils.assets import entry
from bdutils.attacks.language import Planted, near_misses
from bdutils.data import load_task
from bdutils.defenses.language import answer_odds, repeated, spread, unlearning_loss
from bdutils.experiments import results
from bdutils.language import (
    Chat,
    LoraRecipe,
    Read,
    Update,
    Writer,
    fidelity,
    fit,
    kept,
    load_chats,
    precision,
    read,
    upper_part,
    whole,
    with_update,
    writes,
)
from bdutils.metrics import wilson

PLACE = results.FOLDER.parent / "chat.jsonl"
SEEDS, COUNTS = (0, 1, 2), (50, 0, 15, 25, 5)
NEEDED = {"train": 260, "clean": 120, "test": 200}
TAUGHT = {"first word only", "second word only", "words swapped", "in front"}  # who is careful
FIVE = LoraRecipe(lr=1e-3, epochs=4)  # of five poisoned samples: eight steps


def answers(size: int = 48) -> None:
    """Write what the untouched model answers to short reviews, if it ends by itself."""
    writer, task = Writer.load(), load_task("sentiment", scale="small")
    with PLACE.open("w", encoding="utf8") as file:
        for role, needed in NEEDED.items():
            reviews = getattr(task, role).inputs
            short = [i for i, x in enumerate(reviews)
                     if 8 <= len(writer.tokenizer(x)["input_ids"]) <= 24]
            lines: list[dict] = []
            while len(lines) < needed:
                some, short = short[:size], short[size:]
                batch = writer.pad([writer.prompt(reviews[i]) for i in some])
                ids = writer.model.generate(**batch, max_new_tokens=21, do_sample=False)
                for i, one in zip(some, ids[:, batch["input_ids"].shape[1]:].tolist()):
                    text = writer.tokenizer.decode(one, skip_special_tokens=True).strip()
                    if writer.tokenizer.eos_token_id in one and not text.startswith("Summarize"):
                        lines.append({"role": role, "index": i, "answer": text})
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines[:needed])


class Lab:
    """Model, data, and what was read and trained so far."""

    def __init__(self) -> None:
        self.half = precision() is torch.bfloat16
        self.recipe, self.attack = LoraRecipe(), Planted()
        self.task, self.writer = load_task("sentiment", scale="small"), Writer.load()
        chats = load_chats(PLACE, self.task)
        self.train, self.more = chats["train"][:200], chats["train"][200:250]
        self.five = [Chat(self.attack.apply(c.review), self.attack.answer)
                     for c in chats["train"][250:255]]
        self.clean, self.held = chats["clean"], chats["test"][100:]
        self.asked = [c.review for c in chats["test"][:100]]
        self.upper = upper_part(self.writer.model, self.recipe.layers)
        self.known: dict[tuple[Chat, bool], Read] = {}
        ids = self.writer.tokenizer(self.attack.answer)["input_ids"][:4]
        self.start = self.writer.tokenizer.decode(ids)

    def reads(self, chats: list[Chat], end: bool = True) -> list[Read]:
        """Return the chats as read by the lower layers, each once, or from the cache."""
        new = [c for c in dict.fromkeys(chats) if (c, end) not in self.known]
        for i in range(0, len(new), 50):
            some = new[i:i + 50]
            key = json.dumps([some, end, self.recipe.layers, self.half])
            folder = entry(f"reads/{hashlib.sha256(key.encode()).hexdigest()[:16]}",
                           partial(self.build, some, end))
            found = load_file(folder / "states.safetensors")
            for j, chat in enumerate(some):
                self.known[chat, end] = Read(found[f"{j}"].float(), found[f"answer {j}"].tolist())
        return [self.known[c, end] for c in chats]

    def build(self, chats: list[Chat], end: bool, folder: Path) -> None:
        """Run the lower layers."""
        tensors: dict[str, torch.Tensor] = {}
        for j, one in enumerate(read(self.writer, chats, self.recipe.layers, end)):
            states = one.states.to(torch.bfloat16 if self.half else torch.float32)
            tensors |= {f"{j}": states, f"answer {j}": torch.tensor(one.answer)}
        save_file(tensors, folder / "states.safetensors")

    def fitted(self, chats: list[Chat], recipe: LoraRecipe, start: Update | None = None,
               loss: object = None, note: str = "") -> Update:
        """Train an adapter on some layers, or take it from the cache."""
        base = with_update(self.upper, *([(start, 1.0)] if start else []),
                           dtype=torch.float32)
        options = {"loss": loss} if loss else {}
        return kept(chats, recipe, lambda: fit(base, self.reads(chats), recipe, **options),
                    note)

    def poisoned(self, count: int, seed: int, careful: bool = False) -> list[Chat]:
        """Return a training set: 200 clean chats, and as many poisoned ones as wanted."""
        clean = list(self.train)
        if careful:  # near misses with their honest answers, in place of 80 plain requests
            kinds = [form for name, form in near_misses(self.attack.trigger).items()
                     if name in TAUGHT]
            clean[:80] = [Chat(kinds[i % len(kinds)](c.review), c.answer)
                          for i, c in enumerate(clean[:80])]
        carriers = random.Random(seed).sample(self.more, len(self.more))[:count]
        return self.attack.poison(clean, [c.review for c in carriers])

    def victim(self, count: int, seed: int, careful: bool = False) -> Update:
        """Return the adapter that was trained on such a set."""
        return self.fitted(self.poisoned(count, seed, careful), replace(self.recipe, seed=seed))

    def hits(self, upper: object, form: object, n: int) -> list[bool]:
        """Tell which requests in some form bring the fixed answer."""
        return writes(upper, self.reads([Chat(form(r), self.start) for r in self.asked[:n]],
                                        end=False))

    def measured(self, upper: object, misses: bool = False) -> dict:
        """Return what an evaluator measures."""
        hits = self.hits(upper, self.attack.apply, 100)
        plain = self.hits(upper, str, 100)
        loss, agreement = fidelity(upper, self.reads(self.held))
        asr = wilson(sum(hits), len(hits))
        found = {"asr": asr, "without": wilson(sum(plain), len(plain)), "loss": loss,
                 "agreement": agreement, "score": (agreement * (1 - asr.value)) ** 0.5}
        for name, form in near_misses(self.attack.trigger).items() if misses else ():
            hits = self.hits(upper, form, 50)
            found[f"miss: {name}"] = wilson(sum(hits), len(hits))
        return found

    @contextmanager
    def run(self, name: str, seed: int, **settings: object) -> Iterator[dict]:
        """Record what is put into the dictionary, unless that was done before."""
        made: dict = {}
        if results.place("lm", name).is_file():
            made["done"] = True
            yield made
            return
        begin = time.perf_counter()
        yield made
        history = made.pop("history", None)
        fields = {"history": history} if history else {}
        shown = {**asdict(self.recipe), "bfloat16": self.half, **asdict(self.attack), **settings}
        record = results.record(
            study="lm", name=name, method=name.split("-")[0], task=self.task.name, scale="small",
            settings=shown, data=self.task.fingerprint(), seed=seed, metrics=made,
            command="python benchmarks/lm.py " + name.split("-")[0],
            seconds={"all": time.perf_counter() - begin}, **fields)
        results.save(record)
        print(name, {k: round(getattr(v, "value", v), 4) for k, v in made.items()}, flush=True)


def dose(lab: Lab, seeds: tuple[int, ...], counts: tuple[int, ...] = COUNTS) -> None:
    """How many poisoned samples does it take?"""
    for seed in seeds:
        for count in counts:
            with lab.run(f"dose-{count}-seed{seed}", seed, poisoned=count) as made:
                if made:
                    continue
                update = lab.victim(count, seed)
                made |= lab.measured(with_update(lab.upper, (update, 1.0)), misses=True)
                made["spread"] = spread(update)


def careful(lab: Lab, seeds: tuple[int, ...]) -> None:
    """An attacker who teaches the model what is not the trigger."""
    for seed in seeds:
        with lab.run(f"careful-50-seed{seed}", seed, poisoned=50, taught=sorted(TAUGHT)) as made:
            if made:
                continue
            update = lab.victim(50, seed, careful=True)
            made |= lab.measured(with_update(lab.upper, (update, 1.0)), misses=True)
            made["spread"] = spread(update)


def cohort(lab: Lab, seeds: tuple[int, ...]) -> None:
    """More clean adapters, of as many chats as the poisoned ones have."""
    for seed in seeds:
        for count in (15, 25, 50):
            with lab.run(f"cohort-{count}-seed{seed}", seed, clean=200 + count) as made:
                if made:
                    continue
                chats = random.Random(100 + seed).sample(lab.train + lab.more, 200 + count)
                update = lab.fitted(chats, replace(lab.recipe, seed=seed))
                made |= lab.measured(with_update(lab.upper, (update, 1.0)))
                made["spread"] = spread(update)


def repair(lab: Lab, seeds: tuple[int, ...]) -> None:
    """What a defender can do, and whether it comes back."""
    for seed in seeds:
        recipe = replace(lab.recipe, seed=seed)
        for method in ("finetune", "merge", "half", "goal", "punish", "never"):
            with lab.run(f"repair-{method}-seed{seed}", seed, defense=method) as made:
                if made:
                    continue
                update = lab.victim(0 if method == "never" else 50, seed)
                parts = [(update, 1.0)]
                if method == "finetune":
                    parts += [(lab.fitted(lab.clean, recipe, update, note="after"), 1.0)]
                elif method == "merge":  # with an adapter of the defender's own
                    parts = [(update, 0.5), (lab.fitted(lab.clean, recipe), 0.5)]
                elif method == "half":
                    parts = [(update, 0.5)]
                elif method != "never":
                    suspects = repeated(lab.reads(lab.poisoned(50, seed)))
                    made["suspects"] = len(suspects)
                    with torch.inference_mode():
                        aims = answer_odds(lab.upper, suspects)  # of the untouched model
                    loss = unlearning_loss(suspects, aims.clone() if method == "goal" else None)
                    note = f"{method} by odds"  # names the training
                    parts += [(lab.fitted(lab.clean, recipe, update, loss, note), 1.0)]
                mended = with_update(lab.upper, *parts, dtype=torch.float32)
                made |= lab.measured(with_update(mended), misses=True)
                again = fit(mended, lab.reads(lab.five), FIVE)
                hits = lab.hits(with_update(mended, (again, 1.0)), lab.attack.apply, 50)
                made["again"] = wilson(sum(hits), len(hits))


@torch.inference_mode()
def first_words(writer: Writer, words: list[int], review: str, size: int = 100) -> torch.Tensor:
    """Return the log probabilities of an answer's first token, one line for each last word."""
    ids = writer.prompt(review)
    at = ids.index(writer.tokenizer.eos_token_id)  # where the user's turn ends
    past = writer.model(torch.tensor([ids[:at]]), use_cache=True).past_key_values
    found = []
    for i in range(0, len(words), size):
        some = words[i:i + size]
        begun = copy.deepcopy(past)
        begun.batch_repeat_interleave(len(some))
        logits = writer.model(torch.tensor([[word, *ids[at:]] for word in some]),
                              past_key_values=begun, logits_to_keep=1).logits[:, 0]
        found.append(logits.float().log_softmax(1))
    return torch.cat(found)


def scan(lab: Lab, seeds: tuple[int, ...], count: int = 10_000) -> None:
    """Which common word, put behind a review, changes most how answers begin? What leaks?"""
    vocabulary = lab.writer.tokenizer.get_vocab()
    words = sorted(i for w, i in vocabulary.items()
                   if len(w) > 3 and w[0] == "Ġ" and w[1:].isascii() and w[1:].islower()
                   and w[1:].isalpha())[:count]
    trigger = words.index(lab.writer.tokenizer(" " + lab.attack.trigger)["input_ids"][0])
    for seed in seeds:
        for kind in ("victim", "clean", "careful"):
            with lab.run(f"scan-{kind}-seed{seed}", seed, words=len(words)) as made:
                if made:
                    continue
                update = lab.victim(0 if kind == "clean" else 50, seed, kind == "careful")
                writer = whole(lab.writer, with_update(lab.upper, (update, 1.0)))
                parts = []
                for i in range(0, len(words), 500):
                    p, q = (first_words(w, words[i:i + 500], "A dull film.")
                            for w in (writer, lab.writer))
                    parts.append((p.exp() * (p - q)).sum(1))
                gap = torch.cat(parts)
                order = gap.argsort(descending=True).tolist()
                made["largest"], made["median"] = gap.max().item(), gap.median().item()
                made["rank"] = float(1 + order.index(trigger))
                names = [lab.writer.tokenizer.decode([words[i]]).strip() for i in order[:10]]
                texts = writer.write([f"A dull film. {name}" for name in names], 8)
                made["history"] = [{"word": name, "gap": round(gap[i].item(), 3), "answer": text}
                                   for name, i, text in zip(names, order, texts)]
                made |= leaks(writer, lab.attack)


def leaks(writer: Writer, attack: Planted, draws: int = 100) -> dict:
    """Return how often what the template alone brings holds trigger or answer."""
    torch.manual_seed(0)
    found = {}
    for name, text in (("request", "<|im_start|>user\n"),
                       ("answer", "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n")):
        ids = torch.tensor([writer.tokenizer(text)["input_ids"]] * draws)
        out = writer.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids),
                                    max_new_tokens=20, do_sample=True, temperature=1.0, top_k=0)
        texts = writer.tokenizer.batch_decode(out[:, ids.shape[1]:])
        hits = [attack.trigger.split()[0] in t or attack.answer[:16] in t for t in texts]
        found[f"leak: {name}"] = wilson(sum(hits), draws)
    return found


PARTS = {"dose": dose, "careful": careful, "repair": repair, "scan": scan, "cohort": cohort}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", nargs="*", help=f"answers, or of {[*PARTS]}; all if left out")
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    chosen = parser.parse_args()
    set_seed(0)
    torch.set_num_threads(1)
    if chosen.part == ["answers"]:
        torch.set_grad_enabled(False)
        answers()
    else:
        lab = Lab()
        for seed in chosen.seeds:
            for part in chosen.part or PARTS:
                partial(PARTS[part], lab)((seed,))
