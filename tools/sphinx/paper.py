"""Mend for the PDF what LaTeX cannot take as the site has it."""

from docutils import nodes
from sphinx.addnodes import number_reference, start_of_file
from sphinx.application import Sphinx


def setup(app: Sphinx) -> dict:
    """Change pages only on their way into LaTeX."""
    def mend(app: Sphinx, doctree: nodes.document, docname: str) -> None:
        if app.builder.format == "latex":
            _number_chapters(doctree, app.env.toc_secnumbers)
            _leave_out_folded(doctree)
            _describe_drawings(doctree)
            _number_exercises(doctree, app.env.toc_fignumbers)

    app.connect("doctree-resolved", mend)
    return {"parallel_read_safe": True}


def _number_chapters(doctree: nodes.document, numbers: dict) -> None:
    """Number the chapters that the site numbers, and no other page."""
    for page in doctree.findall(start_of_file):
        depth = 2 if numbers.get(page["docname"]) else -1
        page.insert(0, nodes.raw("", rf"\setcounter{{secnumdepth}}{{{depth}}}", format="latex"))


def _leave_out_folded(doctree: nodes.document) -> None:
    """Drop the code that the site shows only on a click."""
    for cell in list(doctree.findall(nodes.container)):
        if cell.get("hide_mode") == "input":
            for part in [x for x in cell.children if x.get("nb_element") == "cell_code_source"]:
                cell.remove(part)


def _describe_drawings(doctree: nodes.document) -> None:
    """Put the description of a vector image, such as a badge, where the image stood."""
    for image in list(doctree.findall(nodes.image)):
        if image["uri"].endswith(".svg"):
            image.parent.replace(image, nodes.Text(image.get("alt", "")))


def _number_exercises(doctree: nodes.document, numbers: dict) -> None:
    """Refer to exercises by the labels that sphinx-exercise writes; Sphinx expects others."""
    for reference in list(doctree.findall(number_reference)):
        page, _, label = reference.get("refuri", "").removeprefix("%").partition("#")
        if number := numbers.get(page, {}).get("exercise", {}).get(label):
            text = f"Exercise {'.'.join(map(str, number))}"
            reference.parent.replace(reference, nodes.raw(
                "", rf"\hyperref[exercise:{label}]{{{text}}}", format="latex"))
