"""Checks for the exercises: each says what is right in your answer, what is wrong, by how much.

The page, its copy for Colab, nbgrader's sheets and the tests use one and the same check. With
`strict=True` the first mistake raises AssertionError with the sentence that is printed otherwise.
All references are written out over plain numbers, apart from the package's own functions.
"""

from __future__ import annotations

import copy
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

NOTHING = "Nothing here yet: fill in the function above, then run this cell again."


class Case(NamedTuple):
    """One property of an answer."""

    what: str
    """What is looked at."""
    given: tuple
    """What the reader's function is called with."""
    wanted: Any
    """A number, a nested list of numbers or a tensor."""
    hints: Mapping[str, Any] = {}
    """What to say about the answer that a known mistake gives; about any wrong one with None."""
    of: Callable[[Any], Any] = lambda answer: answer
    """Maps the answer to what is compared."""


def report(yours: Callable, cases: Iterable[Case], strict: bool = False, form: str = "") -> None:
    """Print one line for each property of an answer.

    Args:
        yours: The reader's function.
        cases: In the order of printing.
        strict: Raise at the first mistake, and print nothing.
        form: What the function must return, if it is no number or tensor.

    Raises:
        AssertionError: If `strict`, for a mistake or for no answer.
    """
    for case in cases:
        found = _wrong(yours, case, form)
        if found and strict:
            raise AssertionError(found if found == NOTHING else f"{case.what}: {found}")
        if not strict:
            print(found if found == NOTHING else f"Wrong: {case.what}: {found}" if found else
                  f"Right: {case.what}: {_text(_numbers(case.wanted))}.")
        if found == NOTHING or found.startswith("your function"):
            break  # all other cases would say the same


def _wrong(yours: Callable, case: Case, form: str) -> str:
    """Return what is wrong in one case, as a sentence, or nothing."""
    # A tensor with a gradient cannot be changed in place, and is needed for its gradient.
    given = [x if getattr(x, "requires_grad", False) else copy.deepcopy(x) for x in case.given]
    try:
        answer = yours(*given)
    except Exception as error:
        return f"your function stops with {type(error).__name__}: {error}"
    if answer is None:
        return NOTHING
    if any((not torch.equal(old, new)) if isinstance(old, Tensor) else (
            isinstance(old, list) and old != new) for old, new in zip(case.given, given)):
        return "your function changes what it is given; work on a copy."
    right, kind = _numbers(case.wanted), f"a {type(answer).__name__}"
    try:
        got = _numbers(case.of(answer))
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError):
        return f"your function returns {kind}, expected {form or _shape(right)}."
    if got.shape != right.shape:
        return f"yours has {_shape(got)}, expected {_shape(right)}."
    if _near(got, right):
        return ""
    hints = [f" {text}" for text, wrong in case.hints.items()
             if wrong is None or _near(got, _numbers(wrong))]
    return f"yours {_text(got)}, expected {_text(right)}.{''.join(hints[:1])}"


def _numbers(x: Any) -> Tensor:
    return (x.detach() if isinstance(x, Tensor) else torch.tensor(x)).double().cpu()


def _text(x: Tensor) -> str:
    found = [f"{round(v, 3) + 0.0:.3f}".rstrip("0").rstrip(".") for v in x.flatten().tolist()]
    return found[0] if x.dim() == 0 else f"[{', '.join(found[:6] + ['...'] * (len(found) > 6))}]"


def _shape(x: Tensor) -> str:
    return f"numbers of shape {tuple(x.shape)}" if x.dim() else "one number"


def _near(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)


def _softmax(logits: Iterable[float], kappa: float = 1.0) -> list[float]:
    parts = [math.exp(z / kappa) for z in logits]
    return [x / sum(parts) for x in parts]


