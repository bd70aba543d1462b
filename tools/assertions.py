"""A plugin of pytest: logs the numbers in assertions that held, and lays such logs side by side.

`tools.processors run tests` loads it. A test whose numbers move with the processor must keep away
from its limit; `python -m tools.processors margins` names those that come too close.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

LOG = "BDUTILS_ASSERTIONS"
PACKAGES = {"site-packages", "dist-packages"}  # where the code of others is installed
ORDERS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)


def value(node: ast.expr) -> float:
    """Return what an explained operand comes to, such as `0.1 * 2.5` or `np.float64(0.25)`.

    Args:
        node: Of the explanation, in which pytest has put values for names and calls.

    Raises:
        ValueError: If it is no arithmetic on numbers.
    """
    if isinstance(node, ast.Call) and len(node.args) == 1:  # how a scalar of a library looks
        node = node.args[0]
    parts = [*ast.walk(node)]
    allowed = (ast.Constant, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop)
    if not all(isinstance(part, allowed) for part in parts):
        raise ValueError("no arithmetic")
    return float(eval(compile(ast.Expression(node), "explanation", "eval"), {}))


def pairs(explanation: str) -> list[tuple[float, float]]:
    """Return the numbers that stand left and right of each < and > of an explanation."""
    try:
        tree = ast.parse(explanation, mode="eval")
    except (SyntaxError, ValueError):  # values that are shown by no expression
        return []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ORDERS):
            with contextlib.suppress(TypeError, ValueError, ArithmeticError):
                found.append((value(node.left), value(node.comparators[0])))
    return found


def asserting() -> Path | None:
    """Return the file whose assertion pytest reports just now, None if it reports none."""
    frame = sys._getframe()
    while frame and frame.f_code.co_name != "_call_assertion_pass":  # in pytest's rewriting
        frame = frame.f_back
    return Path(frame.f_back.f_code.co_filename) if frame and frame.f_back else None


def pytest_assertion_pass(item: Any, lineno: int, orig: str, expl: str) -> None:
    """Write the pairs of numbers that an assertion compared, if it compared any.

    pytest also reports the assertions of installed plugins, such as Hypothesis's: not these.
    """
    log, found = os.environ.get(LOG), pairs(expl.partition("\n")[0])
    if log and found and not ((file := asserting()) and PACKAGES & {*file.parts}):
        line = {"test": item.nodeid, "line": lineno, "assert": orig, "pairs": found}
        with open(log, "a", encoding="utf8") as file:  # several workers append whole lines
            file.write(json.dumps(line) + "\n")


def moving(logs: list[Path]) -> list[dict]:
    """Compare the logs of several settings.

    Args:
        logs: One file for each setting.

    Returns:
        One entry for each pair of numbers whose difference moves: `lowest` and `highest` of left
        less right, and `ratio`, the least distance from 0 over the spread.
    """
    found: dict[tuple, list[float]] = {}
    for log in logs:
        times: Counter = Counter()  # the first time that a loop comes by beside the first
        for line in map(json.loads, log.read_text(encoding="utf8").splitlines()):
            where = (line["test"], line["line"], line["assert"])
            times[where] += 1
            for place, (left, right) in enumerate(line["pairs"]):
                found.setdefault((*where, times[where], place), []).append(left - right)
    entries = []
    for (test, number, text, *_), slacks in found.items():
        spread = max(slacks) - min(slacks)
        if spread > 0:
            entries.append({"test": test, "line": number, "assert": text, "lowest": min(slacks),
                            "highest": max(slacks), "ratio": min(map(abs, slacks)) / spread})
    return sorted(entries, key=lambda entry: entry["ratio"])


def report(logs: list[Path], least: float) -> int:
    """Print the assertions that come too close to their limits; return how many they are."""
    entries = moving(logs)
    close = [entry for entry in entries if entry["ratio"] < least]
    for entry in close:
        print("{test}:{line}: {assert}: from {lowest:.4g} to {highest:.4g} off its limit, "
              "{ratio:.2f} spreads".format(**entry))
    print(f"{len(entries)} assertions of tests move over {len(logs)} runs, {len(close)} too far")
    return len(close)
