"""What a docstring in Google style must have, read from source text."""

import ast
import inspect
import re

SECTIONS = ("Args", "Returns", "Yields", "Raises")


def faults(text):
    """List what is wrong with the docstrings of a module or of a cell."""
    found = []
    _walk(ast.parse(text), "", found)
    return found


def code_lines(text):
    """Return the lines of a cell or module that are not of a docstring."""
    try:
        tree = ast.parse(text)
    except SyntaxError:  # a cell with a command of the notebook
        return text.splitlines()
    said = {n for node in ast.walk(tree) if _is_text(node)
            for n in range(node.lineno, node.end_lineno + 1)}
    return [line for n, line in enumerate(text.splitlines(), 1) if n not in said]


def _walk(node, path, found):
    for child in ast.iter_child_nodes(node):
        name = f"{path}.{child.name}".lstrip(".") if hasattr(child, "name") else path
        if isinstance(child, ast.ClassDef):
            found += [f"{name}.{field}" for field in _fields(child)]
            made = [x for x in child.body if getattr(x, "name", "") == "__init__"]
            found += _of_one(child, name, _parameters(made[0], True) if made else None)
        elif isinstance(child, ast.FunctionDef):
            found += _of_one(child, name, _parameters(child, isinstance(node, ast.ClassDef)))
        _walk(child, name, found)


def _of_one(node, name, parameters):
    sections, text = _sections(inspect.cleandoc(ast.get_docstring(node) or ""))
    found = [f"{name}: {line!r} is not Google style" for line in text
             if re.match(rf"({'|'.join(SECTIONS)}|Fields|Source: ours)\b", line)]
    for head, entries in sections.items():
        if not entries or not all(said and said[-1] in ".!?" for _, said in entries):
            found.append(f"{name}: an entry of {head} is empty or ends without a period")
    named = [x for names, _ in sections.get("Args", []) for x in names.split(", ")]
    if "Args" in sections and parameters is not None and named != parameters:
        found.append(f"{name}: Args has {named}, the signature {parameters}")
    return found + [f"{name}: Raises names {error!r}" for error, _ in sections.get("Raises", [])
                    if not re.fullmatch(r"(\w+\.)*[A-Z]\w*(Error|Exception|Interrupt)", error)]


def _sections(doc):
    """Part sections, each a list of (names, text), from the other lines."""
    sections, text, here = {}, [], None
    lines = doc.split("\n")
    for before, line in zip(["", *lines], lines):
        if line.rstrip(":") in SECTIONS and line.endswith(":") and not before.strip():
            here = sections.setdefault(line[:-1], [])
            named = line[:-1] in ("Args", "Raises")
        elif here is None or (line and line[0] != " "):
            here = None
            text.append(line)
        elif re.match(r" {4}\S", line) and (named or not here):
            names, _, said = line.strip().partition(":") if named else ("", "", line.strip())
            here.append((names, said.strip()))
        elif line.strip():
            here[-1] = (here[-1][0], f"{here[-1][1]} {line.strip()}")
    return sections, text


def _parameters(node, method):
    a = node.args
    names = [x.arg for x in a.posonlyargs + a.args]
    static = any(getattr(d, "id", "") == "staticmethod" for d in node.decorator_list)
    return (names[1:] if method and not static else names) + (
        [f"*{a.vararg.arg}"] if a.vararg else []) + [x.arg for x in a.kwonlyargs] + (
        [f"**{a.kwarg.arg}"] if a.kwarg else [])


def _fields(node):
    """Say which fields of a dataclass or named tuple have no text below them, or a wrong one."""
    record = (any("dataclass" in ast.unparse(d) for d in node.decorator_list)
              or any("NamedTuple" in ast.unparse(b) for b in node.bases))
    for field, after in zip(node.body, [*node.body[1:], None]):
        if isinstance(field, ast.AnnAssign):
            if _is_text(after):
                # Sphinx's napoleon takes what stands before it for a type.
                if ":" in re.sub("`[^`]*`", "", after.value.value.split("\n")[0]):
                    yield f"{field.target.id}: colon in the first line"
            elif record and "ClassVar" not in ast.unparse(field.annotation):
                yield f"{field.target.id}: no text below the field"


def _is_text(node):
    return (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str))
