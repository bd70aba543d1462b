"""The command line: `python -m bdutils audit MODEL --train FILE --clean FILE --out FOLDER`."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from .assets import AssetError
from .samples import DataError

NOTHING, WRONG, FOUND, STOPPED = 0, 2, 3, 130
OPTIONS = {"text": "name yours with --text and --label", "label": "name yours with --text and "
           "--label", "names": "say which answer of the model means which, in its order, with "
           "--names NAME NAME ..."}
# What is said of a repair, by its verdict.
REPAIRS = {
    "purified": "accuracy on {n} clean samples that the repair did not see: {before} before, "
                "{after} after. Whether the trigger still works was not measured",
    "no evidence": "the repair searches without {n} of the clean samples, and found nothing; the "
                   "model is unchanged",
    "undone": "the repair lost more than 10 points of accuracy on clean samples; the model is "
              "unchanged"}


def parser() -> argparse.ArgumentParser:
    """Return what the command takes."""
    top = argparse.ArgumentParser(prog="python -m bdutils")
    commands = top.add_subparsers(dest="command", required=True)
    audit = commands.add_parser(
        "audit", help="look for a backdoor in a classifier of your own",
        description="Look for a backdoor in a classifier of texts or images, and repair it if "
        "asked to. Exit status: 0 no evidence, 3 evidence, 2 something is wrong with what was "
        "given.")
    audit.add_argument("model", help="folder or hub id of a sequence classifier of transformers, "
                       "an adapter of one, or a folder of `ImageClassifier.save`")
    audit.add_argument("--train", required=True,
                       help="file of the samples it was trained on, or folder of images by class")
    audit.add_argument("--clean", required=True, help="the same of samples that you can vouch for")
    audit.add_argument("--out", required=True, type=Path,
                       help="folder for the report, with --repair for the repaired model")
    audit.add_argument("--text", default="text", help="column of the texts")
    audit.add_argument("--label", default="label", help="column of the labels")
    audit.add_argument("--names", nargs="+", help="of the classes, in the order of the model's "
                       "answers, where neither model nor files tell")
    audit.add_argument("--base", help="folder or hub id of the model that an adapter changes, if "
                       "not the one that it names")
    audit.add_argument("--epochs", type=int, help="in which a model of images was trained")
    audit.add_argument("--repair", action="store_true",
                       help="remove what is found; the report goes into the folder `report`")
    return top


def run(given: argparse.Namespace) -> int:
    """Audit a model, and repair it if asked to.

    Args:
        given: By `parser`.

    Returns:
        The exit status.
    """
    from . import audit
    from .data.image import image_paths

    out = given.out.expanduser()
    audit.require_ours(out, for_model=given.repair)
    audit.require_ours(out / "report", for_model=False)
    context = audit.read_context(given.model, given.train, given.clean, given.text, given.label,
                                 given.names, given.epochs, given.base)
    found = audit.audit(context, quiet=False)
    print(found.verdict)
    if given.repair:
        model, about = audit.repair(context)
        audit.write_model(model, about, out, given.model)
        said = REPAIRS[about["verdict"]].format(
            n=about["before"].n, before=f"{about['before'].value:.1%}",
            after=f"{about['after'].value:.1%}")
        print(f"{about['verdict']}: {said}. The model is in {out}")
    train = Path(given.train).expanduser()
    files = image_paths(train) if train.is_dir() else ()
    page = audit.write_report(found, context, out / "report" if given.repair else out,
                              given.model, files)
    print(f"The report is {page}")
    return FOUND if found.suspects else NOTHING


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Of the command, those of the process if None.

    Returns:
        The exit status.
    """
    given = parser().parse_args(arguments)
    warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)
    try:
        return run(given)
    except DataError as error:
        print(f"{error.reason}: {OPTIONS.get(error.option, error.remedy)}", file=sys.stderr)
    except (ValueError, OSError, AssetError, FloatingPointError) as error:
        print(error, file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return STOPPED
    return WRONG


if __name__ == "__main__":
    sys.exit(main())
