"""Two processes train one model: this file is also the program that they run."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor

from bdutils import assets, distributed, training
from bdutils import evaluation as victims
from bdutils.attacks.image import LabelConsistent
from bdutils.distributed import pick_device, process_group, share
from bdutils.models.image import ImageClassifier, write_weights
from bdutils.models.text import Classifier
from bdutils.roles import CleanSet, Images, Task, TestSet, TrainSet
from bdutils.training import ImageTrainConfig, TrainConfig, TrainReport, train

pytestmark = pytest.mark.alone
ROOT = Path(__file__).resolve().parents[1]
LAUNCHERS = {
    # Its --cpu would start one process alone; --multi_gpu asks for no GPU.
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
                   "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"],
    "torchrun": ["torch.distributed.run", "--nproc_per_node", "2"],
}
# Batches of 4, the last one of 1: the second process has no sample of it. Batches of 8 and 5.
UNEVEN = {"empty": (21, 4), "unequal": (21, 8)}


# ---------------------------------------------------------------- the program

@dataclass(frozen=True)
class Plain(TrainConfig):
    """Steps in proportion to the gradient: Adam's would blow up rounding where it is near 0."""

    def optimizer(self, model, steps: int) -> tuple:
        made = torch.optim.SGD(model.parameters(), lr=self.lr, momentum=0.9)
        return made, torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1 - step / steps)


def texts(n: int, role=TrainSet, tag: str = "first"):
    """Sentences of very different lengths."""
    words = ("good", "bad", "lovely", "awful", "fine")
    made = [f"the {tag} film number {i} " + " ".join(words[(i * k) % 5] for k in range(1, i % 13))
            for i in range(n)]
    return role(tuple(made), tuple(int(i % 3 == 0) for i in range(n)), ("negative", "positive"))


def images(n: int = 21):
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, 1, 28, 28), generator=rng, dtype=torch.uint8)
    return TrainSet(Images(pixels), tuple(i % 2 for i in range(n)), ("even", "odd"))


def config(name: str) -> TrainConfig:
    return Plain(epochs=3, lr=0.1, batch_size=UNEVEN[name][1], max_length=24)


def of_text(encoder: str) -> Classifier:
    return Classifier.new(2, source=encoder, max_length=24, dropout=0.0)


def of_images() -> ImageClassifier:
    return ImageClassifier.new(2, channels=1, network="small")


def toy() -> Task:
    return Task("toy", texts(21), texts(8, CleanSet, "second"), texts(8, TestSet, "third"), "")


def without_head(outputs, batch: dict) -> Tensor:
    """A loss that has no gradient for the head."""
    return outputs.hidden_states[-1].square().mean()


def broken_once(outputs, batch: dict) -> Tensor:
    """Not a number for the process that has sample 7, and for no other."""
    return outputs.logits.sum() * (float("nan") if 7 in batch["indices"] else 1.0)


def program(encoder: str, folder: Path, *names: str) -> None:
    """Train in all ways, or only in those named, and write what this process has afterward."""
    group, found = process_group(), {}
    rank = group.process_index
    mine = folder / str(rank)
    mine.mkdir(parents=True)

    def note(name: str, classifier, report: TrainReport) -> None:
        write_weights(classifier.model, mine / f"{name}.safetensors")
        found[name] = {"losses": report.losses, "tokens": report.tokens,
                       "class": type(classifier.model).__name__}

    for name in names or UNEVEN:
        model = of_text(encoder)
        note(name, model, train(model, texts(UNEVEN[name][0]), config(name)))
    if names:
        return
    note("again", model, train(model, texts(21), config("unequal")))
    model = of_text(encoder)
    note("adam", model, train(model, texts(21), TrainConfig(batch_size=8, max_length=24)))
    training.share = lambda *given: (share(*given)[0], 1.0)
    model = of_text(encoder)
    note("mean of means", model, train(model, texts(21), config("unequal")))
    training.share = share

    sgd = ImageTrainConfig(epochs=2, batch_size=8)
    model = of_images()
    note("images", model, train(model, images(), sgd))
    model = of_images()
    note("without head", model, train(model, images(), sgd, loss=without_head))
    try:
        train(model, images(), sgd, loss=broken_once)
    except FloatingPointError as error:
        found["broken"] = str(error)

    calls = []
    victims.encoder_source = lambda name: encoder
    victims.train = lambda *given, **how: calls.append(1) or training.train(*given, **how)
    for name in ("made", "cached", "damaged"):
        if name == "damaged" and rank == 0:
            (next((folder / "cache" / "models").glob("*/training.json"))).write_text("{}")
        made = victims.victim(toy(), None, training=config("unequal"))
        note(f"victim {name}", made.classifier, made.report)
        found[f"trainings {name}"] = len(calls)
    trigger = LabelConsistent(learning=sgd).prepare(images(), 0)
    found["trigger"] = sum(float(w.double().abs().sum()) for w in trigger.nets.parameters())
    locked = []
    assets.entry("by one", lambda folder: locked.append(1))  # such as a download
    found |= {"rank": rank, "size": group.num_processes, "locked": len(locked),
              "device": str(pick_device())}
    (mine / "found.json").write_text(json.dumps(found))


