"""Comparisons, and checks that can be given a mutant of what they check.

Each function has a check by plain arithmetic, which takes the function as an argument, so that
the same check can be given a mutant.
"""

import inspect
from dataclasses import asdict

import pytest
import torch


def near(values, **options):
    return pytest.approx(values, **{"abs": 1e-5, "rel": 1e-5, **options})


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def mutant(module, name, old="", new=""):
    """Compile a function anew with a change in its text."""
    text = inspect.getsource(getattr(module, name))
    assert not old or text.count(old) == 1, f"{name} has changed: adapt the mutation {old!r}"
    space = dict(vars(module))
    exec(compile(text.replace(old, new) if old else text, "<mutant>", "exec"), space)
    return space[name]


def unnoticed(module, check, changes):
    """Return the changes of a function's text that its check lets pass."""
    name, missed = check.__name__.removeprefix("check_"), []
    check(getattr(module, name))
    # Otherwise an error of the machinery would look like a mutation that was noticed.
    check(mutant(module, name))
    for change in changes:
        changed = mutant(module, name, *change)
        try:
            check(changed)
        except AssertionError:
            continue
        missed.append(change)
    return missed


def accepts(kind, **changes):
    try:
        return changes.items() <= asdict(kind(**changes)).items()
    except ValueError as error:
        assert str(error).startswith(f"cannot go on with {kind.__name__}(")
        assert str(error).endswith(": a field is out of its range")
        return False


def has_ranges(kind, good, bad):
    assert all(accepts(kind, **{name: value}) for name, value in good)
    assert not any(accepts(kind, **{name: value}) for name, value in bad)
