"""Whatever data people bring: taken whole, or rejected with the row and the remedy."""

import gzip
import json
import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bdutils.data import load_task, make_task
from bdutils.data.labels import SPLITS, classes, natural
from bdutils.experiments import results
from bdutils.roles import Examples, TrainSet
from bdutils.samples import DataError

SIZES = {"train": 120, "clean": 60, "test": 60}
TEXTS = [f"message {i} is {'rude' if i % 2 else 'kind'} enough" for i in range(300)]


def lines(path, label, text=lambda i: TEXTS[i], **more):
    path.write_text("\n".join(json.dumps(
        {"text": text(i), "label": label(i), **{k: v(i) for k, v in more.items()}})
        for i in range(300)))
    return str(path)


def table(path, label, text=lambda i: TEXTS[i], **more):
    pd.DataFrame([{"text": text(i), "label": label(i), **{k: v(i) for k, v in more.items()}}
                  for i in range(300)]).to_csv(path, index=False)
    return str(path)


def whole(task):
    """See that every sample that was read is in one place."""
    report = task.report
    assert report.total(report.read) == report.total(report.kept) + report.total(report.dropped)
    for role in ("train", "clean", "test"):
        samples = getattr(task, role)
        assert [samples.labels.count(k) for k in range(samples.num_labels)] == list(
            report.kept[role].values())
        assert samples.label_names == tuple(report.kept[role])
    return report


# --------------------------------------------------------------- as it was before

@pytest.mark.parametrize(("source", "study"), [("snippets", "attacks"), ("newsgroups", "topic"),
                                               ("fashion", "images")])
def test_the_data_of_the_records_are_those_of_today(source, study):
    found = {run["data"] for run in results.load(study) if run["task"] == source}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # and nobody is warned of them
        task = load_task(source, scale="small")
    assert found == {task.fingerprint()}
    assert "samples read" in str(whole(task))


# ------------------------------------------------------------------------- labels

@pytest.mark.parametrize("label", [
    lambda i: i % 2 == 1, lambda i: i % 2, lambda i: float(i % 2)])
def test_bools_and_whole_floats_are_numbers(tmp_path, label):
    wanted = load_task(lines(tmp_path / "same.jsonl", lambda i: i % 2), sizes=SIZES)
    for write, name in ((lines, "same.jsonl"), (table, "same.csv")):
        task = load_task(write(tmp_path / name, label), sizes=SIZES)
        assert task.fingerprint() == wanted.fingerprint()
        assert {type(y) for y in task.train.labels} == {int}
    labels = [label(i) for i in range(300)]
    for made in (np.array(labels), pd.Series(labels), torch.tensor(labels)):
        assert make_task(TEXTS, made, sizes=SIZES).train.labels == wanted.train.labels


def test_labels_of_a_set_put_together_by_hand_are_whole_numbers():
    for labels in ([True, False], [1.0, 0.0], np.array([1, 0]), pd.Series([1, 0]),
                   (np.bool_(True), np.int8(0)), torch.tensor([1, 0])):
        made = TrainSet(["a", "b"], labels, ["no", "yes"])
        assert made == TrainSet(("a", "b"), (1, 0), ("no", "yes"))
        assert {type(y) for y in made.labels} == {int} and len(made.fingerprint()) == 16
    for labels in ((0.5, 0), ("1", 0), (None, 0), (math.nan, 0), ([1], 0), (2, 0), (-1, 0)):
        with pytest.raises(ValueError, match="sample 0 has label"):
            Examples(("a", "b"), labels, ("no", "yes"))
    with pytest.raises(ValueError, match="name two classes alike"):
        Examples(("a", "b"), (0, 1), ("no", "no"))
    with pytest.raises(ValueError, match="not one text"):
        Examples("ab", (0, 1), ("no", "yes"))


@pytest.mark.parametrize("values", [("0", "1", ""), ("ham", "spam", ""), ("0", "1", "-1"),
                                    ("0", "1", "nan"), ("0.0", "1.0", " ")])