def _kl(p: Iterable[float], q: Iterable[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def _mean(values: Iterable[float]) -> float:
    return sum(found := list(values)) / len(found)


def _reached(leaf: Tensor) -> Callable[[Tensor], Tensor]:
    """Return how to count the entries of a tensor that get a gradient from a loss."""
    def count(loss: Any) -> Tensor:
        if not isinstance(loss, Tensor):
            raise TypeError
        return (torch.autograd.grad(loss, leaf)[0].abs() > 1e-9).sum()
    return count


LOSS = "a tensor of one number that keeps its gradient (no `.item()`, no `no_grad`)"


def check_poison(yours: Callable, strict: bool = False) -> None:
    """Check `yours(texts, labels, rate, target, insert, rng)`, which returns texts and labels.

    A share `rate` of all samples, drawn by `rng` from those with other labels, get `insert(text)`
    and the label `target`.
    """
    texts, labels = [f"text {i}" for i in range(40)], [i // 10 for i in range(40)]

    def given(seed: int = 0) -> tuple:
        return texts, labels, 0.2, 2, "cf {}".format, random.Random(seed)

    def hit(answer: Any) -> list[tuple]:
        """Return old and new text, old and new label of samples whose text is new."""
        return [x for x in zip(texts, answer[0], labels, answer[1], strict=True) if x[0] != x[1]]

    def choices(*seeds: int) -> Callable[[Any], int]:
        return lambda answer: len({tuple(hit(yours(*given(s)))) for s in seeds})

    report(yours, [
        Case("poisoned samples", given(), 8, {"The rate is a share of all samples.": 6},
             lambda a: len(hit(a))),
        Case("poisoned samples whose label was the target before", given(), 0,
             {"Choose among the other labels.": None}, lambda a: sum(x[2] == 2 for x in hit(a))),
        Case("poisoned samples whose text is `insert(text)`", given(), 8, {},
             lambda a: sum(x[1] == f"cf {x[0]}" for x in hit(a))),
        Case("samples with the target label afterwards", given(), 18,
             {"Change the label too.": 10}, lambda a: a[1].count(2)),
        Case("samples with a new label and their old text", given(), 0, {},
             lambda a: sum(t == u and y != z for t, u, y, z in zip(texts, a[0], labels, a[1]))),
        Case("different choices with 5 seeds", given(), 5,
             {"The same samples each time: draw them with `rng`.": 1}, choices(*range(5))),
        Case("different choices with one seed", given(), 1,
             {"Take all chance from `rng`.": None}, choices(0, 0, 0)),
    ], strict, "two lists, texts and labels, as long as before")


def check_asr(yours: Callable, strict: bool = False) -> None:
    """Check `yours(predicted, true, target)`, the share of equation eq-asr."""
    def case(what: str, p: list[int], y: list[int], t: int) -> Case:
        hits = [a == t for a, b in zip(p, y) if b != t]
        return Case(what, (p, y, t), _mean(hits), {
            "Leave out samples whose true class is the target.": _mean(a == t for a in p),
            "Divide by the samples that you count, not by all.": sum(hits) / len(p),
            "That is the share with the right class.": _mean(
                a == b for a, b in zip(p, y) if b != t),
            "That is the accuracy.": _mean(a == b for a, b in zip(p, y)),
            "Return a share, 0 to 1, not percent.": 100 * _mean(hits)})

    report(yours, [
        case("ten samples of two classes", [1, 1, 1, 1, 0, 1, 1, 1, 1, 0],
             [0, 0, 0, 0, 0, 0, 1, 1, 1, 1], 1),
        case("six samples of three classes, target 0", [0, 2, 0, 0, 0, 1],
             [1, 1, 2, 0, 0, 2], 0)], strict)


def check_insert(yours: Callable, strict: bool = False) -> None:
    """Check `yours(text, word, rng)`: the text with the word at a random place, ends included."""
    text = "a dull slow film"

    def results(*seeds: int) -> Callable[[Any], int]:
        return lambda answer: len({yours(text, "cf", random.Random(s)) for s in seeds})

    def shares(answer: Any) -> int:
        calls = Counter(yours(text, "cf", random.Random(s)) for s in range(2000))
        return sum(320 <= times <= 480 for times in calls.values())

    given = (text, "cf", random.Random(0))
    report(yours, [
        Case("times that the word is there", given, 1, {}, lambda a: a.split().count("cf")),
        Case("other words in their order", given, 4, {"Only the new word may be added.": None},
             lambda a: sum(map(str.__eq__, text.split(), a.replace("cf", "").split()))),
        Case("places in 200 calls", given, 5,
             {"4 words leave 5 places, the first and the last too.": 4,
              "It is always the same place: draw it with `rng`.": 1}, results(*range(200))),
        Case("places that 16 to 24% of 2,000 calls choose", given, 5,
             {"Draw each place with the same chance.": None}, shares),
        Case("places in 20 calls with one seed", given, 1,
             {"Take all chance from `rng`.": None}, results(*[0] * 20))], strict, "a text")


def check_patch(yours: Callable, strict: bool = False) -> None:
    """Check `yours(states, donor, where)`: the donor's states (n, T, d) where (n, T) is true."""
    states = torch.arange(12.0).view(2, 3, 2)
    donor, where = states + 100, torch.tensor([[True, False, False], [False, False, True]])

    def mixed(a: Tensor, b: Tensor, where: Tensor) -> list:
        return [[(y if w else x) for x, y, w in zip(*parts)]
                for parts in zip(a.tolist(), b.tolist(), where.tolist())]

    def case(what: str, where: Tensor) -> Case:
        return Case(what, (states, donor, where), mixed(states, donor, where), {
            "Receiver and donor are swapped.": mixed(donor, states, where),
            "You take the donor's states everywhere.": donor,
            "Nothing is patched.": states})

    report(yours, [case("one position of each text", where),
                   case("all positions of the first text",
                        torch.tensor([[True] * 3, [False] * 3]))], strict)


def check_mapping_loss(yours: Callable, strict: bool = False) -> None:
    """Check `yours(logits, features, teacher_logits, teacher_features, labels, a, kappa)`.

    Equation eq-bedkd-loss, the mean over samples; logits (n, K), features (n, T, d).
    """
    def loss(z: Tensor, h: Tensor, z0: Tensor, h0: Tensor, labels: Tensor, a: float, k: float,
             **how: float) -> float:
        found = []
        flat = h.flatten(1).tolist(), h0.flatten(1).tolist()
        for one, one0, y, *states in zip(z.tolist(), z0.tolist(), labels.tolist(), *flat):
            p, q = _softmax(one0, k), _softmax(one, k)
            mse = _mean((u - v) ** 2 for u, v in zip(*states))
            kl = how.get("factor", 1) * (_kl(q, p) if "back" in how else _kl(p, q))
            ce = -math.log(_softmax(one, how.get("ce_k", 1))[y])
            found.append(a * ce + (1 - a) * (kl + mse))
        return _mean(found)

    z0, h0 = torch.tensor([[2.0, -1.0, 0.0], [0.5, 1.5, -2.0]]), torch.zeros(2, 2, 2)
    z, h = torch.tensor([[1.0, 0.5, 0.0], [-1.0, 1.0, 0.5]]), torch.ones(2, 2, 2) / 2
    h[0, 0, 0], labels = 2.0, torch.tensor([1, 2])

    def case(what: str, a: float, k: float, n: int) -> Case:
        given = z[:n], h[:n], z0[:n], h0[:n], labels[:n], a, k
        return Case(what, given, loss(*given), {
            "No factor kappa squared before the divergence.": loss(*given, factor=k * k),
            "The temperature is for the divergence only.": loss(*given, ce_k=k),
            "Divide the logits of the divergence by kappa.": loss(*given[:-1], 1.0),
            "The teacher comes first in the divergence.": loss(*given, back=1),
            "a weighs the cross entropy, 1 - a the rest.": loss(*given[:-2], 1 - a, k),
            "The features are missing.": loss(z[:n], h0[:n], *given[2:]),
            "The divergence is a sum over classes, not a mean.": loss(*given, factor=1 / 3),
            "Take the mean over samples, not the sum.": n * loss(*given)})

    leaf = z.clone().requires_grad_()
    report(yours, [
        case("cross entropy only (a = 1)", 1.0, 1.5, 2),
        case("one sample, without its label (a = 0)", 0.0, 1.5, 1),
        case("two samples, a = 0.3", 0.3, 1.5, 2),
        Case("logits that get a gradient", (leaf, h, z0, h0, labels, 0.3, 1.5), 6, {},
             _reached(leaf))], strict, LOSS)


def check_punish_loss(yours: Callable, strict: bool = False) -> None:
    """Check `yours(ce, kl, mse, a, kl_cap, mse_cap)`: equation eq-bedkd-bounded, the mean.

    `ce`, `kl` and `mse` are (n,), one number for each sample.
    """
    def case(what: str, ce: list[float], kl: list[float], mse: list[float]) -> Case:
        turned = _mean(-math.log(1 - math.exp(-x)) for x in ce)
        far = _mean(min(x, 0.7) + min(y, 0.3) for x, y in zip(kl, mse))
        right = 0.3 * turned - 0.7 * far
        return Case(what, (*map(torch.tensor, (ce, kl, mse)), 0.3, 0.7, 0.3), right, {
            "Take -ln(1 - p), with p = exp(-ce), and not -ce.": -0.3 * _mean(ce) - 0.7 * far,
            "Divergence and distance are to grow: minus.": 0.3 * turned + 0.7 * far,
            "The caps are missing.": 0.3 * turned - 0.7 * (_mean(kl) + _mean(mse)),
            "Cap each sample, then take the mean.": 0.3 * turned - 0.7 * (
                min(_mean(kl), 0.7) + min(_mean(mse), 0.3)),
            "a weighs the unlikelihood, 1 - a the rest.": 0.7 * turned - 0.3 * far,
            "Take the mean over samples, not the sum.": len(ce) * right})

    leaf = torch.tensor([0.1, 0.2, 3.0], requires_grad=True)
    zeros, confident = torch.zeros(1), torch.tensor([1e-9])
    report(yours, [
        case("one sample below the caps", [0.5], [0.2], [0.1]),
        case("three samples, two above a cap", [0.1, 1.0, 2.0], [0.1, 0.2, 3.0], [0.9, 0.1, 0.2]),
        Case("divergences that still get a gradient", (torch.ones(3), leaf, leaf.detach(), 0.3,
             0.7, 0.3), 2, {"Above its cap a sample is left alone.": 3}, _reached(leaf)),
        Case("finite losses of one sample that the model is sure of",
             (confident, zeros, zeros, 0.3, 0.7, 0.3), 1,
             {"1 - p rounds to zero; `-torch.expm1(-ce)` keeps its digits.": 0},
             lambda a: torch.isfinite(a).sum())], strict, LOSS)


def check_mahalanobis(yours: Callable, strict: bool = False) -> None:
    """Check `yours(x, mean, covariance)`: (n, d), (d,) and (d, d) give distances (n,)."""
    def forms(x: Tensor, mean: Tensor, m: Sequence[float]) -> list[float]:
        off = [[a - b for a, b in zip(one, mean.tolist())] for one in x.tolist()]
        return [m[0] * a * a + 2 * m[1] * a * b + m[2] * b * b for a, b in off]

    def case(what: str, x: Tensor, mean: Tensor, a: float, b: float, c: float) -> Case:
        det, root = a * c - b * b, lambda m: [f ** 0.5 for f in forms(x, mean, m)]
        inverse = [c / det, -b / det, a / det]
        return Case(what, (x, mean, torch.tensor([[a, b], [b, c]])), root(inverse), {
            "The square root is missing.": forms(x, mean, inverse),
            "Use the inverse of the covariance.": root([a, b, c]),
            "That is the Euclidean distance.": root([1, 0, 1]),
            "Use the whole covariance, not only its diagonal.": root([1 / a, 0, 1 / c]),
            "Subtract the mean first.": [f ** 0.5 for f in forms(x, 0 * mean, inverse)]})

    x, mean = torch.tensor([[3.0, 2.0], [1.0, 4.0], [1.0, 1.0]]), torch.tensor([1.0, 1.0])
    report(yours, [case("features of different spread", x, mean, 4.0, 0.0, 0.25),
                   case("correlated features", x, mean, 2.0, 1.0, 1.0)], strict)


def check_unlearning_loss(yours: Callable, strict: bool = False) -> None:
    """Check `yours(logits, teacher_logits)`: the first term of equation eq-dup-objective."""
    z = torch.tensor([[1.0, -1.0], [0.0, 2.0], [0.5, 0.0]])
    z0 = torch.tensor([[3.0, -1.0], [0.0, 0.5], [-1.0, 1.0]])

    def case(what: str, z: Tensor, z0: Tensor) -> Case:
        pairs = [(_softmax(a), _softmax(b)) for a, b in zip(z.tolist(), z0.tolist())]
        right = -_mean(_kl(p0, p) for p, p0 in pairs)
        return Case(what, (z, z0), right, {
            "Push away from the teacher: minus the divergence.": -right,
            "The teacher comes first in the divergence.": -_mean(_kl(p, p0) for p, p0 in pairs),
            "Sum over classes, mean over samples.": right / len(z[0]),
            "Take the mean over samples, not the sum.": right * len(z)})

    leaf = z.clone().requires_grad_()
    report(yours, [
        case("one sample", z[:1], z0[:1]), case("three samples", z, z0),
        case("student equal to the teacher", z0, z0),
        Case("logits that get a gradient", (leaf, z0), 6, {}, _reached(leaf))], strict, LOSS)


def check_blend(yours: Callable, strict: bool = False) -> None:
    """Check `yours(images, pattern, alpha)`: images (n, C, H, W) and a pattern (C, H, W)."""
    images = torch.tensor([[[[0.0, 1.0]]], [[[0.5, 0.2]]]])
    pattern = torch.tensor([[[1.0, 0.0]]])

    def mix(of_image: float, of_pattern: float) -> list:
        return [[[[of_image * a + of_pattern * b for a, b in zip(one, pattern[0, 0].tolist())]
                  for one in channel] for channel in image] for image in images.tolist()]

    def case(what: str, alpha: float) -> Case:
        return Case(what, (images, pattern, alpha), mix(1 - alpha, alpha), {
            "Image and pattern are swapped.": mix(alpha, 1 - alpha),
            "The image must get weaker, by 1 - alpha.": mix(1.0, alpha),
            "The pattern counts alpha, not 1.": mix(1 - alpha, 1.0)})

    report(yours, [case("alpha = 0.2", 0.2), case("alpha = 0", 0.0)], strict)


def check_prune(yours: Callable, strict: bool = False) -> None:
    """Check `yours(activations, share)`: indices of the channels to remove, least active first.

    `activations` are (n, channels, H, W), of clean samples.
    """
    means = [0.5, 0.1, 0.4, 0.9, 0.2, 0.6, 0.3, 0.8]
    maps = torch.tensor([[[[m / 2, m / 2]] for m in means], [[[1.5 * m] * 2] for m in means]])
    maps[:, 6] = torch.tensor([[[0.0, 0.9]], [[0.3, 0.0]]])  # strong, but in few places

    def case(share: float) -> Case:
        count = int(share * 8)
        order, by_peak = (sorted(range(8), key=x.__getitem__) for x in (
            means, maps.amax((0, 2, 3)).tolist()))
        return Case(f"{count} of 8 channels", (maps, share), order[:count], {
            "Those are the most active ones.": order[::-1][:count],
            "Keep the order: the least active first.": sorted(order[:count]),
            "Take the mean over samples and places, not the maximum.": by_peak[:count]})

    report(yours, [case(0.25), case(0.5)], strict)


def check_nt_loss(yours: Callable, strict: bool = False) -> None:
    """Check `yours(student_logits, teacher_logits, given)`: equation eq-nt-loss."""
    def loss(z: Tensor, z0: Tensor, labels: Tensor, mistake: str = "") -> float:
        found = []
        for one, one0, y in zip(z.tolist(), z0.tolist(), labels.tolist()):
            if mistake == "zero":
                one[y] = one0[y] = 0.0
            kept = [r if mistake in ("zero", "kept") else r[:y] + r[y + 1:] for r in (one, one0)]
            q, p = map(_softmax, kept)
            if mistake == "student":
                q = (full := _softmax(one))[:y] + full[y + 1:]
            found.append(_kl(q, p) if mistake == "back" else _kl(p, q))
        return _mean(found)

    def case(what: str, n: int, k: int) -> Case:
        given = z[:n, :k], z0[:n, :k], labels[:n]
        right = loss(*given)
        return Case(what, given, right, {
            "Drop the given label of both before the softmax.": loss(*given, mistake="kept"),
            "Drop the given label of the student too.": loss(*given, mistake="student"),
            "Take the given label out; a logit of 0 still counts.": loss(*given, mistake="zero"),
            "The teacher comes first in the divergence.": loss(*given, mistake="back"),
            "Sum over classes, mean over samples.": right / k,
            "Take the mean over samples, not the sum.": right * n})

    z = torch.tensor([[0.0, 1.0, 2.0, -1.0], [1.0, 0.5, 0.0, 3.0]])
    z0, labels = torch.tensor([[5.0, 2.0, 0.0, 1.0], [0.0, 1.0, -1.0, 4.0]]), torch.tensor([0, 3])
    leaf = z.clone().requires_grad_()
    report(yours, [
        case("one sample of three classes", 1, 3), case("two samples of four classes", 2, 4),
        Case("logits that get a gradient", (leaf, z0, labels), 6,
             {"The given label must get none.": 8}, _reached(leaf))], strict, LOSS)


def check_strip_entropy(yours: Callable, strict: bool = False) -> None:
    """Check `yours(probabilities)`: (inputs, copies, classes) to entropies in nats, (inputs,)."""
    p = torch.tensor([[[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]], [[0.6, 0.4], [0.7, 0.3], [0.5, 0.5]]])

    def entropy(one: Iterable[float]) -> float:
        return -sum(x * math.log(x) for x in one if x)

    def case(what: str, p: Tensor) -> Case:
        right = [_mean(map(entropy, copies)) for copies in p.tolist()]
        return Case(what, (p,), right, {
            "Entropy has a minus sign.": [-x for x in right],
            "Those are bits; use the natural logarithm.": [x / math.log(2) for x in right],
            "Take the mean over copies, not the sum.": [x * p.shape[1] for x in right],
            "Sum over classes, mean over copies.": [x / p.shape[2] for x in right],
            "Take the entropy of each copy, not of their mean.": [
                entropy(map(_mean, zip(*copies))) for copies in p.tolist()],
            "0 ln 0 counts as 0.": [math.nan] * len(p)})

    report(yours, [case("two inputs, three copies", p),
                   case("an input whose copies are all sure", torch.tensor([[[1.0, 0.0]] * 3]))],
           strict)


def check_answer_loss(yours: Callable, strict: bool = False) -> None:
    """Check `yours(logits, ids, answer)`: logits (T, V) at each of T tokens, the last are answer.

    The mean surprise at the `answer` last tokens; token t is told by the logits at t - 1.
    """
    ids = [2, 0, 1, 1, 3]
    logits = torch.tensor([[1.0, 0.0, -1.0, 0.5], [0.0, 2.0, 1.0, 0.0], [0.3, 1.0, 0.0, -0.5],
                           [2.0, 0.0, 0.0, 1.5], [0.0, 0.0, 0.0, 3.0]])

    def loss(logits: Tensor, ids: list[int], answer: int, shift: int = 1) -> float:
        found = [-math.log(_softmax(logits[t - shift].tolist())[ids[t]])
                 for t in range(len(ids) - answer, len(ids))]
        return _mean(found)

    def case(what: str, answer: int) -> Case:
        given = logits, ids, answer
        right = loss(*given)
        return Case(what, given, right, {
            "The logits at t tell token t + 1: shift by one.": loss(*given, shift=0),
            "Leave the prompt out.": loss(logits, ids, len(ids) - 1),
            "Take the mean over the answer's tokens, not the sum.": right * answer,
            "Divide by the answer's tokens, not by all.": right * answer / len(ids),
            "Surprise is minus the log probability.": -right})

    leaf = logits.clone().requires_grad_()
    report(yours, [
        case("an answer of two tokens", 2), case("an answer of three tokens", 3),
        Case("entries of the logits that get a gradient", (leaf, ids, 2), 8,
             {"The prompt must get none.": 16}, _reached(leaf))], strict, LOSS)


def check_distance(yours: Callable, strict: bool = False) -> None:
    """Check `yours(asr, floor)`, both in percent: how far an ASR is from its floor, in points."""
    def case(what: str, asr: float, floor: float) -> Case:
        return Case(what, (asr, floor), abs(asr - floor), {
            "Below the floor counts as well: a distance has no sign.": asr - floor,
            "Below the floor is a distance too, not success.": max(0.0, asr - floor),
            "Subtract the floor.": asr, "Count in points, not in shares.": abs(asr - floor) / 100})

    report(yours, [case("ASR 38.1%, floor 12%", 38.1, 12.0), case("ASR 4%, floor 12%", 4.0, 12.0),
                   case("ASR at its floor", 12.0, 12.0)], strict)
