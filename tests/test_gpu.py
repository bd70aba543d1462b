"""The prepared script for a GPU, tried on the processor; and what it takes from a folder."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bdutils import assets
from bdutils.data import known, load_task
from bdutils.experiments import results
from bdutils.experiments.studies import STUDIES

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402


def png(value):
    """A file of one color, with a little noise so that no two are the same."""
    rng = np.random.default_rng(value)
    pixels = np.clip(25 * (value % 10) + rng.integers(0, 20, (32, 32, 3)), 0, 255)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def write_images(folder, part, numbers):
    pq.write_table(pa.table({"img": [png(i) for i in numbers],
                             "label": [i % 10 for i in numbers]}),
                   folder / f"cifar10_{part}.parquet")


def write_texts(folder, name, words):
    made = [(split, f"the {split} film number {i} by somebody is {words[i % len(words)]} indeed",
             i % len(words))
            for split, count in (("train", 200), ("dev", 80), ("test", 80))
            for i in range(count)]
    split, text, label = (list(column) for column in zip(*made))
    pq.write_table(pa.table({"split": split, "text": text, "label": label}),
                   folder / f"{name}.parquet")


@pytest.fixture
def data(tmp_path, tiny_folder):
    """A folder as the script wants it, of a few samples."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_texts(folder, "sst2", ["awful", "lovely"])
    write_texts(folder, "ag_news", ["war", "goal", "price", "atom"])
    write_images(folder, "train", range(300))
    write_images(folder, "test", range(300, 400))
    (folder / "encoder").symlink_to(tiny_folder)
    return folder


@pytest.mark.alone
@pytest.mark.slow
def test_the_whole_queue_runs_on_tiny_sizes(data, tmp_path):
    for name in ("minilm", "snippets", "fashion_mnist"):
        asset = assets.asset(name)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/assets").symlink_to(asset.parent)
    out = tmp_path / "out"
    env = {**os.environ, "BDUTILS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT),
           "CUDA_VISIBLE_DEVICES": "", gpu.NOTE: "rounded"}
    run = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--data", data, "--out", out, "--seconds", "3000",
         "--workers", "2", "--tiny"], cwd=ROOT, env=env, capture_output=True, text=True)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    print(run.stdout)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    wanted = {(study, r.name) for job in gpu.jobs(tiny=True) for study, r in job.runs}
    assert {(e["study"], e["name"]) for e in log if e["event"] == "run"} == wanted
    with tarfile.open(out / "records.tar.gz") as tar:
        tar.extractall(tmp_path / "found", filter="data")
    for study, name in wanted:
        made = results.read(results.place(study, name, tmp_path / "found/records"))
        assert made["scale"] == ("full" if {"encoder_note"} <= set(made["settings"])
                                 or "cifar10" in study else "small")
    said = (out / "table.txt").read_text()
    assert all(f"{study}/{name}: cacc " in said for study, name in wanted)


@pytest.mark.slow
def test_the_deadline_ends_everything(data, tmp_path):
    out = tmp_path / "out"
    run = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--data", data, "--out", out, "--seconds", "3",
         "--workers", "1", "--tiny"], cwd=ROOT, capture_output=True, text=True, timeout=400,
        env={**os.environ, "BDUTILS_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)})
    assert run.returncode == 0, run.stderr
    assert (out / "records.tar.gz").is_file() and (out / "table.txt").is_file()


def test_an_error_is_told_and_the_others_go_on(monkeypatch, tmp_path):
    def fail(study, run, *_):
        raise RuntimeError("no luck")

    monkeypatch.setattr("bdutils.experiments.run.make_record", fail)
    monkeypatch.setenv("BDUTILS_SCALE", "small")
    job = gpu.jobs("sst2-base/clean*")[0]
    told = gpu.one(job, *job.runs[0], {"work": str(tmp_path), "data": str(tmp_path)})
    assert told["event"] == "failed" and "RuntimeError: no luck" in told["note"]


def test_the_queue_is_in_order_of_value():
    queue = gpu.jobs()
    first = queue[0].runs
    assert [(study, run.defense) for study, run in first] == [
        ("sst2-base", ""), ("bedkd-sst2-base", "bedkd"), ("dup-sst2-base", "dup")]
    assert all(run.attack is None and run.encoder == "mpnet" for _, run in first)
    runs = [(study, run.name) for job in queue for study, run in job.runs]
    assert len(runs) == len(set(runs))
    for study in {study for _, studies, _ in gpu.PRIORITY for study in studies}:
        assert {run.name for run in STUDIES[study]} == {n for s, n in runs if s == study}
    for job in queue:  # one victim each
        assert len({(r.task, r.attack, r.poison_rate, r.seed, r.label_mode, r.encoder)
                    for _, r in job.runs}) == 1
    assert all(study == "sst2-base" for job in gpu.jobs("sst2-base/*") for study, _ in job.runs)


def test_images_of_a_folder_are_decoded_once(data, cache, monkeypatch):
    sizes = {"train": 100, "clean": 20, "test": 50}
    first = load_task("cifar10", folder=data, sizes=sizes)
    calls = []
    of_cell = known.of_cell
    monkeypatch.setattr(known, "of_cell", lambda *given: calls.append(1) or of_cell(*given))
    again = load_task("cifar10", folder=data, sizes=sizes)
    assert first.fingerprint() == again.fingerprint() and not calls
    write_images(data, "train", range(1000, 1300))  # other files are other images
    assert load_task("cifar10", folder=data, sizes=sizes).fingerprint() != first.fingerprint()
    assert calls


def test_known_texts_come_from_a_folder_in_one_call(data):
    task = load_task("sst2", folder=data, scale="full")
    assert (task.name, task.train.label_names) == ("sst2", ("negative", "positive"))
    assert len(task.train) == 200 and len(task.test) == 80
    with pytest.raises(FileNotFoundError, match="no file .*olid.parquet"):
        load_task("olid", folder=data, scale="full")
