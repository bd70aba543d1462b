"""Texts that the book knows by name, from registries and the hub."""

from __future__ import annotations

from ..assets import asset
from .hub import read_hub
from .normalize import Raw

HUB = {  # hub id, configuration, names of the classes; columns are `text` and `label`
    "sst2": ("SetFit/sst2", None, ("negative", "positive")),  # the 6,920/872/1,821 split
    "ag_news": ("fancyzhx/ag_news", None, ("world", "sports", "business", "sci/tech")),
    "olid": ("cardiffnlp/tweet_eval", "offensive", ("not offensive", "offensive")),
}
Row = tuple[str, int, str]  # text, label, split (empty: not given)
MIN_RATING = 1.0  # mean of 20 raters on a scale from -4 to 4; ours: drop the undecided rows


def snippets() -> list[Row]:
    """Return the VADER movie snippets whose raters are decided."""
    path = asset("snippets") / "snippets.tsv"
    rows = []
    for line in path.read_text(encoding="utf8", errors="replace").splitlines():
        _, rating, text = line.split("\t")
        if abs(float(rating)) >= MIN_RATING:
            rows.append((text.strip(), int(float(rating) > 0), ""))
    return rows


NEWSGROUPS = ("comp", "rec", "sci", "talk")
# Ours: eight groups whose subjects are far apart.
NEWSGROUPS8 = ("comp.graphics", "rec.autos", "rec.sport.hockey", "sci.crypt", "sci.med",
               "sci.space", "soc.religion.christian", "talk.politics.mideast")


def newsgroups(names: tuple[str, ...]) -> list[Row]:
    """Return the posts of some newsgroups."""
    rows = []
    for part in ("train", "test"):
        path = asset("newsgroups") / f"{part}.tab"
        for line in path.read_text(encoding="utf8").splitlines()[3:]:  # 3 header lines
            group, _, text = line.partition("\t")
            found = group if group in names else group.split(".")[0]
            if found in names and text.strip():
                # Posts are long and the encoder reads their first words only.
                rows.append((" ".join(text.split()[:60]), names.index(found), part))
    return rows


def known(name: str) -> tuple[Raw, str] | None:
    """Return a data set by the name that the book has for it, and where it came from.

    Args:
        name: `snippets`, `newsgroups`, `newsgroups8`, or one of `HUB`.

    Returns:
        None for any other name.

    Raises:
        AssetError: Without a network.
        HubError: Without a network.
    """
    if name in HUB:
        hub_id, config, names = HUB[name]
        return (read_hub(hub_id, config, ("text", "label"), names,
                         "stay at BDUTILS_SCALE=small, which needs no hub"), f"hub: {hub_id}")
    if name == "snippets":
        return _raw(snippets(), ("negative", "positive")), "VADER movie snippets"
    if name == "newsgroups":
        return _raw(newsgroups(NEWSGROUPS), NEWSGROUPS), "20 Newsgroups, four groups"
    if name == "newsgroups8":
        origin = "20 Newsgroups, eight single groups"
        return _raw(newsgroups(NEWSGROUPS8), NEWSGROUPS8), origin
    return None


def _raw(rows: list[Row], names: tuple[str, ...]) -> Raw:
    texts, labels, splits = zip(*rows, strict=True)
    return Raw(texts, labels, splits, names)
