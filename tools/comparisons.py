"""Log what a page asserts: both sides of each comparison, as its kernel computes them.

`install` makes each ordering comparison inside `check(...)`, `print(...)`, `assert` or a
dictionary of named verdicts write a line to the file that `BDUTILS_MARGINS` names. What the
comparison gives and what the page shows stay the same. `margins.py` reads these files.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import json
import operator
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOG = "BDUTILS_MARGINS"
CALLED = "__margin__"  # what a wrapped comparison calls
SAID_BY = {"check", "print"}
ORDERS = {"Lt": "<", "LtE": "<=", "Gt": ">", "GtE": ">="}
OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "Lt": operator.lt, "LtE": operator.le, "Gt": operator.gt, "GtE": operator.ge,
    "Eq": operator.eq, "NotEq": operator.ne, "Is": operator.is_, "IsNot": operator.is_not,
    "In": lambda item, group: item in group, "NotIn": lambda item, group: item not in group}


def fingerprint(source: str) -> str:
    """Return what a cell is known by in the log: twelve hexadecimal digits."""
    return hashlib.sha256(source.encode()).hexdigest()[:12]


class Wrapper(ast.NodeTransformer):
    """Turns the outermost comparisons that a cell asserts into calls that log both sides."""

    def __init__(self, sites: list[dict]) -> None:
        """Remember each comparison in `sites`, whose place in the list the call names."""
        self.sites = sites
        self.cell = ""
        self.label: str | None = None  # None outside of what is asserted

    def before_cell(self, info: Any) -> None:
        """Note which cell comes next: IPython's event `pre_run_cell`."""
        self.cell = fingerprint(info.raw_cell)

    def _skip(self, node: ast.AST) -> ast.AST:
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = visit_Lambda = _skip

    def _labeled(self, label: str, visit: Callable[[Any], Any], node: ast.AST) -> Any:
        outer = self.label
        self.label = outer or label
        node = visit(node)
        self.label = outer
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Look into the calls that say something; a sentence in front is the label."""
        if not (isinstance(node.func, ast.Name) and node.func.id in SAID_BY):
            return self.generic_visit(node)
        label = _text(node.args[0], node.func.id) if len(node.args) > 1 else node.func.id
        return self._labeled(label, self.generic_visit, node)

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        """Look into what is asserted."""
        return self._labeled(_text(node.msg, "assert"), self.generic_visit, node)

    def visit_Dict(self, node: ast.Dict) -> ast.AST:
        """Look at verdicts that stand under their sentences."""
        for place, (key, value) in enumerate(zip(node.keys, node.values)):
            name = _text(key, "")
            if name and isinstance(value, ast.Compare):
                node.values[place] = self._labeled(name, self.visit, value)
            else:
                node.values[place] = self.visit(value)
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        """Wrap a comparison: later operands of a chain are evaluated only if it comes to them."""
        kinds = [type(op).__name__ for op in node.ops]
        scoped = any(isinstance(part, (ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom))
                     for part in ast.walk(node))
        if self.label is None or scoped or not ORDERS.keys() & set(kinds):
            return node
        limits = [_constant(operand) for operand in node.comparators]
        self.sites.append({"cell": self.cell, "label": self.label, "expr": ast.unparse(node),
                           "kinds": kinds, "limits": limits})
        nothing = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[],
                                defaults=[])
        later = [ast.Lambda(nothing, operand) for operand in node.comparators[1:]]
        call = ast.Call(ast.Name(CALLED, ast.Load()),
                        [ast.Constant(len(self.sites) - 1), node.left, node.comparators[0],
                         *later], [])
        return ast.fix_missing_locations(ast.copy_location(call, node))


def _text(node: ast.expr | None, default: str) -> str:
    if isinstance(node, ast.JoinedStr):
        return ast.unparse(node)[2:-1]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return default


def _constant(node: ast.expr) -> float | None:
    try:
        return float(ast.literal_eval(node))
    except (ValueError, TypeError):
        return None


def _numbers(side: Any) -> Any:
    import numpy as np

    if isinstance(side, (str, bytes, list, tuple, set, frozenset, dict)):
        raise TypeError("not compared as a number")
    return np.asarray(side.detach() if hasattr(side, "detach") else side, dtype=float)


def comparer(sites: list[dict], log: Path) -> Callable[..., Any]:
    """Return the function that wrapped comparisons call: it compares as Python does, and logs."""

    def compare(site: int, left: Any, *others: Any) -> Any:
        about = sites[site]
        for place, kind in enumerate(about["kinds"]):
            right = others[place]() if place else others[0]
            result = OPERATORS[kind](left, right)
            if kind in ORDERS:
                _write(log, about, place, left, right)
            if place + 1 < len(about["kinds"]) and not result:
                return result
            left = right
        return result

    return compare


def _write(log: Path, about: dict, place: int, left: Any, right: Any) -> None:
    try:
        left, right = _numbers(left), _numbers(right)
        slack = left - right
        extremes = [float(slack.min()), float(slack.max())]
    except Exception:  # a page must never fail by being logged
        return
    line = {key: about[key] for key in ("cell", "label", "expr")}
    line |= {"place": place, "op": ORDERS[about["kinds"][place]],
             "limit": about["limits"][place], "slack": extremes}
    if slack.ndim == 0:
        line |= {"left": float(left), "right": float(right)}
    with log.open("a", encoding="utf8") as file:
        file.write(json.dumps(line) + "\n")


def install(shell: Any) -> None:
    """Log what the cells of an IPython shell compare if `BDUTILS_MARGINS` names a file."""
    if os.environ.get(LOG):
        sites: list[dict] = []
        wrapper = Wrapper(sites)
        shell.events.register("pre_run_cell", wrapper.before_cell)
        shell.ast_transformers.append(wrapper)
        setattr(builtins, CALLED, comparer(sites, Path(os.environ[LOG])))
