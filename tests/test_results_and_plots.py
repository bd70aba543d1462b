"""Records of runs, the recorded studies themselves, and the slider."""

import json

import jsonschema
import matplotlib.pyplot as plt
import pytest

from bdutils import sweep
from bdutils.experiments import results
from bdutils.experiments.studies import LARGE, STUDIES
from bdutils.metrics import wilson
from bdutils.plotting import frames


def made(**changes):
    fields = {"study": "s", "name": "one-seed0", "method": "badnets", "task": "toy",
              "scale": "small", "settings": {"poison_rate": 0.1}, "data": "0" * 16, "seed": 0,
              "command": "python -m bdutils.sweep s", "metrics": {"asr": wilson(9, 10)},
              "seconds": {"training": 1.23}}
    return results.record(**{**fields, **changes})


def test_a_record_comes_back_as_it_was(tmp_path):
    run = made()
    results.save(run, tmp_path)
    assert results.load("s", tmp_path) == [run]
    assert results.value(run, "asr") == 0.9
    assert results.over_seeds([run], "asr") == "90.0 [59.6, 98.2]"


def test_seeds_are_summarized(tmp_path):
    runs = [made(seed=i, name=f"one-seed{i}", metrics={"asr": wilson(hits, 10)})
            for i, hits in enumerate((4, 5, 6))]
    mean = results.over_seeds(runs, "asr")
    # t: 50 -+ 4.303 * 10 / sqrt(3) = [25.2, 74.8]; Wilson of 15 in 30 is narrower.
    assert mean == "50.0 [25.2, 74.8]"
    same = [made(seed=i, metrics={"asr": wilson(10, 10)}) for i in range(3)]
    assert results.over_seeds(same, "asr") == "100.0 [88.6, 100.0]"  # not [100, 100]
    table = results.table(runs, "method", ["asr", "cacc"])
    assert table.loc["badnets", "seeds"] == 3 and table.loc["badnets", "asr"] == mean
    assert table.loc["badnets", "cacc"] == ""


def test_a_record_without_the_essentials_is_rejected():
    for change in ({"metrics": {}}, {"seed": "0"}, {"scale": "tiny"}, {"extra": 1}):
        with pytest.raises(jsonschema.ValidationError):
            made(**change)


@pytest.mark.parametrize("damage", ["{", "[]", "{}", ""])
def test_a_damaged_record_is_named(tmp_path, damage):
    path = results.save(made(), tmp_path)
    path.write_text(damage)
    with pytest.raises(ValueError, match="one-seed0.json is not a record.*repeat the run"):
        results.load("s", tmp_path)


def test_an_interrupted_write_is_not_read(tmp_path, monkeypatch):
    def crash(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "dump", crash)
    with pytest.raises(KeyboardInterrupt):
        results.save(made(), tmp_path)
    with pytest.raises(FileNotFoundError, match="no recorded study 's'"):
        results.load("s", tmp_path)


def test_a_sweep_does_what_is_missing_and_nothing_twice(tmp_path):
    todo = list(sweep.missing("label-modes", folder=tmp_path))
    assert [run.name for run in todo][:1] == ["badnets-clean-rate0.1-seed0"]
    results.save(made(study="label-modes", name=todo[0].name), tmp_path)
    assert list(sweep.missing("label-modes", folder=tmp_path)) == todo[1:]
    assert list(sweep.missing("label-modes", todo[0].name, tmp_path)) == todo[:1]
    with pytest.raises(ValueError, match="unknown study 'x': there are"):
        list(sweep.missing("x"))
    with pytest.raises(ValueError, match="has no run 'x'"):
        list(sweep.missing("rates", "x"))


@pytest.mark.parametrize("study", STUDIES)
def test_recorded_studies_are_complete_and_name_their_commands(study):
    missing = list(sweep.missing(study))
    assert not missing or study in LARGE, "run `python -m bdutils.sweep " + study + "`"
    for run in results.load(study) if len(missing) < len(STUDIES[study]) else []:
        assert run["study"] == study and run["name"] in run["command"]
        assert run["method"] == "clean" or {"asr", "floor", "ra"} <= set(run["metrics"])
        if run["method"] != "clean":
            asr = run["metrics"]["asr"]
            assert asr["low"] - 1e-9 <= asr["value"] <= asr["high"] + 1e-9
            # The decoder is slow: half as many rows, and so a wider interval beside its ASR.
            assert asr["n"] >= (200 if study == "dup-causal" else 400)


def test_a_record_can_be_repeated_from_its_data():
    """The fingerprint in the records is the one that the data still has."""
    from bdutils.data import load_task

    now = load_task("sentiment", scale="small").fingerprint()
    assert {run["data"] for run in results.load("attacks")} == {now}


def draw(value):
    plt.plot([0, value])
    return f"a line to {value} & <more>"


def test_a_slider_is_self_contained_and_stable():
    first, second = (frames(draw, [1, 2, 3], "height", start=1) for _ in range(2))
    page = first._repr_html_()
    assert repr(first) == "slider over height: 1, 2, 3"
    assert page == second._repr_html_()  # the same id and images each time
    assert page.count("data:image/png;base64,") == 3 and page.count(" hidden src=") == 2
    assert first._repr_png_() == first.images[1]  # for the PDF
    assert "http" not in page and "a line to 2 &amp; &lt;more&gt;" in page
    assert plt.get_fignums() == []  # nothing is left to be shown twice


def test_two_sliders_over_the_same_values_do_not_move_each_other():
    def identity(height):
        def line(value):
            plt.plot([value, height])
            return "a line"

        return frames(line, [1, 2], "height")._repr_html_().split('id="')[1].split('"')[0]

    assert identity(1) == identity(1) != identity(2)


def test_a_slider_needs_states():
    with pytest.raises(ValueError, match="at least two states"):
        frames(draw, [1], "height")
