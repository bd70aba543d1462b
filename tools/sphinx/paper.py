"""Mend for the PDF what LaTeX cannot take as the site has it."""

from docutils import nodes
from sphinx.addnodes import number_reference
from sphinx.application import Sphinx


def setup(app: Sphinx) -> dict:
    """Change pages only on their way into LaTeX."""
    def mend(app: Sphinx, doctree: nodes.document, docname: str) -> None:
        if app.builder.format == "latex":
            _describe_drawings(doctree)
            _number_exercises(doctree, app.env.toc_fignumbers)

    app.connect("doctree-resolved", mend)
    return {"parallel_read_safe": True}


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
