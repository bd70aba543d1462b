"""Recorded runs in order of value, on a machine that has a GPU and no network, until a deadline.

    python benchmarks/gpu.py --data FOLDER --out FOLDER --seconds 540 --workers 8
    python benchmarks/gpu.py --bench                   # speed of the training alone, 20 s

FOLDER of the data holds `sst2.parquet`, `sst2_paraphrases.parquet`, `ag_news.parquet` and
CIFAR-10; encoders and Fashion-MNIST are taken from the cache. What comes out: `records.tar.gz`,
`log.jsonl` and `table.txt`. Each is whole whenever the program ends. `--tiny` tries all of this in
a minute on a processor, with networks of a few weights and an encoder in FOLDER/encoder.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import queue
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

# What is run first, from the top: scale, victims (a study, or what follows a name), and seeds.
TEXT = ("sst2-base", "bedkd-sst2-base", "dup-sst2-base")
NEWS = ("ag-news-base", "bedkd-ag-news-base", "dup-ag-news-base")
IMAGES = ("cifar10-resnet18", "ntml-cifar10-resnet18")
SMALL = ("bedkd", "dup", "ntml", "bedkd-images")
MORE = (  # then most of what else is recorded at `small`
    "ntml-choices", "baselines", "filters", "images", "baselines-train", "baselines-train-text",
    "bedkd-rates", "dup-rates", "ntml-rates", "low-rate", "relearning", "ntml-cifar10",
    "images-cifar10", "baselines-cifar10", "ntml-counts", "ntml-adaptive", "ntml-text",
    "dup-deviations", "bedkd-sst2", "dup-sst2", "bedkd-ag-news", "dup-ag-news", "bedkd-topic",
    "dup-topic", "bedkd-breaks", "bedkd-parts", "bedkd-deviations", "baselines-text")
PRIORITY: list[tuple[str, tuple[str, ...], tuple[int, ...]]] = [
    ("full", TEXT, (0,)),
    ("full", IMAGES, (0,)),
    ("small", SMALL, (0, 1, 2)),
    ("full", TEXT, (1,)),
    ("full", TEXT, (2,)),
    ("full", IMAGES, (1,)),
    ("small", MORE, (0, 1, 2)),
    ("small", ("false-alarms",), tuple(range(20))),
    ("full", NEWS, (0, 1, 2)),
    ("full", IMAGES, (2,)),
]
NOTE = "BDUTILS_ENCODER_NOTE"  # what a record shall say of the weights of `mpnet`
SHARES = ("cacc", "asr", "floor", "pacc", "clean_pacc", "ra", "cacc_before", "asr_before")


@dataclass(frozen=True)
class Job:
    """One victim and all that is done with it, in one process."""

    number: int
    scale: str
    runs: tuple  # of (study, Run)

    def __str__(self) -> str:
        study, run = self.runs[0]
        return f"{study}/{run.name}"


def jobs(only: str = "*", tiny: bool = False) -> list[Job]:
    """Return the queue: within each line of `PRIORITY` the clean victims come first."""
    from bdutils.experiments.studies import STUDIES

    found: dict[tuple, list] = {}
    for line, (scale, studies, seeds) in enumerate(PRIORITY):
        for study in () if tiny and studies is MORE else studies:
            for run in STUDIES[study]:
                if run.seed not in seeds or not any(
                        fnmatch(f"{study}/{run.name}", pattern) for pattern in only.split(",")):
                    continue
                victim = replace(run, defense="")
                key = (line, seeds.index(run.seed), run.attack is not None, scale, victim)
                found.setdefault(key, []).append((study, run))
    # In the order of the lines, then of the seeds; Python's sort keeps that of the studies.
    ordered = sorted(found.items(), key=lambda item: item[0][:3])
    if tiny:
        ordered = _fewest(ordered)
    return [Job(number, key[3], tuple(runs)) for number, (key, runs) in enumerate(ordered)]


def _fewest(ordered: list) -> list:
    """Keep of each study a clean run, an attacked one and one of each defense."""
    kept, seen = [], set()
    for key, runs in ordered:
        new = [(study, run) for study, run in runs
               if (study, run.defense, run.task, run.attack is None) not in seen
               and "forced" not in run.defense]
        seen |= {(study, run.defense, run.task, run.attack is None) for study, run in new}
        kept += [(key, new)] if new else []
    return kept


# ------------------------------------------------------------------- in a worker

def work(number: int, todo: Any, said: Any, options: dict) -> None:
    """Make the runs of jobs until there are none."""
    prepare(options)
    while (job := todo.get()) is not None:
        said.put({"event": "job", "worker": number, "job": job.number, "name": str(job)})
        for study, run in job.runs:
            said.put(one(job, study, run, options) | {"worker": number, "job": job.number})
    said.put({"event": "bye", "worker": number})


def prepare(options: dict) -> None:
    """Set up a worker process."""
    os.environ["BDUTILS_QUIET"] = "1"
    import torch

    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    if options["tiny"]:
        shrink(Path(options["data"]))


def shrink(data: Path) -> None:
    """Make networks, sets and trainings tiny, to try the program itself."""
    from bdutils import data as sets
    from bdutils import evaluation, training
    from bdutils.experiments import run, variants
    from bdutils.models import image, text

    def tiny_encoder(encoder: str | None = None) -> str:
        return str(data / "encoder") if encoder in (None, "small", "full", "mpnet") else encoder

    evaluation.encoder_source = text.encoder_source = tiny_encoder
    nets = {name: image.NetworkConfig(widths=(4, 8), blocks=(1, 1), stem_stride=2)
            for name in image.NETWORKS}
    image.NETWORKS.update(nets)
    for sizes in (*sets.SIZES.values(), *sets.IMAGE_SIZES.values()):
        sizes.update({"train": 160, "clean": 60, "test": 60})
    run.FULL_TRAINING["cifar10"] = {"epochs": 1, "lr": 0.1}
    variants.CLEAN_IMAGES = 60
    for kind in (training.TrainConfig, training.ImageTrainConfig):
        kind.FULL = {**kind.FULL, "epochs": 1}


def one(job: Job, study: str, run: Any, options: dict) -> dict:
    """Make one run, keep its record, and tell what it took."""
    from bdutils import use_scale
    from bdutils.experiments import results
    from bdutils.experiments.run import make_record

    use_scale(job.scale)
    folder, started = Path(options["work"]), time.time()
    told = {"event": "run", "study": study, "name": run.name, "scale": job.scale,
            "started": started}
    try:
        own = run.task in ("images", "sentiment", "topic", "topic8") and job.scale == "small"
        data = None if own else Path(options["data"])
        made = make_record(study, run, data)
        if run.encoder == "mpnet" and os.environ.get(NOTE):
            made["settings"]["encoder_note"] = os.environ[NOTE]
        results.save(made, folder / "records")
        return told | {"seconds": made["seconds"], "wall": time.time() - started}
    except Exception:  # the others go on
        return told | {"event": "failed", "note": traceback.format_exc()[-3000:],
                       "wall": time.time() - started}


# ------------------------------------------------------------------- the program

class Output:
    """The few files that come out, each of which is whole at any time."""

    def __init__(self, work: Path, out: Path) -> None:
        """Write into `out` what the workers leave in `work`."""
        self.work, self.out = work, out
        out.mkdir(parents=True, exist_ok=True)
        self.log = (out / "log.jsonl").open("a", encoding="utf8")

    def tell(self, **event: Any) -> None:
        """Write a line into the log."""
        self.log.write(json.dumps(event) + "\n")
        self.log.flush()

    def pack(self) -> None:
        """Pack the records anew."""
        part = self.out / "records.part"
        with tarfile.open(part, "w:gz", compresslevel=3) as tar:
            # File by file: a record that is being written has another name until it is whole.
            for path in sorted((self.work / "records").glob("*/*.json")):
                tar.add(path, f"records/{path.parent.name}/{path.name}")
        part.replace(self.out / "records.tar.gz")


class Share:
    """How busy the card was, as nvidia-smi has it; nothing where there is none."""

    def __init__(self) -> None:
        """Start to watch."""
        self.program = None
        if shutil.which("nvidia-smi"):
            self.file = tempfile.TemporaryFile("w+")
            self.program = subprocess.Popen(
                ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "-l", "2",
                 "--format=csv,noheader,nounits"], stdout=self.file, stderr=subprocess.DEVNULL)

    def end(self) -> str:
        """Stop, and say what was seen."""
        if self.program is None:
            return "no nvidia-smi"
        self.program.terminate()
        self.program.wait(10)
        self.file.seek(0)
        seen = [line.split(",") for line in self.file if line.count(",") == 1]
        busy = [float(x) for x, _ in seen if x.strip().isdigit()]
        used = [float(x) for _, x in seen if x.strip().isdigit()]
        if not busy:
            return "nvidia-smi said nothing"
        return f"card busy {sum(busy) / len(busy):.0f}% of the time, {max(used):.0f} MiB at most"


def start_mps(work: Path) -> dict[str, str]:
    """Start the service that lets processes share the card, if there is one that works."""
    program = shutil.which("nvidia-cuda-mps-control")
    if not program or "CUDA_MPS_PIPE_DIRECTORY" in os.environ:  # whose service that is, ends it
        return {}
    places = {f"CUDA_MPS_{name}_DIRECTORY": str(work / f"mps-{name.lower()}")
              for name in ("PIPE", "LOG")}
    for place in places.values():
        os.makedirs(place, exist_ok=True)
    env = {**os.environ, **places}
    probe = ("import ctypes as c; l = c.CDLL('libcuda.so.1'); d, x = c.c_int(), c.c_void_p(); "
             "assert not l.cuInit(0) and not l.cuDeviceGet(c.byref(d), 0); "
             "assert not l.cuDevicePrimaryCtxRetain(c.byref(x), d)")
    try:
        subprocess.run([program, "-d"], env=env, timeout=20, check=True)
        subprocess.run([sys.executable, "-c", probe], env=env, timeout=30, check=True)
        return places
    except (OSError, subprocess.SubprocessError) as error:
        print(f"no MPS: {error}", flush=True)
        stop_mps(places)
        return {}


def stop_mps(places: dict[str, str]) -> None:
    """End the service again."""
    if places:
        try:
            subprocess.run(["nvidia-cuda-mps-control"], input="quit\n", text=True, timeout=20,
                           env={**os.environ, **places}, capture_output=True)
        except (OSError, subprocess.SubprocessError) as error:
            print(f"MPS did not end: {error}", flush=True)


def carry_out(given: argparse.Namespace, until: float) -> int:
    """Run the queue; return how many runs failed."""
    work = Path(tempfile.mkdtemp(prefix="gpu-"))
    output, places = Output(work, given.out), start_mps(work)
    os.environ |= places
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    todo_jobs = jobs(given.only, given.tiny)
    output.tell(event="start", jobs=len(todo_jobs), mps=bool(places), workers=given.workers)
    print(f"{len(todo_jobs)} jobs, {sum(len(job.runs) for job in todo_jobs)} runs, "
          f"MPS: {bool(places)}", flush=True)
    context, share = mp.get_context("spawn"), Share()
    todo, said = context.Queue(), context.Queue()
    for job in [*todo_jobs, *[None] * given.workers]:
        todo.put(job)
    options = {"data": str(given.data), "work": str(work), "tiny": given.tiny}
    crew = [context.Process(target=_module().work, args=(number, todo, said, options),
                            daemon=True) for number in range(given.workers)]
    for worker in crew:
        worker.start()
    events = _listen(crew, said, output, until)
    for worker in crew:
        if worker.is_alive():
            worker.terminate()
    for worker in crew:
        worker.join(5)
        if worker.is_alive():
            worker.kill()
    output.pack()
    text = "\n".join([table(work / "records"), speed(events), share.end()])
    (given.out / "table.txt").write_text(text + "\n", encoding="utf8")
    print(text, flush=True)
    stop_mps(places)
    shutil.rmtree(work, ignore_errors=True)
    failed = [event for event in events if event["event"] == "failed"]
    for event in failed:
        print(f"FAILED {event['study']}/{event['name']}\n{event['note']}", flush=True)
    return len(failed)


def _listen(crew: list, said: Any, output: Output, until: float) -> list[dict]:
    """Write down what the workers say until all have ended, or the time is over."""
    events, busy, gone, last = [], {}, set(), 0.0
    while time.time() < until and len(gone) < len(crew):
        try:
            event = said.get(timeout=1)
        except queue.Empty:
            for number, worker in enumerate(crew):
                if number not in gone and worker.exitcode is not None:
                    gone.add(number)
                    output.tell(event="died", worker=number, code=worker.exitcode,
                                job=busy.get(number))
                    print(f"worker {number} died at {busy.get(number)}", flush=True)
            continue
        event["at"] = round(time.time() - START, 1)
        if event["event"] == "bye":
            gone.add(event["worker"])
            continue
        if event["event"] == "job":
            busy[event["worker"]] = event["name"]
        events.append(event)
        output.tell(**event)
        if event["event"] != "job":
            print(f"{event['at']:6.0f} s  {event['event']} {event['study']}/{event['name']} "
                  f"{event.get('wall', 0):.0f} s", flush=True)
        if event["event"] == "run" and time.time() - last > 2:
            output.pack()
            last = time.time()
    return events


def table(folder: Path) -> str:
    """Return one line a record, in percent."""
    lines = []
    for path in sorted(folder.glob("*/*.json")):
        made = json.loads(path.read_text(encoding="utf8"))
        found = made["metrics"]
        shown = {name: found[name]["value"] if isinstance(found[name], dict) else found[name]
                 for name in found}
        cells = " ".join(f"{name} {100 * shown[name]:.1f}" for name in SHARES if name in shown)
        acted = {1: " changed", 0: " left alone"}.get(shown.get("changed"), "")
        took = sum(made["seconds"].values())
        lines.append(f"{made['study']}/{made['name']}: {cells}{acted} {took:.0f} s")
    return "\n".join(lines)


def speed(events: list[dict]) -> str:
    """Return how long the trainings of the victims took, by study."""
    by_study: dict[str, list[float]] = {}
    for event in events:
        if "training" in event.get("seconds", {}):
            by_study.setdefault(event["study"], []).append(event["seconds"]["training"])
    return "; ".join(f"{study}: a victim's training {min(took):.0f} to {max(took):.0f} s"
                     for study, took in by_study.items())


def bench(seconds: float) -> None:
    """Print images a second of one training alone, and its share of the card's matrix rate."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from bdutils.models.image import ImageClassifier
    from bdutils.roles import Images, TrainSet
    from bdutils.training import ImageTrainConfig, train

    os.environ["BDUTILS_QUIET"] = "1"
    torch.backends.cudnn.benchmark = True
    on_gpu = torch.cuda.is_available()
    device, side, kind = (("cuda", 8192, torch.bfloat16) if on_gpu
                          else ("cpu", 512, torch.float32))
    a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    for _ in range(2):  # the first time is a warm-up
        wait()
        start = time.perf_counter()
        for _ in range(20):
            a @ b
        wait()
        rate = 20 * 2 * side**3 / (time.perf_counter() - start)
    classifier = ImageClassifier.new(10, channels=3, network="full", pad=4)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        classifier.model.eval()(torch.rand(1, 3, 32, 32, device=classifier.model.device))
    flops = 3 * counter.get_total_flops()  # backward is twice forward
    pixels = torch.randint(0, 256, (12800 if on_gpu else 256, 3, 32, 32), dtype=torch.uint8)
    samples = TrainSet(Images(pixels), [i % 10 for i in range(len(pixels))],
                       tuple(map(str, range(10))))
    images, spent, size = 0, 0.0, 128
    for size in (128, 512):
        config = ImageTrainConfig(epochs=1, lr=0.01, batch_size=size)
        train(classifier, samples, config)  # warm-up
        images, spent = 0, 0.0
        while spent < seconds / 2:
            spent += train(classifier, samples, replace(config, epochs=3)).seconds
            images += 3 * len(samples)
        print(f"batch {size}: {images / spent:.0f} images/s, {flops * images / spent / 1e12:.1f} "
              f"TFLOP/s, {100 * flops * images / spent / rate:.1f}% of {rate / 1e12:.1f} TFLOP/s "
              f"({kind} matrices of {side})", flush=True)


