"""Each mutation must make a chapter fail: a chapter that cannot fail shows nothing."""

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tools import book

# What is put behind the set-up cell. Models come from the cache as they are; the mutation
# changes what the page measures.
SHUFFLED_LABELS = """
import random, dataclasses, bdutils.data as data
_load = data.load_task
def load_task(*args, **options):
    task = _load(*args, **options)
    labels = list(task.test.labels)
    random.Random(0).shuffle(labels)
    return dataclasses.replace(task, test=dataclasses.replace(task.test, labels=tuple(labels)))
data.load_task = load_task
"""
NO_TRIGGER = """
import bdutils.evaluation as victims
def triggered(test, trigger, target_label, **options):
    return test.take([i for i, y in enumerate(test.labels) if y != target_label])
victims.triggered = triggered
"""
FLIPPED_TARGET = """
import bdutils.evaluation as victims
_evaluate = victims.evaluate
def evaluate(model, task, trigger, target_label=1, **options):
    return _evaluate(model, task, trigger, 1 - target_label, **options)
victims.evaluate = evaluate
"""


@pytest.mark.alone
@pytest.mark.parametrize("chapter, mutation, message", [
    ("01", SHUFFLED_LABELS, "the clean model has not learned the task"),
    ("01", NO_TRIGGER, "the backdoor did not take"),
    ("01", FLIPPED_TARGET, "the backdoor did not take"),
    ("03", NO_TRIGGER, "AssertionError"),
    ("09", NO_TRIGGER, "badnets: ASR over 85%"),
])
def test_a_mutation_makes_the_chapter_fail(chapter, mutation, message):
    path = next(p for p in book.notebooks() if p.name.startswith(chapter))
    notebook = nbformat.read(path, as_version=4)
    setup = next(i for i, c in enumerate(notebook.cells) if c.cell_type == "code")
    notebook.cells.insert(setup + 1, nbformat.v4.new_code_cell(mutation))
    with pytest.raises(CellExecutionError, match=message):
        NotebookClient(notebook, timeout=1800,
                       resources={"metadata": {"path": str(path.parent)}}).execute()
