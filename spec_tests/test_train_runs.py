"""Long runs of train.py: what is killed, stopped, damaged or spread over processes."""

import json
import math
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train as trainer

from .test_train import (  # noqa: F401  (fixtures among them)
    TEXT,
    TINY,
    TRAIN,
    here,
    refused,
    run,
    text,
)
from .train_kill import result, same

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def torchrun(processes: int, *options: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [*TORCHRUN, str(processes), str(TRAIN), *map(str, options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def farthest(a: Path, b: Path) -> float:
    """The largest difference between the parameters of two runs."""
    a, b = parameters(a), parameters(b)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def stopping(step: int, number: int):
    """A stand-in for Log.step that sends this process a signal during a step."""

    def log_step(self, at: int, *rest, original=trainer.Log.step) -> None:
        if at == step:
            os.kill(os.getpid(), number)
        original(self, at, *rest)

    return log_step


# ------------------------------------------------------------------------------------ nothing lost


def test_killed_runs_end_as_one_left_alone():
    command = [sys.executable, "-m", "spec_tests.train_kill", "--times", "5"]
    done = subprocess.run(command, cwd=TRAIN.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("5 kills, ")
    assert done.stdout.endswith("every run ended bitwise as one that was left alone\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(
    text: Path, tmp_path: Path, here, monkeypatch, number
):
    options = "--steps 60 --dropout 0.2 --unroll 2 --accumulate 2".split()
    assert here("--data", text, *TINY, *options, "--out", "whole").returncode == 0
    monkeypatch.setattr(sys, "argv", [str(TRAIN)])
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Log, "step", stopping(37, number))
        stopped = here("--data", text, *TINY, *options, "--out", "cut short")
    assert stopped.returncode == 128 + number
    again = f"python {TRAIN} --resume 'cut short'"
    assert stopped.stderr == f"train.py: stopped after step 37; to go on: {again}\n"
    assert torch.load("cut short/checkpoint.pt", weights_only=True)["step"] == 37
    with open("cut short/metrics.jsonl", "a") as file:  # as a kill would leave it
        file.write('{"step": 38, "bpc": 1}\n{"step": 39, "b')
    resumed = run("--resume", "cut short", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "; after step 37; results in cut short" in resumed.stdout.splitlines()[0]
    assert same(result(Path("whole")), result(Path("cut short")))
    finished = here("--resume", "cut short")  # shows the results again, and changes nothing
    assert finished.stdout.split()[-3] == resumed.stdout.split()[-3]
    assert same(result(Path("whole")), result(Path("cut short")))


def test_signals_of_a_user_reach_the_process(text: Path, tmp_path: Path):
    """The first stops after the step, a second one at once."""
    command = [sys.executable, TRAIN, "--data", text, *TINY, "--out", "run", "--steps", "100000"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=-1, text=True)
    for line in process.stdout:
        if line.startswith("step "):
            break
    process.send_signal(signal.SIGINT)
    errors = process.communicate()[1]
    assert process.returncode == 130, errors
    assert errors.startswith("train.py: stopped after step ") and errors.count("\n") == 1

    signals = trainer.Signals()
    signals.training = True
    before = signal.getsignal(signal.SIGTERM)
    try:
        signals(signal.SIGTERM, None)
        assert signals.number == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_outside_of_training_ends_the_run_in_one_line(text: Path, here, monkeypatch):
    def evaluate(*args: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    stopped = here("--data", text, *TINY, "--steps", 4, "--out", "run")
    assert stopped.returncode == 143
    assert stopped.stderr.startswith("train.py: interrupted; to go on: python ")
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 4


class Malicious:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_what_is_no_checkpoint_is_refused_and_left_alone(text: Path, here):
    assert here("--data", text, *TINY, "--steps", 4, "--out", "run").returncode == 0
    path = Path("run/checkpoint.pt")
    good = path.read_bytes()
    state = torch.load(path, weights_only=True)

    def damaged(**changes: object) -> bytes:
        torch.save({k: v for k, v in (state | changes).items() if v is not None}, "other")
        return Path("other").read_bytes()

    other = state["model"] | {"norm.weight": torch.zeros(3)}
    torch.save(Malicious(), "evil")
    bad = {
        good[: len(good) // 2]: "it is truncated",
        good[:-1]: "it is truncated",
        b"": "it is truncated",
        b"Moby Dick": "something else",
        Path("evil").read_bytes(): "more than data .nothing of it was run",
        pickle.dumps(Malicious()): "more than data .nothing of it was run",
        damaged(optimizer=None, step=None): "lacks something: optimizer, step$",
        damaged(model=other): "does not fit this run: ",
        damaged(ranks=[]): "does not fit this run: ",
        damaged(world_size=3): "the run is of 3 processes, not 1: torchrun --nproc-per-node 3 ",
    }
    before = sorted(Path("run").iterdir())
    for content, message in bad.items():
        path.write_bytes(content)
        refused(here("--resume", "run"), message)
        assert path.read_bytes() == content
    assert sorted(Path("run").iterdir()) == before
    assert not Path("harmed").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--lr 0.1", "--lr 0.1: the run in run has 0.003; leave it out"),
        ("--steps 1200", "--steps 1200: the run in run has 4; leave it out"),  # the default, given
        ("--bptt", "--bptt True: the run in run has False"),
        ("--d-model 32", "--d-model 32: the run in run has 16"),
        ("--dtype float64", "--dtype float64: the run in run has float32"),
        ("--data other", "--data other is another text"),
        ("--eval-only --eval-mem-len 0", "mem_len must be at least"),
    ],
)
def test_settings_that_contradict_the_run_are_refused(text: Path, here, options, message):
    assert here("--data", text, *TINY, "--steps", 4, "--out", "run").returncode == 0
    Path("other").write_bytes(TEXT[:-1] + b"!")
    before = Path("run/checkpoint.pt").read_bytes(), Path("run/metrics.jsonl").read_bytes()
    refused(here("--resume", "run", *options.split()), message)
    assert before == (
        Path("run/checkpoint.pt").read_bytes(),
        Path("run/metrics.jsonl").read_bytes(),
    )
    same_text = Path("moved")
    same_text.write_bytes(TEXT)
    free = "--data moved --steps 4 --device cpu --save-every 3 --eval-mem-len 20 --quiet".split()
    assert here("--resume", "run", *free).returncode == 0


@pytest.mark.parametrize("room", [0, 70, 20_000])
def test_a_full_disk_is_one_line_and_the_good_checkpoint_stands(
    text: Path, tmp_path: Path, here, monkeypatch, room: int
):
    """The disk is one that has room for so many bytes of a checkpoint."""

    class Full:
        def __init__(self, file) -> None:
            self.file, self.room = file, room

        def __getattr__(self, name: str):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *exception: object) -> None:
            self.file.close()

        def write(self, data) -> int:
            self.room -= len(bytes(data))
            if self.room < 0:
                raise OSError(28, "No space left on device")
            return self.file.write(data)

    def open_full(path, mode="r", **options):
        file = open(path, mode, **options)
        return Full(file) if "b" in mode and "w" in mode and full else file

    full = False
    assert here("--data", text, *TINY, "--steps", 8, "--out", "whole").returncode == 0
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Log, "step", stopping(4, signal.SIGINT))
        assert here("--data", text, *TINY, "--steps", 8, "--out", "run").returncode == 130
    monkeypatch.setattr(trainer, "open", open_full, raising=False)
    before, full = Path("run/checkpoint.pt").read_bytes(), True
    failed = here("--resume", "run", "--quiet", "--save-every", 1)
    full = False
    refused(failed, r"run/\S+ could not be written: No space left on device; nothing was replaced")
    assert Path("run/checkpoint.pt").read_bytes() == before
    assert not list(Path("run").glob(".*.part"))
    assert here("--resume", "run").returncode == 0
    assert same(result(Path("run"))[0]["model"], result(Path("whole"))[0]["model"])
    assert same(result(Path("run"))[1], result(Path("whole"))[1])


def test_a_limit_of_the_system_on_files_is_one_line_too(text: Path, tmp_path: Path):
    limit = f"ulimit -f 20; exec {sys.executable} {TRAIN} --data {text} --out run --steps 4 --quiet"
    done = subprocess.run(["sh", "-c", limit], cwd=tmp_path, capture_output=True, text=True)
    refused(done, "run/checkpoint.pt could not be written: File too large")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_two_processes_cannot_write_one_folder(text: Path, here):
    assert here("--data", text, *TINY, "--steps", 4, "--out", "run").returncode == 0
    with trainer.lock(Path("run")):
        refused(here("--resume", "run"), "run is in use by another process")
        assert here("--resume", "run", "--eval-only").returncode == 0
    assert here("--resume", "run").returncode == 0
    refused(here("--data", text, *TINY, "--out", "run"), "--out run is not empty")


@pytest.mark.parametrize("at", [1, 14])
def test_a_loss_that_is_not_finite_stops_the_run(text: Path, here, monkeypatch, at: int):
    def forward(self, *args: object, original=trainer.Step.forward, steps=[0]):  # noqa: B006
        total, losses, memory = original(self, *args)
        steps[0] += 1
        bad = math.nan if steps[0] == at else 1
        return total * bad, losses * bad, memory

    monkeypatch.setattr(trainer.Step, "forward", forward)
    stopped = here("--data", text, *TINY, "--steps", 400, "--save-every", 4, "--out", "run")
    assert stopped.returncode == 1
    good = (at - 1) // 4 * 4
    assert stopped.stderr == (
        f"train.py: the loss of step {at} is not finite; "
        f"the last good checkpoint is run/checkpoint.pt, after step {good}\n"
    )
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == good
    assert all(x.isfinite().all() for x in parameters(Path("run")).values())
    lines = Path("run/metrics.jsonl").read_text().splitlines() if at > 10 else []
    assert [json.loads(line)["step"] for line in lines] == ([10] if at > 10 else [])


def test_parameters_that_are_not_finite_are_not_saved(text: Path, here, monkeypatch):
    """A gradient can be infinite where the loss is not; only the next loss would show it."""

    def clip(group: list, norm: float, original=torch.nn.utils.clip_grad_norm_) -> None:
        for parameter in group[:1]:
            if parameter.grad is not None:
                parameter.grad.fill_(math.inf)
        original(group, norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    stopped = here("--data", text, *TINY, "--steps", 40, "--save-every", 1, "--out", "run")
    assert stopped.returncode == 1
    assert "a parameter or memory after step 1 is not finite; the last good" in stopped.stderr
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 0


# ------------------------------------------------------------------------------------ many devices

# In float32 the order of a sum matters: AdamW makes a step as large of a gradient that is rounding.
MANY = [*TINY, "--dtype", "float64", "--batch-size", 8, "--steps", 50, "--mem-len", 20, "--quiet", "--unroll", 2]
MANY += ["--c-mem-len", 6, "--compression-rate", 4, "--segment", 6]


def test_parts_of_a_step_train_as_the_whole(text: Path, here):
    for count in (1, 2, 8):
        options = ["--accumulate", count, "--out", f"run{count}"]
        assert here("--data", text, *MANY, *options).returncode == 0
    for count in (2, 8):
        assert farthest(Path("run1"), Path(f"run{count}")) < 1e-6


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_train_as_one(text: Path, here, processes: int):
    """Memory fills for three segments, so that the first step compresses nothing and has no
    gradient for f_c."""
    assert here("--data", text, *MANY, "--out", "one").returncode == 0
    options = ["--accumulate", 2, "--out", "many"]
    done = torchrun(processes, "--data", text, *MANY, *options, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and done.stdout.startswith("val_bpc=")
    one, many = result(Path("one")), result(Path("many"))
    assert farthest(Path("one"), Path("many")) < 1e-6
    assert len(one[1]) == len(many[1]) == 50
    assert one[1][0]["compression_loss"] == 0 < one[1][2]["compression_loss"]
    for a, b in zip(one[1], many[1], strict=True):
        for name in ("bpc", "compression_loss", "lr"):
            assert abs(a[name] - b[name]) < 1e-6
    refused(here("--resume", "many"), f"the run is of {processes} processes, not 1: torchrun")
    assert here("--resume", "many", "--eval-only").stdout == done.stdout.split()[0] + "\n"
