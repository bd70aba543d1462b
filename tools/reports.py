"""What runs leave behind: pytest's reports, records made of them, and a table of the records."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path


def read_report(path: Path, status: int) -> dict:
    """Return the counts, the failed tests and the minutes of a report of pytest."""
    root = ET.parse(path).getroot() if path.is_file() else ET.Element("none")
    cases = list(root.iter("testcase"))
    bad = [case for case in cases
           if case.find("failure") is not None or case.find("error") is not None]
    failed = sorted({f"{case.get('classname')}::{case.get('name')}" for case in bad})
    if status not in (0, 1):
        failed.append(f"pytest ended with status {status}")
    skipped = sum(case.find("skipped") is not None for case in cases)
    seconds = sum(float(suite.get("time", 0)) for suite in root.iter("testsuite"))
    return {"passed": len(cases) - len(bad) - skipped, "skipped": skipped, "failed": failed,
            "minutes": round(seconds / 60, 1)}


def records(folders: list[Path], order: list[str]) -> list[dict]:
    """Return the records of runs, by processor and in the given order of the settings."""
    found = [json.loads(path.read_text()) for folder in folders
             for path in sorted(folder.glob("*-*-*.json"))]
    return sorted(found, key=lambda x: (x["cpu"], order.index(x["setting"]), x["threads"]))


def table(found: list[dict]) -> str:
    """Return a Markdown table with a line for each processor, setting and number of threads."""
    runs: dict[tuple, dict[str, list[dict]]] = {}
    for record in found:
        kind = "chapters" if record["step"] == "chapters" else "tests"
        key = (record["cpu"], record["setting"], record["threads"])
        runs.setdefault(key, {"tests": [], "chapters": []})[kind].append(record)
    lines = ["| processor | setting | threads | tests passed/failed | chapters passed/failed "
             "| minutes |", "| --- | --- | --- | --- | --- | --- |"]
    for (cpu, setting, threads), kinds in runs.items():
        counts = [f"{sum(x['passed'] for x in some)}/{sum(len(x['failed']) for x in some)}"
                  if some else "–" for some in kinds.values()]
        minutes = sum(x["minutes"] for some in kinds.values() for x in some)
        lines.append(f"| {cpu} | {setting} | {threads} | {' | '.join(counts)} | {minutes:.1f} |")
    return "\n".join(lines)
