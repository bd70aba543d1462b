"""Triggers are checked once, where they enter: a reader's own may be anything."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from ..models.image import floats
from ..roles import Examples
from .images import PICTURE_TRIGGERS, PictureTrigger
from .text import TRIGGERS, Trigger, private_rng


def checked_trigger(attack: str | Trigger | PictureTrigger,
                    rows: Examples) -> Trigger | PictureTrigger:
    """Return a trigger that can be used on some samples: the one place where triggers enter.

    Args:
        attack: Name of a built-in trigger, or any other trigger.
        rows: Samples that it is meant for, on the first of which it is tried.

    Raises:
        ValueError: For an unknown name, and for an object that is no trigger, or none for these
            samples.
    """
    kind = "pictures" if rows.are_pictures else "texts"
    known = PICTURE_TRIGGERS if rows.are_pictures else TRIGGERS
    if isinstance(attack, str):
        if attack not in known:
            raise ValueError(f"unknown attack {attack!r} on {kind}: use one of {sorted(known)}, "
                             "or a trigger object")
        return known[attack]
    _refuse_no_trigger(attack, rows)
    if hasattr(attack, "paint") != rows.are_pictures:
        raise ValueError(f"trigger {attack.name!r} does not mark {kind}: use one of "
                         f"{sorted(known)}")
    (_try_on_image if rows.are_pictures else _try_on_text)(attack, rows)
    return attack


def _refuse_no_trigger(attack: object, rows: Examples) -> None:
    """See that an object has the manners of a trigger."""
    what = f"{type(attack).__name__} {getattr(attack, '__name__', '')}".strip()
    if inspect.isclass(attack):
        raise ValueError(f"{attack.__name__} is a class: give an object of it, as in "
                         f"{attack.__name__}()")
    # By its manners, not by its class: a reader's own trigger is made in a notebook.
    if not any(callable(getattr(attack, name, None)) for name in ("paint", "apply")):
        raise ValueError(f"{what} is no trigger: give an object with a `name` and a method "
                         + ("`paint(x)`, of a class below PictureTrigger" if rows.are_pictures
                            else "`apply(text, rng)` that returns the triggered text"))
    name = getattr(attack, "name", None)
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"the trigger {what} has the name {name!r}: give it a text as `name`")


def _try_on_text(trigger: Trigger, rows: Examples) -> None:
    text = rows.texts[0]
    try:
        inspect.signature(trigger.apply).bind(text, private_rng(0, text))
    except TypeError as error:
        raise ValueError(f"trigger {trigger.name!r} does not take (text, rng) ({error}): write "
                         "`def apply(self, text, rng)`") from None
    except ValueError:  # a function without a signature, such as a built-in one
        pass
    with answering_for(trigger, rows.texts[:1], 0):
        try:
            found = trigger.apply(text, private_rng(0, text))
        except ValueError:  # of a table that knows other texts only; the sample is not its own
            return
        if not isinstance(found, str):
            raise TypeError


def _try_on_image(trigger: PictureTrigger, rows: Examples) -> None:
    lacking = [name for name in ("mark", "poison") if not callable(getattr(trigger, name, None))]
    if lacking:
        raise ValueError(f"trigger {trigger.name!r} has no method {lacking[0]!r}: let its class "
                         "inherit from PictureTrigger")
    if hasattr(trigger, "teach"):  # it can do nothing before it has learned
        return
    images = floats(rows.texts.pixels[:2])
    found = trigger.paint(images)
    if not isinstance(found, Tensor) or found.shape != images.shape:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"trigger {trigger.name!r} makes {got} of images of shape "
                         f"{tuple(images.shape)}: let `paint` return a tensor of the same shape")


@contextmanager
def answering_for(trigger: Trigger | PictureTrigger, texts: Sequence[str], seed: int
                   ) -> Iterator[None]:
    """Say on which text a trigger fails, if an error turns out to be its own.

    Args:
        trigger: In use inside the context.
        texts: To which it may be applied there.
        seed: Of its places.

    Raises:
        ValueError: With the text.
    """
    try:
        yield
    except (TypeError, AttributeError, LookupError, ValueError) as error:
        for row, text in enumerate(texts if hasattr(trigger, "apply") else ()):
            try:
                found = trigger.apply(text, private_rng(seed, text))
                fault = "" if isinstance(found, str) else f"gives a {type(found).__name__}"
            except LookupError as own:
                fault = f"fails ({type(own).__name__}: {own})"
            except Exception:  # whatever else a reader's code raises points to its line
                raise error from None
            if fault:
                raise ValueError(f"trigger {trigger.name!r} {fault} for text {row}, "
                                 f"{text[:40]!r}: it must return a text for every text"
                                 ) from error
        raise


def short_name(name: str) -> str:
    """Return a name as a part of a file's name: short, and without signs that have a meaning.

    Args:
        name: Of a trigger or a task.
    """
    kept = re.sub(r"[^\w.-]+", "-", name).strip(".-")
    return kept[:40] or "own"
