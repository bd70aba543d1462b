"""The book's own rules, checked on the stored chapters."""

import ast
import base64
import inspect
import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from statistics import median

import nbformat
import pytest
import yaml
from docutils.core import publish_doctree
from helpers.google import code_lines
from helpers.pages import contents
from PIL import Image

import bdutils
from bdutils.experiments import results
from tools import book
from tools.sphinx import runs, terms

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = {path.name: json.loads(path.read_text(encoding="utf8"))
            for path in book.notebooks(template=True)}
TEMPLATE = "_template.ipynb"
CODE = sorted([*(ROOT / "bdutils").rglob("*.py"), *(ROOT / "tools").glob("*.py")])
each_chapter = pytest.mark.parametrize("name", CHAPTERS)


def source(cell):
    return "".join(cell["source"])


def code_cells(name):
    return [c for c in CHAPTERS[name]["cells"] if c["cell_type"] == "code"]


def text_of(name):
    return "\n\n".join(source(c) for c in CHAPTERS[name]["cells"]
                       if c["cell_type"] == "markdown")


def tags(cell):
    return cell["metadata"].get("tags", [])


@each_chapter
def test_outputs_are_stored_and_in_order(name):
    """nbval runs a cell without a count, but compares nothing."""
    counts = [c["execution_count"] for c in code_cells(name)]
    assert counts == list(range(1, len(counts) + 1))
    kinds = {o["output_type"] for c in code_cells(name) for o in c["outputs"]}
    assert "error" not in kinds and "display_data" in kinds
    assert CHAPTERS[name]["metadata"]["kernelspec"]["name"] == "python3"
    assert (ROOT / "chapters" / name).stat().st_size < 1_000_000


