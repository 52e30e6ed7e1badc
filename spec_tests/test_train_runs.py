"""Long runs of train.py: what is killed, stopped, damaged or spread over processes."""

# ruff: noqa: F811  (a fixture that is imported has the name of an argument)
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

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


def torchrun(
    processes: int, *options: object, cwd: Path, script: Path = TRAIN
) -> subprocess.CompletedProcess:
    command = [*TORCHRUN, str(processes), str(script), *map(str, options)]
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
    """A stand-in for Training.advance that sends this process a signal during a step."""

    def advance(self, original=trainer.Training.advance) -> None:
        if self.step == step - 1:
            os.kill(os.getpid(), number)
        original(self)

    return advance


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
    options = "--steps 130 --dropout 0.2 --unroll 2 --accumulate 2".split()  # recorded every third
    assert here("--data", text, *TINY, *options, "--out", "whole").returncode == 0
    monkeypatch.setattr(sys, "argv", [str(TRAIN)])
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Training, "advance", stopping(37, number))
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
        Path("evil").read_bytes(): "more than data .no code of it was run",
        pickle.dumps(Malicious()): "more than data .no code of it was run",
        damaged(settings=None): "is no checkpoint of train.py",
        damaged(optimizer=None): "does not fit this run: 'optimizer'",
        damaged(model=other): "does not fit this run: ",
        damaged(ranks=[]): "does not fit this run: ",
        damaged(settings=state["settings"] | {"processes": 3}): "has processes 3, not 1$",
    }
    Path("run/metrics.jsonl").open("a").write('{"step": 9}\n')  # of a run that had gone further
    before = {x: x.read_bytes() for x in Path("run").iterdir() if x != path}
    for content, message in bad.items():
        path.write_bytes(content)
        refused(here("--resume", "run"), message)
        assert path.read_bytes() == content
    for content in (good[:-1], damaged(model=other)):
        path.write_bytes(content)
        for only in ("--eval-only", "--sample"):
            refused(here("--resume", "run", only), "is no checkpoint|does not fit this run: ")
    assert {x: x.read_bytes() for x in Path("run").iterdir() if x != path} == before
    assert not Path("harmed").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--lr 0.1", "the run in run has lr 0.003, not 0.1"),
        ("--steps 1200", "the run in run has steps 4, not 1200"),  # the default, given
        ("--bptt", "the run in run has bptt False, not True"),
        ("--d-model 32", "the run in run has d_model 16, not 32"),
        ("--dtype float64", "the run in run has dtype float32, not float64"),
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
        patch.setattr(trainer.Training, "advance", stopping(4, signal.SIGINT))
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
    limit = (
        f"ulimit -f 1000; exec {sys.executable} {TRAIN} --data {text} --out run --steps 4 --quiet"
    )
    done = subprocess.run(["sh", "-c", limit], cwd=tmp_path, capture_output=True, text=True)
    refused(done, "run/checkpoint.pt could not be written: File too large")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_a_line_of_metrics_that_the_disk_has_no_room_for_is_not_begun(
    text: Path, tmp_path: Path, here, monkeypatch
):
    """The disk is a limit on the size of files, which the log reaches in the middle of a line."""
    resource = pytest.importorskip("resource", reason="no limits on this system")
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Training, "advance", stopping(4, signal.SIGINT))
        assert here("--data", text, *TINY, "--steps", 8, "--out", "run").returncode == 130
    metrics, room = Path("run/metrics.jsonl"), 2**20
    records = metrics.read_bytes()
    padding = b'{"step": 0, "long": "%s"}\n' % (b"-" * (room - len(records) - 100))
    metrics.write_bytes(padding + records)
    command = [sys.executable, str(TRAIN), "--resume", "run", "--quiet"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))  # noqa: E731
    how = {"cwd": tmp_path, "capture_output": True, "text": True, "preexec_fn": limit}
    refused(subprocess.run(command, **how), "run/metrics.jsonl could not be written: the disk")
    assert metrics.read_bytes() == padding + records
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 4
    metrics.write_bytes(records)
    assert here("--resume", "run").returncode == 0
    assert [json.loads(line)["step"] for line in metrics.open()] == [*range(1, 9)]


