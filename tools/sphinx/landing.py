"""The book's result in one figure, made by the build from the records: `:::{result-figure}`.

One tab an attack; in each a table whose bars are the ASR that a defense leaves, with a line at
the floor of the same models. The tabs are sphinx-design's: they need no script, and without
styles all tables stand below each other.
"""

import html
from statistics import fmean
from typing import NamedTuple

import pandas as pd
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from bdutils.experiments import comparison, results

# Kind of input and attack: its name, and what it does for readers who have not met it yet.
ATTACKS = {
    ("text", "badnets"): ("BadNets (text)", "A rare word is put into the text."),
    ("text", "addsent"): ("AddSent", "A whole sentence is put into the text."),
    ("text", "synbkd"): ("SynBkd", "The sentence is rebuilt after one pattern."),
    ("text", "stylebkd"): ("StyleBkd", "The text is put into an old style."),
    ("image", "badnets"): ("BadNets (image)", "A white square lies in a corner of the image."),
    ("image", "blended"): ("Blended", "A faint noise lies over the whole image."),
    ("image", "sig"): ("SIG", "A faint sine wave lies over the whole image."),
    ("image", "wanet"): ("WaNet", "The image is warped a little."),
    ("image", "input_aware"): ("Input-Aware", "A network paints another trigger on each image."),
    ("image", "label_consistent"): (
        "Label-Consistent", "Patches lie in all corners; no label is wrong."),
}
MODEL = "without a defense", "never poisoned"
HEADS = "ASR", "right with trigger", "right without"


class Line(NamedTuple):
    """A model in the figure, in percent."""

    name: str
    """For readers."""
    asr: str
    """With its interval."""
    pacc: str
    """Share of all triggered samples that are classified correctly, if it was measured."""
    cacc: str
    """The same share of clean samples, if it was measured."""
    floor: float
    """Of the models that were never poisoned, beside the same victims."""
    holds: str = ""
    """What the defender needs."""


def victims(cell: pd.DataFrame) -> list[dict]:
    """Return one run for each attacked model: some defenses met others of the same seed.

    Args:
        cell: All runs with one attack.
    """
    met = {(run["seed"], *(results.value(run, key) for key in
                           ("asr_before", "cacc_before", "floor"))): run for run in cell["run"]}
    return list(met.values())


def models(cell: pd.DataFrame) -> list[Line]:
    """Return each model: attacked, defended (input filters last), never poisoned.

    Args:
        cell: All runs with one attack.
    """
    met = victims(cell)
    parts = {name: part for name, part in cell.groupby("defense")}
    defended = []
    for name, part in sorted(parts.items(), key=lambda x: (
            x[1]["holds"].iloc[0] == comparison.ANSWERS, x[1]["distance"].mean())):
        asr, pacc, cacc = (results.over_seeds(list(part["run"]), key)
                           for key in ("asr", "pacc", "cacc"))
        defended.append(Line(str(name), asr, pacc, cacc, part["floor"].mean(),
                             part["holds"].iloc[0]))
    floor = 100 * fmean(results.value(run, "floor") for run in met)
    return [Line(MODEL[0], results.over_seeds(met, "asr_before"), "",
                 results.over_seeds(met, "cacc_before"), floor), *defended,
            Line(MODEL[1], results.over_seeds(met, "floor"),
                 results.over_seeds(met, "clean_pacc"), "", floor)]


def caption_of(cell: pd.DataFrame, about: str) -> str:
    """Say what an attack does and what was measured.

    Args:
        cell: All runs with one attack.
        about: The attack, in a sentence.
    """
    rates = ", ".join(f"{rate:.0%}" for rate in sorted(cell["rate"].unique()))
    seeds, met = cell["seed"].nunique(), len(victims(cell))
    of = ("All defenses met the same models." if met == seeds else
          f"The defenses met {met} models in all, trained alike; the gray bars are their mean.")
    return (f"{about} Percent of triggered or clean samples; {rates} of the training set "
            f"poisoned; means of {seeds} seeds, for the ASR with 95% intervals. {of}")


def table_of(measured: list[Line], caption: str) -> str:
    """Return an HTML table with a bar as long as the ASR, and a line at the floor.

    Args:
        measured: From `models`.
        caption: Above the table.
    """
    def entry(line: Line) -> str:
        role = " class=\"bd-model\"" if line.name in MODEL else ""
        bar = (f'<span class="bd-lane"><span class="bd-bar" style="width:{line.asr.split()[0]}%">'
               f'</span><span class="bd-floor" style="left:{line.floor:.1f}%"></span></span>')
        # On a phone the interval goes below its number.
        asr = line.asr.replace(" [", ' <span class="bd-interval">[').replace("]", "]</span>")
        numbers = "".join(f"<td>{text}</td>" for text in
                          (asr, line.pacc.split(" ")[0], line.cacc.split(" ")[0]))
        holds = f' <span class="bd-holds">{line.holds}</span>' if line.holds else ""
        return (f'<tr{role}><th scope="row">{html.escape(line.name)}{holds}</th>'
                f'<td class="bd-track" aria-hidden="true">{bar}</td>{numbers}</tr>')

    head = "".join(f'<th scope="col">{name}</th>' for name in
                   ("model and what it needs", '<span aria-hidden="true">0 to 100%</span>',
                    *HEADS))
    return (f'<div class="bd-bars" tabindex="0" role="region" aria-label="{html.escape(caption)}">'
            f"<table><caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead>"
            f"<tbody>{''.join(entry(line) for line in measured)}</tbody></table></div>")


def plain_table_of(measured: list[Line], caption: str) -> str:
    """Return the same as a Markdown table, for the PDF.

    Args:
        measured: From `models`.
        caption: Above the table.
    """
    lines = [(f"{line.name} ({line.holds})" if line.holds else line.name, line.asr,
              line.pacc.split(" ")[0], line.cacc.split(" ")[0]) for line in measured]
    head = ("model and what it needs", *HEADS)
    rows = [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *lines)]
    return "\n".join([caption, "", *rows])


class ResultFigure(SphinxDirective):
    """All defenses before each attack."""

    def run(self) -> list[nodes.Node]:
        """Return the tabs."""
        for study in comparison.STUDIES:
            for path in (results.FOLDER / study).glob("*.json"):
                self.env.note_dependency(str(path))
        frame = comparison.collect()
        lines = ["::::{tab-set}"]
        attacks = [(kind, attack) for kind, some in comparison.USUAL.items() for attack in some]
        for kind, attack in sorted(attacks, key=list(ATTACKS).index):
            name, about = ATTACKS[kind, attack]
            cell = comparison.usual(frame, kind)
            cell = cell[cell["attack"].eq(attack)]
            lines += [f":::{{tab-item}} {name}", "```{raw} html",
                      table_of(models(cell), caption_of(cell, about)), "```",
                      "```{only} latex", plain_table_of(models(cell), caption_of(cell, about)),
                      "```", ":::"]
        return self.parse_text_to_nodes("\n".join([*lines, "::::"]))


def setup(app: Sphinx) -> dict:
    """Make the directive known."""
    app.add_directive("result-figure", ResultFigure)
    return {"parallel_read_safe": True}
