"""The book's result in one figure, made by the build from the records: `:::{result-figure}`.

One tab an attack; in each a table whose bars are the ASR that a defense leaves. The tabs are
sphinx-design's: they need no script, and without styles all tables stand below each other.
"""

import html
from statistics import fmean

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


def models(cell: pd.DataFrame) -> list[tuple[str, str, str]]:
    """Return name, ASR and accuracy of each model: attacked, defended, never poisoned.

    Args:
        cell: All runs with one attack.
    """
    # All defenses of a seed met the same model, or one that was trained like it.
    runs = list(cell.drop_duplicates("seed")["run"])
    found = [(fmean(results.value(run, "asr") for run in part["run"]), name,
              results.over_seeds(list(part["run"]), "asr"),
              results.over_seeds(list(part["run"]), "cacc"))
             for name, part in cell.groupby("defense")]
    return [(MODEL[0], results.over_seeds(runs, "asr_before"),
             results.over_seeds(runs, "cacc_before")),
            *(model[1:] for model in sorted(found)),
            (MODEL[1], results.over_seeds(runs, "floor"), "")]


def table_of(measured: list[tuple[str, str, str]], caption: str) -> str:
    """Return an HTML table with a bar as long as the ASR.

    Args:
        measured: From `models`.
        caption: Above the table.
    """
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
                   ("model", '<span aria-hidden="true">0 to 100%</span>', "ASR", "accuracy"))
    return (f'<div class="bd-bars" tabindex="0" role="region" aria-label="{html.escape(caption)}">'
            f"<table><caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead>"
            f"<tbody>{''.join(line(*model) for model in measured)}</tbody></table></div>")


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
            seeds = sorted(cell.groupby("defense")["seed"].nunique().unique())
            counted = " to ".join(str(n) for n in dict.fromkeys((seeds[0], seeds[-1])))
            caption = f"{about} Percent, with 95% intervals; seeds: {counted}."
            lines += [f":::{{tab-item}} {name}", "```{raw} html",
                      table_of(models(cell), caption), "```", ":::"]
        return self.parse_text_to_nodes("\n".join([*lines, "::::"]))


def setup(app: Sphinx) -> dict:
    """Make the directive known."""
    app.add_directive("result-figure", ResultFigure)
    return {"parallel_read_safe": True}