def test_every_step_and_every_process_draws_anew(text: Path, here, monkeypatch):
    """What is drawn depends on the seed, the step and the process alone: nothing of it is saved."""
    seeds: list[int] = []

    def forward(self, *args: object, original=trainer.Step.forward):
        seeds.append(torch.initial_seed())
        return original(self, *args)

    def advance(self, original=trainer.Training.advance) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "RANK", rank)
            original(self)

    monkeypatch.setattr(trainer.Step, "forward", forward)
    monkeypatch.setattr(trainer.Training, "advance", advance)
    for seed, rank in ((0, 0), (1, 0), (0, 1)):
        options = ["--steps", 4, "--seed", seed, "--out", f"run{seed}{rank}"]
        assert here("--data", text, *TINY, *options).returncode == 0
    assert len(set(seeds)) == len(seeds) == 12


def test_two_processes_cannot_write_one_folder(text: Path, here):
    assert here("--data", text, *TINY, "--steps", 4, "--out", "run").returncode == 0
    with trainer.open_metrics(Path("run/metrics.jsonl"), 4):
        refused(here("--resume", "run"), "run is in use by another process")
        assert here("--resume", "run", "--eval-only").returncode == 0
    assert here("--resume", "run").returncode == 0
    refused(here("--data", text, *TINY, "--out", "run"), "--out run is not empty")


def test_a_resumed_run_replaces_what_a_kill_at_its_last_write_left(text: Path, here):
    assert here("--data", text, *TINY, "--steps", 4, "--out", "run").returncode == 0
    left = [Path(f"run/.{name}.part") for name in ("checkpoint.pt", "settings.json")]
    for part in left:
        part.write_bytes(b"half")
    assert here("--resume", "run", "--save-every", 7).returncode == 0
    assert json.loads(Path("run/settings.json").read_text())["save_every"] == 7
    assert not any(part.exists() for part in left)


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
    assert "the state after step 1 is not finite; the last good" in stopped.stderr
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 0


# ------------------------------------------------------------------------------------ many devices

# In float32 the order of a sum matters: AdamW makes a step as large of a gradient that is rounding.
MANY = [
    *TINY,
    "--dtype",
    "float64",
    "--batch-size",
    8,
    "--steps",
    50,
    "--mem-len",
    20,
    "--quiet",
    "--unroll",
    2,
]
MANY += ["--c-mem-len", 6, "--compression-rate", 4, "--segment", 6]


def test_parts_of_a_step_train_as_the_whole(text: Path, here):
    for count in (1, 2, 8):
        options = ["--accumulate", count, "--out", f"run{count}"]
        assert here("--data", text, *MANY, *options).returncode == 0
    for count in (2, 8):
        assert farthest(Path("run1"), Path(f"run{count}")) < 1e-6


@pytest.mark.parametrize(("processes", "more"), [(2, []), (4, ["--recompute"])])
def test_processes_train_as_one(text: Path, here, processes: int, more: list[str]):
    """Memory fills for three segments, so that the first step compresses nothing and has no
    gradient for f_c."""
    assert here("--data", text, *MANY, "--out", "one").returncode == 0
    options = ["--accumulate", 2, *more, "--out", "many"]
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
    refused(here("--resume", "many"), f"has processes {processes}, not 1")
    assert here("--resume", "many", "--eval-only").stdout == done.stdout.split()[0] + "\n"


LATE = """import os, sys, time
sys.path.insert(0, {folder!r})
time.sleep(2 * (os.environ["RANK"] == {late!r}))  # long after the others
import train

train.main()
"""
PATCHED = """import os, sys
sys.path.insert(0, {folder!r})
import train

def advance(self, original=train.Training.advance):
    if self.step == {step} - 1 and train.RANK == 1:
        os.kill(os.getpid(), {number})
    original(self)

train.Training.advance = advance
train.main()
"""