def _module() -> Any:
    """Return this file as a module that workers can import."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import gpu

    return gpu


def main() -> None:
    """Run the command line; see the module's text."""
    parser = argparse.ArgumentParser(description="recorded runs until a deadline")
    parser.add_argument("--data", type=Path, help="folder with TASK.parquet files")
    parser.add_argument("--out", type=Path, help="folder for what comes out")
    parser.add_argument("--seconds", type=float, default=540, help="until everything ends")
    parser.add_argument("--workers", type=int, default=8, help="processes on the card")
    parser.add_argument("--only", default="*", help="patterns of STUDY/RUN, with commas")
    parser.add_argument("--tiny", action="store_true", help="try the program itself")
    parser.add_argument("--bench", action="store_true", help="speed of the training alone")
    parser.add_argument("--list", action="store_true", help="show the queue")
    given = parser.parse_args()
    if given.bench:
        return bench(min(given.seconds, 20))
    if given.list:
        for job in jobs(given.only, given.tiny):
            print(job.number, job.scale, job, *(run.defense for _, run in job.runs))
        return None
    if not given.data or not given.out:
        parser.error("name the folders: --data and --out")
    given.data, given.out = given.data.resolve(), given.out.resolve()
    sys.exit(carry_out(given, START + given.seconds) > 0)


START = time.time()
if __name__ == "__main__":
    main()