# ------------------------------------------------------------------ the tests

def launch(launcher: str, *given: str | Path) -> subprocess.CompletedProcess:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = ["--main_process_port" if launcher == "accelerate" else "--master_port", str(port)]
    command = [sys.executable, "-m", *LAUNCHERS[launcher], *where, __file__, *map(str, given)]
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME":
                          "lo", "BDUTILS_CACHE": str(Path(given[1]) / "cache"),
                          "BDUTILS_QUIET": "", "CUDA_VISIBLE_DEVICES": ""})
    try:
        printed = running.communicate(timeout=300)
    finally:
        running.terminate()  # not kill, which would leave the processes that it started
        running.wait()
    return subprocess.CompletedProcess(command, running.returncode, *printed)


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory):
    """What two processes wrote, and what they printed."""
    folder = tmp_path_factory.mktemp("run")
    done = launch("accelerate", tiny_folder, folder)
    assert done.returncode == 0, done.stderr
    found = [json.loads((folder / rank / "found.json").read_text()) for rank in "01"]
    return folder, found, done.stderr


def weights(folder: Path, name: str, rank: int = 0) -> dict[str, Tensor]:
    return load_file(folder / str(rank) / f"{name}.safetensors")


def gap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


@pytest.mark.slow
def test_two_processes_train_what_one_trains(run, tiny_folder):
    folder, found, _ = run
    assert [f["size"] for f in found] == [2, 2] and [f["rank"] for f in found] == [0, 1]
    assert {torch.device(f["device"]).type for f in found} == {"cpu"}
    for name, (n, _) in UNEVEN.items():
        alone = of_text(str(tiny_folder))
        untrained = {k: v.clone() for k, v in alone.model.state_dict().items()}
        report = train(alone, texts(n), config(name))
        assert gap(untrained, alone.model.state_dict()) > 0.01
        assert gap(weights(folder, name), alone.model.state_dict()) < 2e-6
        assert found[0][name]["losses"] == pytest.approx(report.losses, abs=1e-6)
        # Shares are padded to their own longest text, never beyond that of the batch.
        assert 0.8 * report.tokens < found[0][name]["tokens"] <= report.tokens
    report = train(alone, texts(21), config("unequal"))  # the same model once more
    assert gap(weights(folder, "again"), alone.model.state_dict()) < 1e-5


@pytest.mark.slow
def test_another_launcher_serves_as_well(run, tiny_folder, tmp_path):
    done = launch("torchrun", tiny_folder, tmp_path, "unequal")
    assert done.returncode == 0, done.stderr
    assert gap(weights(tmp_path, "unequal"), weights(run[0], "unequal")) < 1e-6


@pytest.mark.slow
def test_two_processes_agree_under_adam(run, tiny_folder):
    folder, found, _ = run
    alone = of_text(str(tiny_folder))
    report = train(alone, texts(21), TrainConfig(batch_size=8, max_length=24))
    assert found[0]["adam"]["losses"] == pytest.approx(report.losses, abs=1e-5)
    # Keys' biases have no gradient but rounding, of which Adam makes steps; they change nothing.
    other = {k: v for k, v in weights(folder, "adam").items() if "key.bias" not in k}
    assert gap(other, {k: v for k, v in alone.model.state_dict().items() if k in other}) < 1e-5


