"""Let Sphinx read the docstrings of the package: they are plain text with a few marks.

A summary, with commands indented; then lines that start with Args, Returns, Raises, Source or
Fields. Single backquotes are code. A name and a colon, at the start of a deeper line, or of a line
that is one run of them, describe one thing each.
"""

import re

MARK = re.compile(r"(Args|Returns|Raises|Source|Fields)\b([^:]*):\s*(.*)")
ITEM = re.compile(r"\s+((?:\w+)(?:, \w+)*): (.*)")
NAMES = r"(?!(?:ours|inf)\b)[a-z][\w\\]*(?:, [a-z][\w\\]*)*: "  # those two are said of a value
RUN = re.compile(rf"(?:(\*\*(?:Args|Fields)\*\*) )?({NAMES}.*)")
NEXT = re.compile(rf"[;.] (?={NAMES})")


def as_rst(lines: list[str]) -> list[str]:
    """Return a docstring as reStructuredText, one paragraph or list item a line."""
    found, inside = [], False
    for line in lines:
        mark, item = MARK.match(line), ITEM.match(line)
        if mark:
            inside = True
            found += ["", f"**{mark[1]}{mark[2]}** {_plain(mark[3])}".rstrip()]
        elif item and inside:
            # A list ends and begins with a blank line.
            found += ["", f"* ``{item[1]}``: {_plain(item[2])}"]
        elif line.startswith("    ") and not inside and (not found[-1] or found[-1][0] == " "):
            # An example below a blank line, to be read line by line.
            found += [line] if found and found[-1].startswith("    ") else ["::", "", line]
        elif not line.strip():
            found.append("")
        elif found and found[-1]:
            found[-1] += f" {_plain(line.strip())}"
        else:
            found.append(_plain(line.strip()))
    found[1:] = [part for line in found[1:] for part in _listed(line)]
    return [line for i, line in enumerate(found) if line or found[i - 1:i] != [""]]


def _listed(line: str) -> list[str]:
    """Make items of what is described in one run, by semicolons or sentences."""
    run = RUN.fullmatch(line)
    if not run:
        return [line]
    items = (item.split(": ", 1) for item in NEXT.split(run[2]))
    return [run[1] or "", *(part for name, text in items
                      for part in ("", "* ``" + name.replace("\\", "") + f"``: {text}"))]


def _plain(text: str) -> str:
    """Mark code, and keep everything else from being read as markup."""
    parts = text.split("`")
    return "".join(f"``{part}``" if i % 2 and part.strip() else re.sub(r"([*_|\\])", r"\\\1", part)
                   for i, part in enumerate(parts))


def setup(app) -> dict:
    """Read every docstring of the package so."""
    app.connect("autodoc-process-docstring", lambda app, what, name, obj, options, lines:
                lines.__setitem__(slice(None), [*as_rst(lines), ""])
                if name.startswith("bdutils") else None)
    return {"parallel_read_safe": True}