def test_one_process_killed_or_stopped_ends_all_and_they_go_on_exactly(text: Path, tmp_path: Path):
    options = "--steps 12 --dropout 0.1 --save-every 3 --accumulate 2 --batch-size 4".split()
    options = ["--data", text, *TINY, *options]
    script = tmp_path / "patched.py"

    def broken(step: int, number: int, *options: object) -> subprocess.CompletedProcess:
        folder = str(TRAIN.parent)
        script.write_text(PATCHED.format(folder=folder, step=step, number=int(number)))
        return torchrun(2, *options, cwd=tmp_path, script=script)

    start = time.monotonic()
    whole = torchrun(2, *options, "--out", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    assert "find_unused_parameters" not in whole.stderr
    length = time.monotonic() - start
    for late in ("0", "none"):
        start = time.monotonic()
        script.write_text(LATE.format(folder=str(TRAIN.parent), late=late))
        twice = torchrun(2, *options, "--out", "whole", cwd=tmp_path, script=script)
        assert twice.returncode != 0
        assert time.monotonic() - start < length + 10  # no process waits for another's refusal
        ours = [line for line in twice.stderr.splitlines() if line.startswith("train.py: ")]
        mend = "name a new folder, so that no run is lost"
        assert ours == [f"train.py: --out whole is not empty: {mend}"]
    assert "; 2 processes; results in whole" in whole.stdout.splitlines()[0]

    start = time.monotonic()
    killed = broken(7, signal.SIGKILL, *options, "--out", "run")
    assert killed.returncode != 0
    assert time.monotonic() - start < length + 10  # no process waits for the one that is gone
    assert "train.py: process 0 has lost another one: " in killed.stderr
    again = f"to go on: torchrun --nproc-per-node 2 {script} --resume run\n"
    assert again in killed.stderr
    assert 'train.py", line' not in killed.stderr, "a traceback"
    assert torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["step"] == 6

    stopped = broken(8, signal.SIGTERM, "--resume", "run")
    assert f"train.py: stopped after step 8; {again}" in stopped.stderr
    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert state["step"] == 8
    assert not same(state["ranks"][0], state["ranks"][1])

    resumed = torchrun(2, "--resume", "run", "--quiet", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert same(result(tmp_path / "run"), result(tmp_path / "whole"))


# ------------------------------------------------------------------- evaluation, samples, pictures


def bpc(done: subprocess.CompletedProcess) -> float:
    assert done.returncode == 0, done.stderr
    return float(re.search(r"val_bpc=(\d+\.\d+)", done.stdout)[1])


def evaluated(monkeypatch, here, *options: object) -> tuple[float, list[list[float]]]:
    """What evaluate returns, with all its digits."""
    found = []
    original = trainer.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate", lambda *args: found.append(original(*args)) or found[0])
        done = here("--resume", "run", "--eval-only", *options)
    assert abs(bpc(done) - found[0][0]) < 1e-4
    return found[0]


def test_evaluation_is_the_same_for_any_segment_if_nothing_overflows(text: Path, here, monkeypatch):
    assert here("--data", text, *TINY, "--steps", 60, "--out", "run").returncode == 0
    long = ["--eval-mem-len", 400, "--eval-c-mem-len", 3]
    values = [evaluated(monkeypatch, here, *long, "--eval-segment", n)[0] for n in (1, 7, 64, 999)]
    assert max(values) - min(values) < 1e-6
    assert abs(values[0] - evaluated(monkeypatch, here)[0]) > 1e-4  # as trained: memory overflows


def test_documents_reset_the_memory_only_when_asked(here, monkeypatch):
    folder = Path("texts")
    folder.mkdir()
    (folder / "a").write_bytes(TEXT)
    for name, size in (("b", 50), ("c", 1), ("d", 100)):  # held out, with the end of the first
        (folder / name).write_bytes(TEXT[:size])
    assert here("--data", folder, *TINY, "--steps", 60, "--out", "run").returncode == 0
    model = trainer.CompressiveTransformer(
        trainer.Config(**torch.load("run/checkpoint.pt", weights_only=True)["config"])
    )
    model.load_state_dict(parameters(Path("run")))
    whole = torch.tensor(list(TEXT + TEXT[:50] + TEXT[:1] + TEXT[:100]))[None]
    held_out, ends = whole.size(1) // 10, [len(TEXT), len(TEXT) + 50, len(TEXT) + 51]
    start = whole.size(1) - held_out
    for reset in (False, True):
        nats, memory, at = 0.0, None, start
        while at < whole.size(1):
            if reset and at in ends:
                memory = None
            end = min([at + 8, whole.size(1), *(end for end in ends if reset and end > at)])
            with torch.no_grad():
                logits, memory, _ = model(whole[:, at - 1 : end - 1], memory)
            loss = torch.nn.functional.cross_entropy(logits[0], whole[0, at:end], reduction="sum")
            nats, at = nats + loss.item(), end
        found = evaluated(monkeypatch, here, *["--eval-reset"] * reset)[0]
        assert abs(found - nats / math.log(2) / held_out) < 1e-5


def test_attention_by_age_is_the_mean_weight_of_a_slot(text: Path, here, monkeypatch):
    assert here("--data", text, *TINY, "--steps", 4, "--out", "run").returncode == 0
    lengths = ["--eval-mem-len", 12, "--eval-c-mem-len", 6, "--eval-segment", 12]
    _, ages = evaluated(monkeypatch, here, *lengths)
    assert [len(part) for part in ages] == [6, 6, 6]
    one = 1 * sum(ages[0]) + 2 * sum(ages[1]) + 2 * sum(ages[2])  # of 1 and 2 slots each
    assert abs(one - 1) < 1e-5
    assert ages[2] == sorted(ages[2], reverse=True)  # the newest are seen by few queries
    none = ["--eval-mem-len", 3, "--eval-c-mem-len", 0]
    _, ages = evaluated(monkeypatch, here, *none)
    assert all(math.isnan(x) for x in ages[0])


def test_a_sample_streams_as_text(text: Path, here, monkeypatch, capsys):
    assert here("--data", text, *TINY, "--steps", 4, "--out", "run").returncode == 0
    made = "né € \x1b[31m\U0001f600".encode() + b"\xff" + "é".encode()[:1]
    shown: list[str] = []

    def generate(self, prompt, count, stream, **options):
        assert bytes(prompt[0].tolist()) == "Prompt é: ".encode()
        assert count == 77
        for byte in made:
            stream(torch.tensor([[byte]]))
            shown.append(capsys.readouterr().out)
        return torch.cat([prompt, torch.tensor([[*made]])], dim=1)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.CompressiveTransformer, "generate", generate)
        options = ["--sample", "--prompt", "Prompt é: ", "--sample-bytes", 77, "--quiet"]
        done = here("--resume", "run", *options)
    assert done.returncode == 0, done.stderr
    assert "".join(shown) == "Prompt é: né € \ufffd[31m\U0001f600\ufffd"
    assert shown[1:3] == ["", "é"]  # each as soon as it is whole
    assert done.stdout == "\ufffd\n"  # what was never completed
    first, again, other = (
        here("--resume", "run", "--sample", "--seed", seed).stdout for seed in (0, 0, 1)
    )
    assert first == again != other
    assert first.startswith(TEXT[-(len(TEXT) // 10) :][:8].decode())  # held-out text
    score = here("--resume", "run", "--eval-only").stdout
    assert here("--resume", "run", "--sample", "--eval-only").stdout == first + score


def test_quiet_prints_the_last_line_alone(text: Path, here):
    done = here("--data", text, *TINY, "--steps", 4, "--out", "run", "--quiet")
    assert re.fullmatch(r"val_bpc=\S+ tokens_per_second=\d+ seconds=\S+\n", done.stdout)
    assert done.stderr == ""
    assert Path("run/sample.txt").read_text().startswith("--- prompt")


def test_a_picture_is_drawn_if_matplotlib_is_there(text: Path, here, monkeypatch):
    """With a stand-in that keeps what is drawn; if installed, the real one draws in other tests."""
    drawn: list[tuple] = []

    class Axes:
        def __getattr__(self, name):
            return lambda *args, **options: drawn.append((name, args, options))

    class Figure(Axes):
        def __init__(self, **options) -> None:
            pass

        def subplots(self, rows, columns):
            return [Axes() for _ in range(columns)]

        def savefig(self, file, **options):
            file.write(b"PNG")

    figure = types.ModuleType("matplotlib.figure")
    figure.Figure = Figure
    monkeypatch.setitem(sys.modules, "matplotlib", types.ModuleType("matplotlib"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", figure)
    done = here("--data", text, *TINY, "--steps", 90, "--out", "run")
    assert "picture in run/run.png\n" in done.stdout
    assert Path("run/run.png").read_bytes() == b"PNG"
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    plots = [args for name, args, _ in drawn if name == "plot"]
    assert list(plots[0][0]) == [record["step"] for record in records]
    assert list(plots[0][1]) == [record["bpc"] for record in records]
    for i, (_, losses) in enumerate(plots[1:]):
        assert list(losses) == [record["compression_loss_of_layers"][i] for record in records]
    assert len(plots) == 3
    assert records[-1]["compression_loss_of_layers"][0] > 0
    mean = sum(records[-1]["compression_loss_of_layers"]) / 2
    assert abs(mean - records[-1]["compression_loss"]) < 1e-9
    bars = [args[1] for name, args, _ in drawn if name == "bar"]
    assert [len(bar) for bar in bars] == [6, 6, 6] and min(map(min, bars)) > 0

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # not installed
    done = here("--resume", "run")
    assert done.stdout.splitlines()[-2] == "no run.png: matplotlib is not installed"


# --------------------------------------------------------------------------------- data and speed


def test_a_file_larger_than_memory_is_not_loaded(tmp_path: Path):
    path = tmp_path / "large"
    with open(path, "wb") as file:
        try:
            file.truncate(2**40)
        except OSError:
            file.truncate(10 * 2**30)
        file.seek(12345)
        file.write(b"here")
    text = trainer.Text([path])
    assert text.read(12340, 12352) == bytes(5) + b"here" + bytes(3)
    assert text.read(text.length - 3, text.length + 9) == bytes(3)
    read = 0

    def count(start: int, end: int, original=text.read) -> bytes:
        nonlocal read
        read += end - start
        return original(start, end)

    text.read = count
    assert text.fingerprint() == text.fingerprint()
    assert 0 < read < 2**20  # whatever the size of the file


def test_a_run_on_ten_gigabytes_starts_within_a_second(tmp_path: Path, here, monkeypatch):
    with open(tmp_path / "large", "wb") as file:
        file.truncate(10 * 2**30)
    resource = pytest.importorskip("resource", reason="memory cannot be measured on this system")
    begun: list[float] = []

    def advance(self, original=trainer.Training.advance) -> None:
        original(self)
        begun.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(trainer.Training, "advance", advance)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    assert here("--data", "large", *TINY, "--out", "run").returncode == 130
    assert begun[0] - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB, or bytes


def test_more_files_than_a_process_may_open_are_one_text(tmp_path: Path):
    code = "import resource, sys, train; from pathlib import Path; "
    code += "resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200)); "
    code += "text = train.find_text(sys.argv[1]); print(text.read(0, 9999).decode())"
    for i in range(300):
        (tmp_path / f"{i:03}").write_text(str(i % 10))
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=TRAIN.parent, capture_output=True, text=True)
    assert done.stdout == "0123456789" * 30 + "\n", done.stderr


def test_compilation_ends_once_memory_is_full(text: Path, here, monkeypatch):
    """Memory grows for 20 segments, compressed memory for as many more: no length is compiled for
    itself."""
    counter = CompileCounter()
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: plain(self, backend=counter))
    torch._dynamo.reset()
    counts = {}

    def advance(self, original=trainer.Training.advance) -> None:
        original(self)
        counts[self.step] = counter.frame_count

    monkeypatch.setattr(trainer.Training, "advance", advance)
    lengths = "--n-layers 1 --segment 4 --mem-len 80 --c-mem-len 40 --unroll 2 --steps 200".split()
    options = ["--data", text, *TINY, *lengths]
    assert here(*options, "--compile", "--out", "compiled").returncode == 0
    assert 0 < counts[140] == counts[200] <= 12  # from 122 on the text is read once more
    assert here(*options, "--out", "eager").returncode == 0
    assert farthest(Path("compiled"), Path("eager")) < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, whose waits it watches")
def test_a_step_on_cuda_waits_for_nothing(text: Path, here, monkeypatch):
    def backward(self, *args: object, original=trainer.Step.forward):
        torch.cuda.set_sync_debug_mode("error")
        return original(self, *args)

    def look(self, original=trainer.Training.look) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("default")
        return original(self)

    monkeypatch.setattr(trainer.Step, "forward", backward)
    monkeypatch.setattr(trainer.Training, "look", look)
    options = ["--steps", 400, "--save-every", 1000, "--device", "cuda", "--dtype", "bfloat16"]
    done = here("--data", text, *TINY, *options, "--out", "run")
    torch.cuda.set_sync_debug_mode("default")
    assert done.returncode == 0, done.stderr
