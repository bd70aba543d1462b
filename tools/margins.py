"""How far the comparisons that a page asserts are from their limits, over several processors.

`comparisons.py` writes a log for each setting; here they are laid side by side.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from .comparisons import OPERATORS, ORDERS, fingerprint

LEAST = 2.0  # spreads between a number and its limit
RECORD = Path("data/margins.json")


def profile(folder: Path) -> Path:
    """Make an IPYTHONDIR whose kernels log comparisons; `tools` must be on their path."""
    startup = folder / "profile_default" / "startup"
    startup.mkdir(parents=True, exist_ok=True)
    (startup / "00-margins.py").write_text(
        "import tools.comparisons\ntools.comparisons.install(get_ipython())\ndel tools\n")
    return folder


def cells(chapters: Path) -> dict[str, tuple[str, str]]:
    """Return chapter and cell id of each code cell's fingerprint."""
    found = {}
    for path in sorted(chapters.glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf8"))["cells"]:
            if cell["cell_type"] == "code":
                found[fingerprint("".join(cell["source"]))] = (path.stem, cell["id"])
    return found


def spreads(logs: Iterable[Path], chapters: Path) -> list[dict]:
    """Compare the logs of several settings.

    Args:
        logs: One file for each setting.
        chapters: Folder of the notebooks that were run; lines of other cells are left out.

    Returns:
        One entry for each comparison that moves: `lowest` and `highest` of the left side if the
        right one is a constant, of left - right otherwise, their difference `spread`, and
        `ratio`, the least distance to the limit over the spread (0 if the verdict changes).
        Of an array the least and the greatest element are two entries.
    """
    known = cells(chapters)
    found: dict[tuple, list[dict]] = {}
    for log in logs:
        times: Counter = Counter()  # a comparison in a loop: the first time beside the first
        for line in map(json.loads, log.read_text(encoding="utf8").splitlines()):
            where = (line["cell"], line["expr"], line["place"])
            times[where] += 1
            if line["cell"] in known:
                found.setdefault((*where, times[where]), []).append(line)
    entries = []
    for (cell, expr, _, time), lines in found.items():
        parts = [(0, "")] if all(a == b for a, b in (x["slack"] for x in lines)) else \
            [(0, "least"), (1, "greatest")]
        for side, part in parts:
            entry = _entry([line["slack"][side] for line in lines], lines[0])
            if entry["spread"] > 0:
                chapter, name = known[cell]
                entries.append({"chapter": chapter, "cell": name, "label": lines[0]["label"],
                                "expr": expr, "time": time, "part": part, **entry})
    return sorted(entries, key=lambda entry: entry["ratio"])


def _entry(slacks: list[float], line: dict) -> dict:
    kind = next(kind for kind, symbol in ORDERS.items() if symbol == line["op"])
    same_verdict = len({bool(OPERATORS[kind](slack, 0)) for slack in slacks}) == 1
    spread = max(slacks) - min(slacks)
    distance = min(map(abs, slacks)) if same_verdict else 0.0
    base = line["limit"] or 0.0
    return {"op": line["op"], "limit": line["limit"], "lowest": round(min(slacks) + base, 6),
            "highest": round(max(slacks) + base, 6), "spread": float(f"{spread:.3g}"),
            "ratio": distance / spread if spread else float("inf")}


def main(folders: list[Path], records: list[dict], root: Path) -> int:
    """Write the record of all comparisons that move, and print those that move too far.

    Args:
        folders: What `processors run` wrote, of one machine or several.
        records: The JSON records of these folders.
        root: Folder of the book.

    Returns:
        1 if a number is closer to its limit than twice its spread.
    """
    logs = [log for folder in folders for log in sorted(folder.glob("margins-*.jsonl"))]
    if not logs:
        raise SystemExit("no chapter was run in these folders: nothing to compare")
    moving = spreads(logs, root / "chapters")
    close = [entry for entry in moving if entry["ratio"] < LEAST]
    for entry in close:
        print("{chapter} {cell}: {label}: {expr} {part} is between {lowest} and {highest}, "
              "{ratio:.2f} spreads from its limit".format(**entry))
    runs = sorted({(record["cpu"], record["setting"], record["threads"])
                   for record in records if record["step"] == "chapters"})
    lines = [json.dumps(entry | {"ratio": round(entry["ratio"], 2)}) for entry in moving]
    made_from = ",\n ".join(json.dumps(run) for run in runs)
    (root / RECORD).write_text(f'{{"made_from": [\n {made_from}],\n"comparisons": [\n '
                               + ",\n ".join(lines) + "]}\n", encoding="utf8")
    print(f"{len(moving)} comparisons move over {len(logs)} runs, {len(close)} of them too far")
    return int(bool(close))