def test_nothing_that_was_fetched_or_trained_is_in_the_repository():
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is not a clone")
    tracked = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert {path.relative_to(ROOT).parts[0] for path in tracked if path.parent != ROOT} == {
        ".ci", ".github", "_static", "bdutils", "benchmarks", "chapters", "colab", "data", "tests",
        "tools"}
    assert [path for path in tracked if path.is_file() and path.stat().st_size > 1_000_000] == []
    assert not {path.suffix for path in tracked} & {
        ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gz", ".lock", ".whl", ".parquet"}


@each_chapter
def test_what_is_not_compared_has_a_reason(name):
    cells = code_cells(name)
    ignored = [c for c in cells if "nbval-ignore-output" in tags(c)]
    assert len(ignored) <= len(cells) / 3
    assert all(len(c["metadata"].get("reason", "")) > 20 for c in ignored)
    assert not any({"nbval-skip", "raises-exception"} & set(tags(c)) for c in cells)
    assert not any("NBVAL_" in source(c) for c in cells)


@each_chapter
def test_cells_are_small(name):
    sizes = [len(code_lines(source(c))) for c in code_cells(name)]
    assert max(sizes) <= 40  # a screen
    assert median(sizes) <= 8
    setup = [c for c in code_cells(name) if "google.colab" in source(c)]
    wide = [line for c in code_cells(name) if c not in setup
            for line in source(c).splitlines() if len(line) > 79]
    assert not wide


@each_chapter
def test_nothing_that_nbval_cannot_check(name):
    for cell in code_cells(name):
        text = source(cell)
        assert not text.rstrip().endswith(";")
        assert not re.search(r"\binteract\(|clear_output|display_id|%%time|\bOutput\(", text)
        assert "%" not in text.split("\n")[0][:1]


@each_chapter
def test_the_parts_of_a_chapter(name):
    text = text_of(name)
    for part in ("In this chapter", "## Exercises", "## Summary", "## Questions",
                 "## Further reading"):
        assert part in text, part
    assert re.search(r"^## (Where .*break|When .*(not|fail))", text, re.MULTILINE)
    exercises = list(book.exercises(ROOT / "chapters" / name))
    assert 4 <= len(exercises) <= 6
    assert {e.difficulty for e in exercises} == {"easy", "medium", "hard"}
    for exercise in exercises:
        assert exercise.code == bool(exercise.program), exercise
        assert f"*{exercise.difficulty.capitalize()}, " in exercise.statement, exercise
        assert re.search(rf":::\{{solution(-start)?\}} {exercise.label}\b", text), exercise
    assert len(re.findall(r"solution-start\}", text)) >= 2
    assert "```{" not in text  # such fences are gray boxes on Colab
    words = [w for w in text.split() if re.search("[A-Za-z]", w)]  # not the bars of a table
    assert (400 if name == TEMPLATE else 1500) <= len(words) <= 5000


@each_chapter
def test_every_question_has_a_folded_answer(name):
    questions, answers = re.search(
        r"^## Questions\n(.*?)^:::\{admonition\} Answers\n:class: dropdown\n(.*?)^:::",
        text_of(name), re.MULTILINE | re.DOTALL).groups()
    numbers = [re.findall(r"^(\d+)\. \S", part, re.MULTILINE) for part in (questions, answers)]
    assert numbers[0] == numbers[1] == [str(k + 1) for k in range(len(numbers[0]))]
    assert len(numbers[0]) >= 5


@each_chapter
def test_chapters_check_themselves(name):
    cells = code_cells(name)
    assert sum("assert" in source(c) or "check(" in source(c) for c in cells) >= 5
    assert any("frames(" in source(c) for c in cells)


@each_chapter
def test_figures_have_descriptions(name):
    for cell in code_cells(name):
        if any("image/png" in data and "text/html" not in data  # a slider has its own
               for data in (o.get("data", {}) for o in cell["outputs"])):
            about = cell["metadata"]["mystnb"]
            assert len(about["image"]["alt"]) > 40 and len(about["figure"]["caption"]) > 20
            assert source(cell).rstrip().endswith("plt.show()")


@each_chapter
def test_address_and_version_agree(name):
    tag = f"v{bdutils.__version__}"
    repository = book.address().removeprefix("https://github.com/")
    link = (f"https://colab.research.google.com/github/{repository}/blob/{tag}/colab/{name}")
    assert text_of(name).count(link) == 2  # not the chapter itself, which has the solutions
    setup = source(code_cells(name)[0])
    assert f"--branch {tag} https://github.com/{repository}.git" in setup
    assert setup == source(code_cells(next(iter(CHAPTERS)))[0])


def test_the_address_stands_everywhere():
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    assert config["repository"]["url"] == book.address()
    owner, repository = book.address().split("/")[-2:]
    assert config["html"]["baseurl"] == f"https://{owner}.github.io/{repository}/"
    assert book.address() in (ROOT / "README.md").read_text()
    assert bdutils.__version__ in (ROOT / "CITATION.cff").read_text()
    assert bdutils.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_a_new_address_reaches_every_file(tmp_path, monkeypatch):
    for name in [*book.WITH_ADDRESS, *(f"chapters/{n}" for n in CHAPTERS)]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    old_owner = book.address().split("/")[-2]
    monkeypatch.setattr(book, "ROOT", tmp_path)
    monkeypatch.setattr(book, "CHAPTERS", tmp_path / "chapters")
    book.set_address("https://github.com/some-school/bd")
    assert book.address() == "https://github.com/some-school/bd"
    for path in tmp_path.rglob("*.*"):
        if path.is_file():
            text = path.read_text()
            assert f"{old_owner}/" not in text and f"{old_owner}.github" not in text, path
    with pytest.raises(ValueError, match="is not of the form"):
        book.set_address("git@github.com:some/thing")


def test_chapters_and_package_are_in_step():
    assert book.check() == []


def test_an_edited_module_is_noticed(tmp_path, monkeypatch):
    (tmp_path / "chapters").mkdir()
    for path in book.notebooks():
        (tmp_path / "chapters" / path.name).write_text(path.read_text())
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    monkeypatch.setattr(book, "ROOT", tmp_path)
    monkeypatch.setattr(book, "CHAPTERS", tmp_path / "chapters")
    (tmp_path / "bdutils").mkdir()
    book.export(tmp_path / "bdutils")
    book.write_copies()
    assert book.check() == []
    module = tmp_path / "bdutils/attacks/text.py"
    module.write_text(module.read_text().replace("rng.choice(self.words)", "self.words[0]"))
    assert book.check() == ["bdutils/attacks/text.py"]
    (tmp_path / "colab/07_anomalies.ipynb").write_text("{}")
    assert book.check() == ["colab/07_anomalies.ipynb", "bdutils/attacks/text.py"]


@each_chapter
def test_the_copy_for_colab_has_everything_but_solutions(name):
    path = ROOT / "chapters" / name
    copied = json.loads(book.copy_for_colab(path))["cells"]
    text = "\n\n".join(source(c) for c in copied)
    exercises = list(book.exercises(path))
    assert "{solution" not in text and "Answers\n:class" not in text
    for exercise in exercises:
        assert f"chapters/{path.stem}.html#{exercise.label})" in text
        assert exercise.statement.strip() in text and exercise.stub in text
        assert not exercise.program or exercise.program.split("\n\n\n")[0] not in text
        assert not exercise.words or exercise.words[:60] not in text
    assert not any(c.get("outputs") for c in copied)
    kept = {c["id"] for c in copied}
    assert kept <= {c["id"] for c in CHAPTERS[name]["cells"]}
    lost, made = set(), set()  # names that only solutions define; no later cell may need them
    for cell in code_cells(name):
        if "google.colab" in source(cell):
            continue
        names = [x for x in ast.walk(ast.parse(source(cell))) if isinstance(x, ast.Name)]
        stored = {x.id for x in names if isinstance(x.ctx, ast.Store)}
        if cell["id"] in kept:
            assert not {x.id for x in names} & (lost - made - stored), cell["id"]
            made |= stored
        else:
            lost |= stored


def test_the_stub_of_an_exercise_is_found(tmp_path):
    stub = "from bdutils.exercises import check_asr\n\ndef rate(p, y, t):\n    return None\n\n"
    cells = [{"cell_type": kind, "id": str(i), "metadata": {}, "source": [text]} for i, (
        kind, text) in enumerate([
            ("markdown", ":::{exercise}\n:label: ex-a\n\n*Easy, 5 minutes, code.* Do.\n:::"),
            ("code", f"{stub}check_asr(rate)"),
            ("markdown", ":::{solution-start} ex-a\n:::"), ("code", "rate = sum\ncheck_asr(rate)"),
            ("markdown", "So.\n\n:::{solution-end}\n:::\n\n:::{exercise}\n:label: ex-b\n\n"
                         "*Easy, 5 minutes.* Say.\n:::\n\n:::{solution} ex-b\nYes.\n:::\n\nEnd.")
        ])]
    path = tmp_path / "x.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    first, second = book.exercises(path)
    assert first.stub == "def rate(p, y, t):\n    return None"
    assert (first.check, second.stub, second.check) == ("check_asr(rate)", "", "")
    assert (first.program, first.words) == ("rate = sum\ncheck_asr(rate)", "So.")
    copied = json.loads(book.copy_for_colab(path))["cells"]
    assert [c["id"] for c in copied] == ["0", "1", "2"] and "check_asr" in source(copied[1])
    assert re.fullmatch(r"\*Solution: on \[the page of this chapter\]\(https://\S+/x.html#ex-a\)"
                        r"\.\*\n\n:::\{exercise\}\n.*\n:::\n\n\*Solution: on .*\n\nEnd\.",
                        source(copied[2]), re.DOTALL)


def test_contents_and_folder_agree():
    there = {str(p.relative_to(ROOT).with_suffix("")) for p in (ROOT / "chapters").rglob("*.*")
             if p.suffix in (".ipynb", ".md") and ".ipynb_checkpoints" not in p.parts
             and p.name != TEMPLATE}
    assert set(contents()) == there


def test_every_module_is_in_the_reference_once():
    pages = "".join(path.read_text() for path in (ROOT / "chapters/api").glob("*.md"))
    named = re.findall(r"automodule:: (\S+)", pages)
    wanted = [module.__name__ for module in modules() if module.__name__.startswith("bdutils.")]
    assert sorted(named) == sorted([
        *wanted, "bdutils.audit", "bdutils.data"])  # packages with functions


def test_first_mentions_of_terms_become_links():
    assert {"ASR", "trigger", "target label"} <= set(terms.terms()) and "gap" not in terms.terms()
    page = publish_doctree("ASR\n===\n\nTriggers; a RAM. Trigger, ``ASR``, trigger, target label: "
                           "ASR.\n", settings_overrides={"report_level": 5})
    before = page.astext()
    assert terms.link_terms(page, ["target label", "trigger", "ASR", "RA"]) == [
        "trigger", "target label", "ASR"]
    assert page.astext() == before
    linked = [node.astext() for node in page.findall(terms.pending_xref)]
    assert linked == ["Trigger", "target label", "ASR"]
    assert terms.link_terms(page, ["trigger", "ASR"]) == []  # linked by hand, or before


def test_status_tables_say_what_the_records_say(tmp_path):
    run = {"wall_seconds": 59.6, "cpu_seconds": 125, "peak_memory_mib": 1536,
           "trained": ["x", "y"], "seeds": [0], "threads": 2, "date": "2026-01-02",
           "machine": {"processor": "a processor", "gpu": None},
           "versions": {"torch": "2.0", "transformers": "5.0"}}
    (tmp_path / "01_a.json").write_text(json.dumps(run))
    first, second = runs.chapter_lines([Path("01_a.ipynb"), Path("02_b.ipynb")], tmp_path)
    assert first == ["{doc}`/chapters/01_a`", "1:00 / 2:05", "1.5", "2",
                     "a processor, 2 threads; torch 2.0; transformers 5.0; 2026-01-02"]
    assert second[1] == "not measured" and len(second) == len(first)
    studies = {line[0]: line for line in runs.study_lines()}
    assert "`throughput`" not in studies
    assert studies["`attacks`"][1:4] == ["15", "0, 1, 2", "small"]
    nothing = {line[0]: line[1] for line in runs.study_lines(tmp_path)}
    assert nothing["`attacks`"] == "none of 15"
    shutil.copytree(results.FOLDER / "attacks", tmp_path / "attacks")
    next((tmp_path / "attacks").glob("*.json")).unlink()
    assert {line[0]: line[1] for line in runs.study_lines(tmp_path)}["`attacks`"] == "14 of 15"


def test_config_has_no_misspelt_key():
    """Jupyter Book prints unknown keys at most."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    assert set(config) <= {"title", "author", "copyright", "logo", "only_build_toc_files",
                           "exclude_patterns", "execute", "parse", "bibtex_bibfiles",
                           "repository", "launch_buttons", "html", "sphinx", "latex"}
    assert config["execute"] == {"execute_notebooks": "off"}


def public(module):
    names = getattr(module, "__all__", None) or [n for n in vars(module) if n[0] != "_"]
    for name in names:
        found = getattr(module, name)
        if inspect.isfunction(found) and found.__module__ == module.__name__:
            yield found


def modules():
    import importlib

    for path in CODE:
        if path.stem not in ("__init__", "__main__"):
            yield importlib.import_module(
                ".".join(path.relative_to(ROOT).with_suffix("").parts))


def test_public_functions_are_typed():
    for module in modules():
        for function in public(module):
            where = f"{module.__name__}.{function.__name__}"
            hints = inspect.get_annotations(function)
            parameters = inspect.signature(function).parameters
            assert set(parameters) | {"return"} <= {*hints, "poisoning", "fields", "changes"}, \
                where


def test_nothing_unsafe_and_no_machine_path_is_tracked():
    for path in [*CODE, *book.notebooks()]:
        text = path.read_text()
        assert "torch.load" not in text, path
        assert "trust_remote_code" not in text.replace("trust_remote_code=False", ""), path
        assert not re.search(r"/(home|root|tmp|Users)/\w", text), path


def test_an_exercise_must_say_how_long_it_takes(tmp_path):
    path = tmp_path / "x.ipynb"
    text = ":::{exercise}\n:label: ex-a\n\n*Hard, 20 minutes, code.* Do.\n:::\n"
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": [text]}]}))
    assert [(e.label, e.difficulty, e.minutes, e.code) for e in book.exercises(path)] == [
        ("ex-a", "hard", 20, True)]
    path.write_text(path.read_text().replace("20 minutes", "long"))
    with pytest.raises(ValueError, match="exercise ex-a of x.ipynb must start like"):
        list(book.exercises(path))


@pytest.mark.slow
def test_a_run_leaves_a_record_of_what_it_cost(tmp_path, cache):
    path = tmp_path / "00_tiny.ipynb"
    cells = [nbformat.v4.new_code_cell(text) for text in (
        "import bdutils\nfrom bdutils.assets import entry\nbdutils.set_seed(3)",
        "for name in ('assets/a', 'models/b'):\n"
        "    entry(name, lambda folder: (folder / 'x').write_text(''))",
        "page = bytearray(300 << 20)  # 300 MiB\nend = __import__('time').time() + 1\n"
        "while __import__('time').time() < end: pass",
        "%matplotlib inline\nimport matplotlib.pyplot as plt\n_ = plt.plot([0, 1])")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    book.execute([path], tmp_path / "costs")
    made = json.loads((tmp_path / "costs/00_tiny.json").read_text())
    assert (made["chapter"], made["cells"], made["seeds"]) == ("00_tiny", 4, [3])
    assert made["trained"] == ["models/b"] and made["scale"] == "small"
    assert made["peak_memory_mib"] > 300 and made["wall_seconds"] > 1
    assert 0.3 < made["cpu_seconds"] < 10 * made["wall_seconds"]
    assert made["machine"]["cores"] == os.cpu_count() and made["versions"]["torch"]
    run = nbformat.read(path, 4).cells
    assert [c.source for c in run] == [c.source for c in cells]
    figure = base64.b64decode(run[3].outputs[0].data["image/png"])
    assert Image.open(io.BytesIO(figure)).mode == "P"  # few colors, a third of the size
