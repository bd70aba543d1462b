"""What audits of texts and of images have in common: findings, a verdict, parts of a page."""

from __future__ import annotations

import base64
import io
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import pandas as pd

from ..defenses.base import Context
from ..metrics import Rate
from ..roles import TrainSet
from ..samples import in_words


@dataclass(frozen=True)
class Finding:
    """What is said of one label."""

    name: str
    """Of the class."""
    samples: int
    """Training samples with the label."""
    flagged: Rate
    """Share of them that look as a backdoor's do."""
    suspect: bool
    """Whether this is evidence of a backdoor that leads to the label."""


@dataclass(frozen=True)
class Audit:
    """What was checked, and what was found."""

    findings: tuple[Any, ...]
    """One `Finding` for each label, what is most suspicious first."""
    accuracy: Rate
    """Of the model on the clean samples."""
    seconds: float
    """From the loaded model to here."""
    template: ClassVar[str]
    """Of the report's page."""

    @property
    def suspects(self) -> tuple[Any, ...]:
        """The labels to which a backdoor seems to lead."""
        return tuple(finding for finding in self.findings if finding.suspect)

    @property
    def verdict(self) -> str:
        """One sentence for the head of the report."""
        if self.suspects:
            names = in_words([f"“{finding.name}”" for finding in self.suspects])
            return f"Evidence of a backdoor that leads to {names}."
        return ("No evidence of a backdoor. The report says what would have been found, and what "
                "would not.")

    def flagged(self, train: TrainSet) -> pd.DataFrame:
        """Return the samples to look at, the most suspicious first, in `flagged.csv`."""
        raise NotImplementedError

    def shown(self, context: Context) -> dict[str, Any]:
        """Return what the page shows beside the findings, by name."""
        raise NotImplementedError

    def record(self) -> dict[str, Any]:
        """Return what `audit.json` says of the findings."""
        return {"verdict": self.verdict, "accuracy": asdict(self.accuracy),
                "findings": [asdict(finding) for finding in self.findings],
                "seconds": round(self.seconds, 1)}


def address(data: bytes, kind: str) -> str:
    """Return an address that holds an image, so that a page needs no other file.

    Args:
        data: Content of a file.
        kind: Such as `png`.
    """
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def drawing(figure: Any) -> str:
    """Return a figure as an address that holds it, and close it."""
    import matplotlib.pyplot as plt

    file = io.BytesIO()
    figure.savefig(file, format="svg")
    plt.close(figure)
    return address(file.getvalue(), "svg+xml")
