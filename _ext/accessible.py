"""Mend what the theme's pages lack for readers who do not see them, where CSS cannot."""


def setup(app) -> dict:
    """Change what the theme is about to write."""
    # The theme adds the function that is wrapped here at the usual priority, 500.
    app.connect("html-page-context", _name_folds, priority=600)
    app.connect("html-page-context", _list_citations)
    return {"parallel_read_safe": True}


def _name_folds(app, pagename: str, templatename: str, context: dict, doctree) -> None:
    """Give the arrows that unfold a part of the contents a name."""
    made = context["generate_toctree_html"]
    context["generate_toctree_html"] = lambda *args, **kwargs: str(made(*args, **kwargs)).replace(
        "<summary>", '<summary aria-label="Pages of this part">')


def _list_citations(app, pagename: str, templatename: str, context: dict, doctree) -> None:
    """Give the entries of the bibliography, a list, the role that replaced docutils' one."""
    if "body" in context:
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')
