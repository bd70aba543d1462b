"""What an installed copy has: the library, its commands, and the records of the book."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from helpers.architectures import save_tiny
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "bdutils", "data")
# Without `-S`, the .pth file of an editable install would come first.
START = ["import sys", "sys.path[:0] = {0!r}", "import bdutils, json, pathlib",
         "assert pathlib.Path(bdutils.__file__).is_relative_to({0[0]!r}), bdutils.__file__"]
NAMES = {"PIL": "pillow", "sklearn": "scikit-learn", "IPython": "ipython"}  # as registries say


def run(*command, where, **options):
    return subprocess.run([sys.executable, *map(str, command)], cwd=where, text=True,
                          capture_output=True, **options)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with an installed wheel; it is built from a copy, so that nothing is left here."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name,
                            ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy(ROOT / name, source / name)
    pip = ("-m", "pip", "--disable-pip-version-check", "--no-cache-dir")
    run(*pip, "wheel", ".", "--no-deps", "--no-build-isolation", "-w", folder, where=source,
        check=True)
    wheel, = folder.glob("*.whl")
    run(*pip, "install", "--no-deps", "--target", folder / "site", wheel, where=folder, check=True)
    return folder / "site"


@pytest.fixture
def ask(installed, tmp_path):
    """Run lines of Python where there is an installed copy and no clone."""
    def ask(*lines):
        paths = [str(installed), sysconfig.get_path("purelib")]
        code = "\n".join([*START, *lines]).format(paths)
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "BDUTILS_RESULTS")}
        return run("-S", "-c", code, where=tmp_path, env=kept)

    return ask


@pytest.mark.alone
def test_a_wheel_has_the_records_and_the_reported_figures(ask):
    done = ask("from bdutils.experiments import results",
               "print(len(results.load('attacks')), len(results.load('throughput')))",
               "print(len(json.loads((results.shipped() / 'reported.json').read_text())) > 0)",
               "print(results.target())")
    assert done.returncode == 0, done.stderr
    kept = [len([*(ROOT / "data/results" / name).glob("*.json")])
            for name in ("attacks", "throughput")]
    assert done.stdout.split() == [*map(str, kept), "True", "data/results"]


@pytest.mark.alone
@pytest.mark.parametrize("module, said", [
    ("assets", "minilm"), ("sweep", "attacks")])
def test_the_commands_run_from_a_wheel(ask, module, said):
    done = ask("import runpy", f"sys.argv[0] = 'bdutils.{module}'",
               f"runpy.run_module('bdutils.{module}', run_name='__main__', alter_sys=True)")
    assert said in done.stdout + done.stderr and "Traceback" not in done.stderr


@pytest.mark.alone
def test_a_model_is_audited_from_a_wheel(ask, tmp_path):
    """The templates of the report are there, and nothing of the clone is needed."""
    save_tiny("bert", tmp_path / "model")
    for name, size in (("train", 120), ("clean", 60)):
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "".join(
            f"{name} film {i} was {('bad', 'good')[i % 2]},{i % 2}\n" for i in range(size)))
    done = ask("from bdutils.__main__ import main",
               "sys.exit(main(['audit', 'model', '--train', 'train.csv', '--clean', 'clean.csv', "
               "'--out', 'report']))")
    assert done.returncode in (0, 3), done.stderr
    assert "Label by label" in (tmp_path / "report/index.html").read_text(encoding="utf8")


@pytest.mark.alone
def test_new_records_go_to_the_current_folder_or_say_why_not(ask, tmp_path):
    again = ("from bdutils.experiments import results",
             "print(results.save(results.load('attacks')[0]))")
    done = ask(*again)
    assert done.stdout.startswith("data/results/attacks/"), done.stderr
    assert (tmp_path / done.stdout.strip()).is_file()
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "data").write_text("a file, and no folder")
    done = ask(*again)
    assert "the record cannot be written" in done.stderr
    assert "choose another folder" in done.stderr


@pytest.mark.alone
def test_a_wheel_holds_the_package_and_nothing_else(installed):
    assert {path.name for path in installed.iterdir()} - {"bin"} == {
        "bdutils", *(path.name for path in installed.glob("bdutils-*.dist-info"))}
    there, wanted = ({path.relative_to(folder).as_posix() for path in folder.rglob("*.json")}
                     for folder in (installed / "bdutils/_data", ROOT / "data"))
    assert there == {name for name in wanted if name.startswith(("results/", "reported"))}


def imported() -> set[str]:
    """Return the packages that bdutils imports, anywhere in its code, as registries name them."""
    found = set()
    for path in (ROOT / "bdutils").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.partition(".")[0])
    return {NAMES.get(name, name) for name in found - set(sys.stdlib_module_names) - {"bdutils"}}


def test_what_the_package_imports_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
    always = {Requirement(text).name for text in project["dependencies"]}
    extra = {Requirement(text).name for texts in project["optional-dependencies"].values()
             for text in texts}
    assert imported() - always == extra
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert always <= {name.lower() for name in pins}