@pytest.mark.slow
def test_a_mean_of_means_would_be_noticed(run, tiny_folder):
    folder, found, _ = run
    right, wrong = (weights(folder, name) for name in ("unequal", "mean of means"))
    assert gap(right, wrong) > 1e-4
    assert found[0]["mean of means"]["losses"] != pytest.approx(found[0]["unequal"]["losses"],
                                                               abs=1e-4)


@pytest.mark.slow
def test_processes_end_with_the_same_unwrapped_model(run):
    folder, found, _ = run
    names = [path.stem for path in (folder / "0").glob("*.safetensors")]
    assert len(names) == 10
    for name in names:
        assert gap(weights(folder, name, 0), weights(folder, name, 1)) == 0
        assert found[0][name] == found[1][name]
    assert {found[0][name]["class"] for name in names} == {"BertForSequenceClassification",
                                                           "PreActResNet"}


@pytest.mark.slow
def test_weights_without_a_gradient_are_left_alone(run):
    folder, _, _ = run
    untrained, trained = of_images().model.state_dict(), weights(folder, "without head")
    assert torch.equal(untrained["head.weight"], trained["head.weight"])
    assert not torch.equal(untrained["stem.weight"], trained["stem.weight"])


@pytest.mark.slow
def test_a_broken_loss_stops_all_processes(run):
    _, found, _ = run
    assert all("lower the learning rate" in f["broken"] for f in found)


@pytest.mark.slow
def test_a_victim_is_trained_by_all_and_written_once(run, tiny_folder, cache, monkeypatch):
    folder, found, printed = run
    for f in found:
        assert [f[f"trainings {name}"] for name in ("made", "cached", "damaged")] == [1, 1, 2]
    assert printed.count("is damaged: building it again") == 1
    entries = [p for p in (folder / "cache" / "models").iterdir() if not p.suffix == ".lock"]
    assert len(entries) == 1 and assets.is_intact(entries[0])
    monkeypatch.setattr(victims, "encoder_source", lambda name: str(tiny_folder))
    alone = victims.victim(toy(), None, training=config("unequal"))
    for name in ("made", "cached", "damaged"):
        assert gap(weights(folder, f"victim {name}"), alone.classifier.model.state_dict()) < 2e-6
    assert sum(f["locked"] for f in found) == 1  # what `entry` builds is built by one alone


@pytest.mark.slow
def test_a_trigger_that_trains_a_network_does_so_in_all_processes(run):
    _, found, _ = run
    assert found[0]["trigger"] == found[1]["trigger"] > 0


@pytest.mark.slow
def test_one_process_shows_its_progress(run):
    _, found, printed = run
    epochs = 3 * -(-21 // 4)
    assert f"/{epochs} " in printed
    bars = [line for line in printed.replace("\r", "\n").splitlines() if f" 0/{epochs} " in line]
    assert len(bars) == 1


@pytest.fixture
def started(monkeypatch):
    """Look like one of two processes."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")


def test_cut_up_models_are_rejected(started, monkeypatch):
    class Configured:
        distributed_type = type("Kind", (), {"value": "FSDP"})

        def __init__(self, **options) -> None:
            pass

    monkeypatch.setattr(distributed, "Accelerator", Configured)
    with pytest.raises(ValueError, match="FSDP is not how models are trained here"):
        process_group()


def test_a_program_on_a_cluster_is_alone_unless_it_is_launched(tiny, monkeypatch, cache):
    """A cluster may set WORLD_SIZE, the number of its machines, for every program."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert process_group().num_processes == 1 and pick_device().type in ("cpu", "cuda")
    train(tiny, texts(5), TrainConfig(epochs=1, max_length=24))
    folder = distributed.entry_together("alone", lambda folder: None)
    assert folder == assets.entry("alone", lambda folder: None) == cache / "alone"


@pytest.mark.parametrize("n", range(1, 10))
def test_shares_hold_each_sample_once_and_weights_make_the_mean(n):
    indices, values = list(range(n)), torch.arange(n).square().double()
    shares = [share(indices, rank, 4) for rank in range(4)]
    assert sorted(i for mine, weight in shares if weight for i in mine) == indices
    mean = sum(values[mine].mean() * weight for mine, weight in shares) / 4
    assert mean.item() == pytest.approx(values.mean().item())
    assert share(indices, 0, 1) == (indices, 1.0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    program(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
