"""Run tests and chapters as several processors would: one machine, other instructions.

    python -m tools.processors list
    python -m tools.processors run tests chapters alone [--settings avx2 ...] [--threads 1 2]
    python -m tools.processors table FOLDER...
    python -m tools.processors margins FOLDER...

`run` writes a JSON for each setting, number of threads and step into `--out`; what follows
`--` goes to pytest. The tests of pages read the built book: `make book` first.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from bdutils.assets import cache_dir

from . import assertions, comparisons, margins, reports

ROOT = Path(__file__).resolve().parent.parent
SETTINGS: dict[str, dict[str, str]] = {
    "native": {},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},  # without AMX
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2",
             "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "sse4": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default",
             "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "mkl": {"MKL_CBWR": "COMPATIBLE"},
}
VARIABLES = {name for setting in SETTINGS.values() for name in setting}
# What pytest is told in each step, in the order of `make test`: what must run alone comes last and
# finds the chapters' models trained.
STEPS = {
    "tests": ["tests", "-m", "not alone", "--dist", "loadfile"],
    "chapters": ["--nbval", "--dist", "loadscope"],
    "alone": ["tests", "-m", "alone"],
}
VERSIONS = ("torch", "numpy", "transformers", "pandas", "scikit-learn")


def cpu() -> tuple[str, list[str]]:
    """Return the processor's name as Linux gives it, and which of the wide instructions it has."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), []
    name = re.search(r"model name\s*: (.*)", text)
    wide = [flag for flag in ("avx2", "avx512f", "amx_tile") if f" {flag}" in text]
    return name[1] if name else platform.machine(), wide


def own_cache(setting: str, threads: int) -> Path:
    """Return a cache that shares the assets with the main one, and no trained model."""
    main = cache_dir().resolve()
    folder = main / "processors" / f"{setting}-{threads}"
    folder.mkdir(parents=True, exist_ok=True)
    (main / "assets").mkdir(exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (folder / "assets").symlink_to(main / "assets")
    return folder


def environment(setting: str, threads: int, cache: Path) -> dict[str, str]:
    """Return the variables of a run: this process's, less those of other settings."""
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    path = [str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    return kept | SETTINGS[setting] | {
        "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # two threads that spin would stand still beside a busy core
        "BDUTILS_CACHE": str(cache), "BDUTILS_SCALE": "small", "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(path)}


def pytest(command: list[str], variables: dict[str, str], minutes: float | None) -> int:
    """Run pytest; when the time is over, interrupt it as Ctrl+C does, so that it still reports."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored
    process = subprocess.Popen([sys.executable, "-m", "pytest", *command], cwd=ROOT,
                               env=variables, start_new_session=True)
    try:
        return process.wait(60 * minutes if minutes else None)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(30)
        return 124
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # workers that are left


def run(step: str, setting: str, threads: int, options: argparse.Namespace) -> dict:
    """Run one step under one setting and write its record into the folder `options.out`."""
    out = options.out.resolve()
    arguments = STEPS[step]
    if step == "chapters":
        arguments = arguments + options.chapters
    if step != "alone":
        arguments = arguments + ["-n", str(options.workers)]
    variables = environment(setting, threads, own_cache(setting, threads))
    with tempfile.TemporaryDirectory() as folder:
        if step == "chapters":
            log = out / f"margins-{setting}-{threads}.jsonl"
            log.unlink(missing_ok=True)
            profile = margins.profile(Path(folder))
            variables |= {"IPYTHONDIR": str(profile), comparisons.LOG: str(log)}
        else:
            log = out / f"assertions-{setting}-{threads}.jsonl"
            if step == "tests":
                log.unlink(missing_ok=True)
            variables |= {assertions.LOG: str(log)}
            arguments = [*arguments, "-p", "tools.assertions", "-o",
                         "enable_assertion_pass_hook=true"]
        report = Path(folder) / "report.xml"
        command = ["-q", f"--junitxml={report}", *arguments, *options.extra]
        status = pytest(command, variables, options.minutes)
        record = reports.read_report(report, status)
    name, wide = cpu()
    versions = {package: version(package) for package in VERSIONS}
    record |= {"step": step, "setting": setting, "threads": threads, "cpu": name, "wide": wide,
               "variables": SETTINGS[setting], "python": platform.python_version(),
               "versions": versions}
    (out / f"{step}-{setting}-{threads}.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def run_all(options: argparse.Namespace) -> int:
    """Run the chosen steps under the chosen settings and print the table; 1 if any failed."""
    options.out.mkdir(parents=True, exist_ok=True)
    done = []
    for setting, threads in itertools.product(options.settings, options.threads):
        if options.retrain:
            shutil.rmtree(own_cache(setting, threads))  # the link to the assets, not the assets
        done += [run(step, setting, threads, options) for step in STEPS if step in options.steps]
    print(reports.table(done))
    failed = [f"{record['setting']}, {record['threads']} threads: {test}"
              for record in done for test in record["failed"]]
    print(*failed, sep="\n")
    return int(bool(failed))


def main(arguments: list[str] | None = None) -> int:
    """Read the command line and do it."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    cut = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(prog="python -m tools.processors")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="print the settings and their variables")
    one = commands.add_parser("run", help="run steps of `make test` under each setting")
    one.add_argument("steps", nargs="+", choices=list(STEPS))
    one.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    one.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    one.add_argument("--workers", type=int, default=2, help="processes of pytest")
    one.add_argument("--out", type=Path, default=ROOT / "_build" / "processors")
    one.add_argument("--chapters", nargs="+", default=["chapters"], help="notebooks")
    one.add_argument("--minutes", type=float, help="interrupt each step after so many")
    one.add_argument("--retrain", action="store_true", help="train every model again")
    for name in ("table", "margins"):
        commands.add_parser(name).add_argument("folders", nargs="+", type=Path)
    options = parser.parse_args(given[:cut])
    options.extra = given[cut + 1:]
    if options.command == "list":
        for name, variables in SETTINGS.items():
            print(f"{name:>8}:", *(f"{key}={value}" for key, value in variables.items()))
    elif options.command == "run":
        return run_all(options)
    elif options.command == "table":
        print(reports.table(reports.records(options.folders, list(SETTINGS))))
    else:
        records = reports.records(options.folders, list(SETTINGS))
        logs = [log for folder in options.folders
                for log in sorted(folder.glob("assertions-*.jsonl"))]
        close = assertions.report(logs, margins.LEAST)
        return max(margins.main(options.folders, records, ROOT), min(close, 1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