def test_unlabeled_samples_are_rejected_or_dropped(tmp_path, values):
    path = table(tmp_path / "part.csv", lambda i: values[2] if i % 10 == 9 else values[i % 2])
    with pytest.raises(DataError, match="30 of 300 samples are unlabeled .* sample 9 has label .*"
                                        "unlabeled=\"drop\""):
        load_task(path, sizes=SIZES)
    task = load_task(path, sizes=SIZES, unlabeled="drop")
    report = whole(task)
    assert report.dropped["unlabeled"][None] == 30 and task.train.num_labels == 2
    assert "dropped: unlabeled" in str(report) and "(no label)" in str(report)
    with pytest.raises(ValueError, match="use 'reject' or 'drop'"):
        load_task(path, unlabeled="ignore")


@pytest.mark.parametrize(("label", "message"), [
    (lambda i: [i % 3, 3], r"sample 0 has the label \[0, 3\], which is no class"),
    (lambda i: {"name": i % 3}, "sample 0 has the label .*no class"),
    (lambda i: i % 2 if i != 7 else 0.5, "sample 7 has the label 0.5, which is no class: round"),
    (lambda i: "spam" if i % 2 else True,
     "sample 0 has the label True, and sample 1 'spam': use one"),
    (lambda i: i % 2 * 2 - 1, r"the labels are \[-1, 1\]: number the classes from 0"),
    (lambda i: i % 2 * 2, r"the labels are \[0, 2\]"),
    (lambda i: 1, "labels are .1.: number"), (lambda i: "only", "one class only .only."),
    (lambda i: None, "300 of 300 samples are unlabeled"),
    (lambda i: f"class {i}", r"300 classes in 300 samples \(class 0, .*with label=")])
def test_labels_that_are_no_classes_are_rejected(tmp_path, label, message):
    with pytest.raises(DataError, match=message):
        load_task(lines(tmp_path / "odd.jsonl", label), sizes=SIZES)


def test_names_are_kept_and_numbers_in_them_sorted(tmp_path):
    task = load_task(lines(tmp_path / "many.jsonl", lambda i: f"class {i % 12}"), sizes=SIZES)
    assert task.train.label_names == tuple(f"class {k}" for k in range(12))
    task = load_task(table(tmp_path / "codes.csv", lambda i: ("01", "02", "10")[i % 3]),
                     sizes=SIZES)
    assert task.train.label_names == ("01", "02", "10")
    task = load_task(lines(tmp_path / "stars.jsonl", lambda i: str(1 + i % 10)), sizes=SIZES)
    assert task.train.label_names == tuple(map(str, range(1, 11)))
    assert sorted(["v10", "v9", "a", "9", "10"], key=natural) == ["9", "10", "a", "v9", "v10"]


def test_names_that_differ_in_case_or_spaces_only_are_named(tmp_path):
    path = table(tmp_path / "near.csv", lambda i: ("Spam", "spam ", "ham")[i % 3])
    with pytest.warns(UserWarning, match="'Spam', 'spam ' differ in case or spaces only"):
        task = load_task(path, sizes=SIZES)
    assert task.train.label_names == ("Spam", "ham", "spam ")
    with pytest.warns(UserWarning, match="a class named 'None'"):
        load_task(table(tmp_path / "none.csv", lambda i: ("None", "some")[i % 2]), sizes=SIZES)


def test_names_can_be_given():
    task = make_task(TEXTS, [i % 2 for i in range(300)], names=("kind", "rude"), sizes=SIZES)
    same = make_task(TEXTS, [("kind", "rude")[i % 2] for i in range(300)], sizes=SIZES,
                     names=("kind", "rude"))
    assert task.train.label_names == ("kind", "rude")
    assert task.fingerprint() == same.fingerprint()
    with pytest.raises(DataError, match="sample 1 has label 'rude'.*one of kind, wild"):
        make_task(TEXTS, [("kind", "rude")[i % 2] for i in range(300)], names=("kind", "wild"))
    with pytest.raises(DataError, match="300 samples, 2 labels"):
        make_task(TEXTS, [0, 1])
    with pytest.raises(TypeError, match="no option 'unlabelled': use one of"):
        make_task(TEXTS, [0, 1] * 150, unlabelled="drop")
    with pytest.raises(TypeError, match="use make_task"):
        load_task(pd.DataFrame({"text": TEXTS}))


