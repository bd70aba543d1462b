"""The book's result in one figure, made by the build from the records: `:::{result-figure}`.

One tab an attack; in each a table whose bars are the ASR that a defense leaves. The tabs are
sphinx-design's: they need no script, and without styles all tables stand below each other.
"""

import html
from statistics import fmean

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from bdutils.experiments import comparison, results

# Attack: name for readers who have not met it yet, and what it does.
ATTACKS = {
    "badnets": ("a word", "A rare word is put into the text (BadNets)."),
    "addsent": ("a sentence", "A whole sentence is put into the text (AddSent)."),
    "syntax": ("a structure", "The sentence is rebuilt after one pattern (syntax)."),
    "style": ("a style", "The text is put into an old style (style)."),
    "patch": ("a patch", "A white square lies in a corner of the picture (patch)."),
    "blended": ("noise", "A faint noise lies over the whole picture (blended)."),
    "sine": ("a wave", "A faint wave lies over the whole picture (sine)."),
    "warp": ("a bend", "The picture is bent a little (warp)."),
    "input-aware": ("own marks", "A network paints another mark on each picture (input-aware)."),
    "corners": ("corners", "Patches in all corners; no label is wrong (corners)."),
}
MODEL = "without a defense", "never poisoned"


def rows_of(frame, kind: str, attack: str) -> list[tuple[str, str, str]]:
    """Return name, ASR and accuracy of each model: attacked, defended, never poisoned."""
    cell = frame[frame["kind"].eq(kind) & frame["attack"].eq(attack)]
    # All defenses of a seed met the same model, or one that was trained like it.
    runs = list(cell.drop_duplicates("seed")["run"])
    found = [(fmean(results.value(run, "asr") for run in part["run"]), name,
              results.over_seeds(list(part["run"]), "asr"),
              results.over_seeds(list(part["run"]), "cacc"))
             for name, part in cell.groupby("defense")]
    return [(MODEL[0], results.over_seeds(runs, "asr_before"),
             results.over_seeds(runs, "cacc_before")),
            *(row[1:] for row in sorted(found)),
            (MODEL[1], results.over_seeds(runs, "floor"), "")]


def table_of(rows: list[tuple[str, str, str]], caption: str) -> str:
    """Return the rows as HTML, with a bar as long as the ASR."""
    def line(name: str, asr: str, cacc: str) -> str:
        role = " class=\"bd-model\"" if name in MODEL else ""
        bar = f'<span class="bd-bar" style="width:{asr.split()[0]}%"></span>'
        # On a phone the interval goes below its number.
        asr, cacc = (text.replace(" [", ' <span class="bd-interval">[').replace("]", "]</span>")
                     for text in (asr, cacc))
        return (f'<tr{role}><th scope="row">{html.escape(name)}</th>'
                f'<td class="bd-track" aria-hidden="true">{bar}</td>'
                f"<td>{asr}</td><td>{cacc}</td></tr>")

    head = "".join(f'<th scope="col">{name}</th>' for name in
                   ("model", '<span aria-hidden="true">0 to 100 %</span>', "ASR", "accuracy"))
    return (f'<div class="bd-bars" tabindex="0" role="region" aria-label="{html.escape(caption)}">'
            f"<table><caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead>"
            f"<tbody>{''.join(line(*row) for row in rows)}</tbody></table></div>")


class ResultFigure(SphinxDirective):
    """All defenses before each attack."""

    def run(self) -> list[nodes.Node]:
        """Return the tabs."""
        for study in comparison.STUDIES:
            for path in (results.FOLDER / study).glob("*.json"):
                self.env.note_dependency(str(path))
        frame = comparison.collect()
        lines = ["::::{tab-set}"]
        for kind, attacks in comparison.USUAL.items():
            for attack in sorted(attacks, key=list(ATTACKS).index):
                name, about = ATTACKS[attack]
                cell = frame[frame["kind"].eq(kind) & frame["attack"].eq(attack)]
                seeds = sorted(cell.groupby("defense")["seed"].nunique().unique())
                counted = " to ".join(str(n) for n in dict.fromkeys((seeds[0], seeds[-1])))
                caption = f"{about} Per cent, with 95 % intervals; seeds: {counted}."
                lines += [f":::{{tab-item}} {name}", "```{raw} html",
                          table_of(rows_of(frame, kind, attack), caption), "```", ":::"]
        return self.parse_text_to_nodes("\n".join([*lines, "::::"]))


def setup(app) -> dict:
    """Make the directive known."""
    app.add_directive("result-figure", ResultFigure)
    return {"parallel_read_safe": True}
