"""Who may see what: the names in a source that a defense may not speak of."""

import ast

SECRETS = {"test", "TestSet", "Task", "Victim", "PoisonRecord", "record", "poisoned", "trigger",
           "target_label", "triggered", "asr"}


def names_in(tree):
    return {getattr(node, field) for node in ast.walk(tree)
            for field in ("id", "attr", "arg", "name", "module")
            if isinstance(getattr(node, field, None), str)}