KINDS = st.sampled_from([
    [0, 1], [True, False], [0.0, 1.0], ["a", "b", "c"], ["class 2", "class 10"], ["A", "a"],
    ["", "x", "y"], [0, 1, -1], [None, "x", "y"], [math.nan, 0, 1], [np.int64(0), 1, 2], ["0", 1],
    [pd.NA, 0, 1], [np.float32(1), 0], [0, 1, "x"], ["nan", "y"], [0.5, 0], [[0], 1], [2, 3]])


@given(data=st.data(), kinds=KINDS, count=st.integers(40, 90), typed=st.booleans(),
       drop=st.booleans())
def test_nothing_changes_silently(data, kinds, count, typed, drop):
    """Samples in are samples kept or dropped with a reason; class names in are class names out."""
    labels = data.draw(st.lists(st.sampled_from(kinds), min_size=count, max_size=count))
    texts = data.draw(st.lists(st.sampled_from([*TEXTS[:60], "NA", "null", "MESSAGE 1"]),
                               min_size=count, max_size=count))
    split = data.draw(st.none() | st.lists(st.sampled_from(
        ["train", "Train", "valid", "test", "", None]), min_size=count, max_size=count))
    sizes = data.draw(st.sampled_from([dict.fromkeys(SIZES), {"train": 8, "clean": 4,
                                                              "test": 4}]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            task = make_task(texts, labels, split=split, sizes=sizes,
                             unlabeled="drop" if drop else "reject")
        except DataError as error:
            assert ": " in str(error)  # the remedy
            return
    report = whole(task)
    assert report.total(report.read) == count
    missing = [y for y in labels if y is None or y is pd.NA or y != y or y in ("", -1)]
    assert drop or not missing
    assert sum(dict(report.dropped.get("unlabeled", {})).values()) == len(missing)
    named = {str(int(y)) if not isinstance(y, str) else y for y in labels
             if not any(y is m or y == m for m in missing)}
    assert set(task.train.label_names) == named
    found = {}
    for text, label in zip(texts, labels):
        found.setdefault(text, set()).add(label if isinstance(label, str) else str(label))
    for role in (task.train, task.clean, task.test):
        for text, y in zip(role.inputs, role.labels):
            name = role.label_names[y]
            assert {name, f"{name}.0", str(name == "1")} & found[text]


@given(st.lists(st.sampled_from(["0", "1", "2", "1.0", "true", "False", "nan", "", "07", "x",
                                 "-1", "0.5"]), min_size=1, max_size=8))
def test_labels_without_types_keep_their_names(cells):
    try:
        numbers, names = classes(cells, typed=False)
    except DataError:
        return
    for cell, number in zip(cells, numbers):
        if number is None:
            assert cell in ("", "-1", "nan")
        else:
            said = {"true": "1", "false": "0"}.get(cell.lower(), cell)
            assert names[number] == cell or float(names[number]) == float(said)


# ------------------------------------------------------------------ splits and roles

@pytest.mark.parametrize("names", [
    ("train", "validation", "test"), ("Train", "Dev", "Test"), ("training", "val", "testing"),
    ("train", "valid", "eval"), (" TRAIN", "eval", "tst")])
@pytest.mark.parametrize("column", ["split", "Split "])
def test_the_usual_names_of_splits_are_known(tmp_path, names, column):
    where = [names[i % 5 // 3 + (i % 5 == 4)] for i in range(300)]
    path = table(tmp_path / "split.csv", lambda i: i % 2, lambda i: f"{where[i].strip()} row {i}",
                 **{column: lambda i: where[i]})
    task = load_task(path, sizes={"train": None, "clean": None, "test": None})
    for role, name in zip((task.train, task.clean, task.test), names):
        assert {text.split()[0] for text in role.inputs} == {name.strip()}
    report = whole(task)
    assert len(task.train) == 180 and not report.dropped
    assert {split: sum(row.values()) for split, row in report.read.items()} == {
        "train": 180, "dev": 60, "test": 60}


def test_other_names_of_splits_are_rejected_with_a_list(tmp_path):
    path = table(tmp_path / "split.csv", lambda i: i % 2,
                 split=lambda i: ("train", "fold 1", "extra")[i % 3])
    with pytest.raises(DataError, match="splits called extra, fold 1: use train, dev and"):
        load_task(path, sizes=SIZES)
    task = load_task(path, sizes={"train": 80, "clean": 10, "test": 60},
                     splits={"fold 1": "test", "extra": "drop"})
    assert whole(task).total({"": task.report.dropped["split left out"]}) == 100
    assert all(int(text.split()[1]) % 3 == 1 for text in task.test.inputs)
    with pytest.raises(ValueError, match="use train, dev, test or drop"):
        load_task(path, splits={"extra": "none"})
    assert sum(map(len, SPLITS.values())) == len({x for words in SPLITS.values() for x in words})


def test_a_rare_class_is_in_each_role(tmp_path):
    task = make_task([f"payment {i}" for i in range(600)], [int(i % 75 == 0) for i in range(600)],
                     sizes=SIZES)
    assert [role.labels.count(1) for role in (task.train, task.clean, task.test)] == [4, 2, 2]
    assert [len(role) for role in (task.train, task.clean, task.test)] == [120, 60, 60]
    task = make_task(TEXTS, [int(i in (5, 50, 99)) for i in range(300)], sizes={
        "train": None, "clean": 60, "test": 60})
    assert [role.labels.count(1) for role in (task.train, task.clean, task.test)] == [1, 1, 1]
    with pytest.warns(UserWarning, match="role 'clean' has no sample of the class '1'"):
        task = make_task(TEXTS, [int(i in (5, 50)) for i in range(300)], sizes=SIZES)
    assert [role.labels.count(1) for role in (task.train, task.clean, task.test)] == [1, 0, 1]
    with pytest.raises(DataError, match="no sample to train on of the class 'rude'"):
        make_task(TEXTS, ["rude" if i > 200 else ("kind", "dull")[i % 2] for i in range(300)],
                  sizes=SIZES, split=["test" if i > 200 else "train" for i in range(300)])


def test_one_text_with_two_labels_is_reported():
    with pytest.warns(UserWarning, match="2 samples repeat another one with another label"):
        task = make_task([*TEXTS, TEXTS[0], TEXTS[3].upper(), TEXTS[5]],
                         [*(i % 2 for i in range(300)), 1, 0, 1], sizes=SIZES)
    dropped = whole(task).dropped
    assert sum(dropped["repeated"].values()) == 1


@pytest.mark.parametrize(("sizes", "message"), [
    ({"dev": 10}, "the role 'dev': use train, clean, test"), ({"test": 0}, "0 samples"),
    ({"test": -5}, "-5 samples"), ({"train": 1.5}, "1.5 samples"), ({"train": True}, "True"),
    ([1, 2], "sizes is a list: write")])
def test_sizes_that_are_none(sizes, message):
    with pytest.raises(DataError, match=message):
        make_task(TEXTS, [0, 1] * 150, sizes=sizes)


# -------------------------------------------------------------------------- files

ROWS = pd.DataFrame({"text": [f'he said "no", {i}; and | left' for i in range(300)],
                     "label": ["bad", "good"] * 150, "more": [1] * 300})


@pytest.mark.parametrize(("name", "options"), [
    ("a.tsv", {"sep": "\t"}), ("a.csv", {"sep": ";"}), ("b.csv", {"sep": "\t"}),
    ("c.csv", {"sep": "|"}), ("A.CSV", {}), ("a.csv.gz", {"compression": "gzip"}),
    ("A.TSV.GZ", {"sep": "\t", "compression": "gzip"}), ("d.csv", {"quoting": 1, "sep": ";"}),
    ("e.csv", {"lineterminator": "\r"}), ("f.csv", {"lineterminator": "\r\n"}),
    ("g.csv", {"encoding": "utf-16"}), ("h.csv", {"encoding": "utf-8-sig"}),
    ("i.csv", {"encoding": "utf-32"})])
def test_tables_of_all_kinds(tmp_path, name, options):
    ROWS.to_csv(tmp_path / name, index=False, **options)
    task = load_task(tmp_path / name, sizes=SIZES)
    assert task.fingerprint() == make_task(ROWS.text, ROWS.label, sizes=SIZES).fingerprint()
    assert task.name == name.split(".")[0]


@pytest.mark.parametrize("write", [
    lambda p: p.with_suffix(".json").write_text(ROWS.to_json(orient="records")),
    lambda p: p.with_suffix(".json").write_text(ROWS.to_json()),
    lambda p: p.with_suffix(".json").write_text(json.dumps(ROWS.to_dict("list"))),
    lambda p: p.with_suffix(".json").write_text(
        json.dumps({"version": 1, "data": ROWS.to_dict("records")}, indent=1)),
    lambda p: p.with_suffix(".json").write_text(ROWS.to_json(orient="records", lines=True)),
    lambda p: p.with_suffix(".JSONL").write_text(ROWS.to_json(orient="records", lines=True)),
    lambda p: p.with_suffix(".jsonl").write_text(ROWS.to_json(orient="records")),
    lambda p: p.with_suffix(".jsonl.gz").write_bytes(gzip.compress(
        ROWS.to_json(orient="records", lines=True).replace("\n", "\r\n").encode("utf-8-sig"))),
    lambda p: ROWS.to_parquet(p.with_suffix(".parquet")),
    lambda p: ROWS.astype({"label": "category"}).to_parquet(p.with_suffix(".Parquet"))])
def test_json_and_parquet_of_all_kinds(tmp_path, write):
    write(tmp_path / "mine")
    task = load_task(next(tmp_path.iterdir()), sizes=SIZES)
    assert task.fingerprint() == make_task(ROWS.text, ROWS.label, sizes=SIZES).fingerprint()


def test_excel_may_name_the_separator(tmp_path):
    (tmp_path / "x.csv").write_text("sep=|\n" + ROWS.to_csv(index=False, sep="|"))
    task = load_task(tmp_path / "x.csv", sizes=SIZES)
    assert task.fingerprint() == make_task(ROWS.text, ROWS.label, sizes=SIZES).fingerprint()


def test_columns_may_have_numbers_for_names(tmp_path):
    pd.DataFrame(list(zip(ROWS.text, ROWS.label))).to_csv(tmp_path / "dump.csv")
    for names in ({"text": "0", "label": "1"}, {"text": 0, "label": 1}):
        assert len(load_task(tmp_path / "dump.csv", sizes=SIZES, **names).train) == 120
    with pytest.raises(DataError, match="no column 'text': it has '', '0', '1' .from its first "):
        load_task(tmp_path / "dump.csv", sizes=SIZES)


def test_encodings(tmp_path):
    path = tmp_path / "old.csv"
    path.write_bytes(("text,label\n" + "".join(f"le café n° {i} était “bon”,{i % 2}\n"
                                               for i in range(300))).encode("cp1252"))
    with pytest.raises(DataError, match="not UTF-8 .byte 0xe9 in line 2.: name its encoding, such "
                                        "as encoding=\"cp1252\""):
        load_task(path, sizes=SIZES)
    task = load_task(path, sizes=SIZES, encoding="cp1252")
    assert "“bon”" in task.train.inputs[0]
    with pytest.raises(DataError, match="no encoding 'cp99': name one that Python knows"):
        load_task(path, encoding="cp99")
    path.write_bytes("text,label\nä,0\n".encode("utf-16-le"))
    with pytest.raises(DataError, match="utf-16-le"):
        load_task(path)


def test_words_that_mean_nothing_elsewhere_are_texts(tmp_path):
    words = ("NA", "null", "None", "nan", "N/A", "")
    path = table(tmp_path / "words.csv", lambda i: i % 2,
                 lambda i: words[i] if i < 5 else TEXTS[i])
    task = load_task(path, sizes={"train": None, "clean": 20, "test": 20})
    assert {*words[:5]} <= {*task.train.inputs, *task.clean.inputs, *task.test.inputs}


@pytest.mark.parametrize(("content", "message"), [
    ('text,label\n"never closed,0\nb,1\nc,0\n', "quote in line 2 goes wrong"),
    ('text,label\na,0\n"open,1\nb,0\nc,1\nsize 5",0\nd,1\n',
     "quote that opens in line 3 takes in .* up to line 6"),
    ('text,label\n"x" y,0\nb,1\n', "quote in line 2 goes wrong"),
    ("text,label\na,0\nb, c,1\n", "line 3 has 3 cells, the first line 2: quote"),
    ("text,label\na,0\nb\n", "line 3 has 1 cells"), ("text,text,label\na,b,0\n", "two columns"),
    ("", "is empty"), ("text,label\n", "holds no samples"), ("text,label\n,0\na,1\n", "no text")])
def test_no_line_is_lost(tmp_path, content, message):
    (tmp_path / "bad.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_task(tmp_path / "bad.csv")


def test_quotes_and_line_ends_inside_of_a_text_are_kept(tmp_path):
    texts = [f'a "quoted, {i}"\nsecond line, and\n\nmore \u2028 {"long " * 40000 * (i == 3)}'
             for i in range(60)]
    pd.DataFrame({"text": texts, "label": [0, 1] * 30}).to_csv(tmp_path / "x.csv", index=False)
    task = load_task(tmp_path / "x.csv", sizes={"train": None, "clean": 9, "test": 9})
    assert sorted((*task.train.inputs, *task.clean.inputs, *task.test.inputs)) == sorted(texts)


def test_tabs_often_come_without_quotes(tmp_path):
    (tmp_path / "x.tsv").write_text("text\tlabel\n" + "".join(
        f'"open {i}\t{i % 2}\n' for i in range(60)))
    task = load_task(tmp_path / "x.tsv", sizes={"train": 30, "clean": 9, "test": 9})
    assert task.train.inputs[0].startswith('"open')
    assert "quotes stand for themselves" in task.report.notes


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.jsonl", '{"text": "a", "label": 0}\n{"text": "b"\n', "line 2 is no JSON"),
    ("a.json", '[{"text": "a"', "is no JSON"), ("a.json", "3", "no samples in a form"),
    ("a.jsonl", "[1]\n[2]", "no JSON"), ("a.json", "[" * 100000, "is no JSON"),
    ("a.jsonl", '{"label": ' + "9" * 5000 + "}", "line 1 is no JSON"),
    ("a.jsonl", '"a"\n', "sample 0 is a str"),
    ("a.parquet", "PAR1 no", "no whole parquet file"), ("a.csv.gz", b"\x1f\x8b\x08\x00cut",
                                                       "cannot be unpacked"),
    ("a.xlsx", "PK", "form that is not known: save it as one of .csv")])
def test_damaged_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        load_task(tmp_path / name)


def test_texts_that_are_none(tmp_path):
    for text, message in ((lambda i: ["a", str(i)], "sample 0 has no text but a list"),
                          (lambda i: None if i == 4 else "x", "sample 4 has no text: drop it"),
                          (lambda i: i, "sample 0 has no text but a int"),
                          (lambda i: f"cut {i} \ud83d" if i == 18 else f"{i}",
                           "sample 18 holds half a character")):
        with pytest.raises(ValueError, match=message):
            load_task(lines(tmp_path / "x.jsonl", lambda i: i % 2, text), sizes=SIZES)
    with pytest.raises(ValueError, match="sample 1 holds half a character"):
        Examples(("fine 🙂", "cut \ud83d"), (0, 1), ("a", "b"))


def test_names_of_classes_that_a_file_carries(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    kinds = Features(text=Value("string"), label=ClassLabel(names=["kind", "rude"]))
    made = Dataset.from_dict({"text": TEXTS, "label": [0, 1] * 150}, features=kinds)
    made.to_parquet(tmp_path / "named.parquet")
    task = load_task(tmp_path / "named.parquet", sizes=SIZES)
    assert task.train.label_names == ("kind", "rude")


def test_options_are_checked(tmp_path):
    path = table(tmp_path / "x.csv", lambda i: i % 2)
    with pytest.raises(ValueError, match="use one character"):
        load_task(path, separator=", ")
    with pytest.raises(DataError, match="snippets is known to the book"):
        load_task("snippets", encoding="cp1252")
    with pytest.raises(DataError, match="has no column 'text'"):
        load_task(path, separator=";")
    with pytest.raises(DataError, match="no home folder"):
        load_task("~nobodyknows/x.csv")
    for nothing in ("", "hub:", " "):
        with pytest.raises(ValueError, match=f"unknown data set '{nothing}'"):
            load_task(nothing)
    for samples, labels in (("a text", [0, 1]), (None, [0, 1]), (TEXTS, None), (TEXTS, "01")):
        with pytest.raises(TypeError, match="give a list, an array or a column of a table"):
            make_task(samples, labels)
    with pytest.raises(ValueError, match="names of classes: sample 1 holds half a character"):
        make_task(TEXTS, ["a", "b \ud83d"] * 150, sizes=SIZES)
    with pytest.raises(ValueError, match="sample 1 has no text: drop it"):
        make_task(["a", pd.NA, "c"], [0, 1, 0])


VALID = {".csv": "text,label\n" + "".join(f'"a, {i}",{i % 2}\n' for i in range(40)),
         ".tsv": "text\tlabel\tsplit\n" + "".join(f"a {i}\t{i % 2}\ttrain\n" for i in range(40)),
         ".jsonl": "".join(f'{{"text": "a {i}", "label": {i % 2}}}\n' for i in range(40)),
         ".json": json.dumps([{"text": f"a {i}", "label": i % 2} for i in range(40)])}


@pytest.mark.parametrize(("head", "row"), [
    ("text,label", '"a, {0}",{1}'), ("text,label", "a {0},{1}"), ("label,text", "{1},a {0}"),
    ("id,label,text,z", '{0},x{1},"a ""q"" {0}",z'), ("id,label,text,z", "{0},x{1},a {0},z")])
@pytest.mark.filterwarnings("ignore:.*has no sample of the class")
def test_stray_quotes_lose_no_sample(tmp_path, head, row):
    whole_file = "\n".join([head, *(row.format(i, i % 2) for i in range(12)), ""])
    path, read = tmp_path / "x.csv", 0
    for first in range(len(head) + 1, len(whole_file), 2):
        for second in (first, first + 3, first + 11, first + 15):
            path.write_text(f'{whole_file[:first]}"{whole_file[first:second]}"{whole_file[second:]}')
            try:
                report = load_task(path, sizes={"train": 4, "clean": 2, "test": 2}).report
            except DataError:
                continue
            assert report.total(report.read) == 12
            read += 1
    assert read


@given(suffix=st.sampled_from([*VALID]), at=st.integers(0, 500), cut=st.integers(0, 40),
       new=st.sampled_from([b"", b'"', b"\xff", b"\0", b"\r", b"{", b",", b"\t", b"[" * 9, b"\n\n",
                            b"\xff\xfe", b"\\ud83d", b"NaN", b"1e999", b"\x1f\x8b"]))
def test_no_other_error_comes_through(suffix, at, cut, new, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / f"mutated{suffix}"
    data = VALID[suffix].encode()
    path.write_bytes(data[:at] + new + data[at + cut:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            whole(load_task(path, sizes={"train": 9, "clean": 4, "test": 4}))
        except ValueError as error:
            assert type(error) in (ValueError, DataError) and ": " in str(error)
