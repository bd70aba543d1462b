"""What was run, when, on what and how long, made by the build from the records.

`:::{chapter-runs}` is a table of the chapters, `:::{study-runs}` one of the recorded studies.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from bdutils.experiments import results
from bdutils.experiments.studies import STUDIES
from tools import book, status


def chapter_lines(paths: Iterable[Path], folder: Path = status.FOLDER) -> list[list[str]]:
    """Return a line a chapter; one that was never measured says so."""
    lines = []
    for path in paths:
        file = folder / f"{path.stem}.json"
        link = f"{{doc}}`/chapters/{path.stem}`"
        if not file.is_file():
            lines.append([link, "not measured", *[""] * 3])
            continue
        run = json.loads(file.read_text(encoding="utf8"))
        threads = f"{run['threads']} thread{'s' * (run['threads'] > 1)}"
        on = run["machine"]["gpu"] or f"{run['machine']['processor']}, {threads}"
        used = [f"{name} {run['versions'][name]}" for name in ("torch", "transformers")]
        lines.append([link, f"{minutes(run['wall_seconds'])} / {minutes(run['cpu_seconds'])}",
                      f"{run['peak_memory_mib'] / 1024:.1f}", str(len(run["trained"])),
                      "; ".join([on, *used, run["date"]])])
    return lines


def study_lines(folder: Path = results.FOLDER) -> list[list[str]]:
    """Return a line a study, with how many of its runs there are; one without any says so."""
    lines = []
    for name in sorted({*STUDIES, *(path.parent.name for path in folder.glob("*/*.json"))}):
        if name == "throughput":  # not runs
            continue
        if not any(folder.glob(f"{name}/*.json")):
            lines.append([f"`{name}`", f"none of {len(STUDIES[name])}", *[""] * 3])
            continue
        runs = results.load(name, folder)
        dates = sorted(run["date"] for run in runs)
        seeds = sorted({run["seed"] for run in runs})
        used = [f"{name} " + ", ".join(sorted({run["versions"][name] for run in runs}))
                for name in ("torch", "transformers")]
        asked = len(STUDIES.get(name, runs))
        count = str(len(runs)) if len(runs) >= asked else f"{len(runs)} of {asked}"
        lines.append([f"`{name}`", count, ", ".join(map(str, seeds)),
                      ", ".join(sorted({run["scale"] for run in runs})),
                      "; ".join([" to ".join(dict.fromkeys((dates[0], dates[-1]))), *used])])
    return lines


def minutes(seconds: float) -> str:
    """Show a time as minutes and seconds."""
    return f"{round(seconds) // 60}:{round(seconds) % 60:02d}"


class _Table(SphinxDirective):
    head: tuple[str, ...]
    widths: tuple[int, ...]  # of the columns in the PDF

    def lines(self) -> list[list[str]]:
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        """Return the table."""
        lines = [self.head, ["---"] * len(self.head), *self.lines()]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        columns = "".join(rf">{{\raggedright\arraybackslash}}\X{{{width}}}{{{sum(self.widths)}}}"
                          for width in self.widths)
        return self.parse_text_to_nodes(
            f"```{{tabularcolumns}} {columns}\n```\n\n{table}")


class ChapterRuns(_Table):
    """The last run of each chapter."""

    head = ("chapter", "minutes", "memory, GiB", "models trained", "run on")
    widths = (5, 4, 3, 3, 9)

    def lines(self) -> list[list[str]]:
        """Return the lines, and have the page made again when a record changes."""
        for path in status.FOLDER.glob("*.json"):
            self.env.note_dependency(str(path))
        return chapter_lines(book.notebooks())


class StudyRuns(_Table):
    """The recorded studies."""

    head = ("study", "runs", "seeds", "scale", "run on")
    widths = (6, 2, 3, 2, 10)

    def lines(self) -> list[list[str]]:
        """Return the lines, and have the page made again when a record changes."""
        for path in results.FOLDER.glob("*/*.json"):
            self.env.note_dependency(str(path))
        return study_lines()


def setup(app: Sphinx) -> dict:
    """Make the directives known."""
    app.add_directive("chapter-runs", ChapterRuns)
    app.add_directive("study-runs", StudyRuns)
    return {"parallel_read_safe": True}
