"""Long runs of train.py: what is killed, stopped, damaged or spread over processes."""

import contextlib
import gc
import importlib
import io
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from itertools import count, pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounter
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import train as trainer

from . import test_train, train_kill
from .test_train import TEXT, TINY, TRAIN, empty_folder, records, refused, run
from .train_kill import finish, result, same, start, train_as_new, wait

here = test_train.here  # fixtures
text = test_train.text
four = test_train.four
run_of_four_steps = test_train.run_of_four_steps

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def farthest(one: Path, other: Path) -> float:
    """The largest difference between the parameters of two runs."""
    a = parameters(one)
    b = parameters(other)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def at_step(step: int, act: Callable) -> Callable:
    """A stand-in for to_tokens, which every step calls once, that acts in one step."""
    calls = count(1)

    def to_tokens(*args: object, original=trainer.to_tokens) -> torch.Tensor:
        if next(calls) == step:
            act()
        return original(*args)

    return to_tokens


def stopping(step: int, number: int) -> Callable:
    """Sends this process a signal."""
    return at_step(step, lambda: os.kill(os.getpid(), number))


# ------------------------------------------------------------------------------------ nothing lost


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(
    text: Path, here, monkeypatch, number: int
):
    options = ["--data", text, *TINY, "--steps", 130, "--dropout", 0.2]  # recorded every third
    assert here(*options, "--out", "whole").returncode == 0
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "to_tokens", stopping(37, number))
        stopped = here(*options, "--out", "cut short")
    assert stopped.returncode == 128 + number
    assert stopped.stderr == "train.py: stopped after step 37; to go on: --resume 'cut short'\n"
    assert torch.load("cut short/checkpoint.pt", weights_only=True)["step"] == 37
    with open("cut short/metrics.jsonl", "a") as file:  # as a kill would leave it
        file.write('{"step": 38, "bpc": 1}\n{"step": 39, "b')
    resumed = here("--resume", "cut short")
    assert resumed.returncode == 0, resumed.stderr
    assert same(result(Path("whole")), result(Path("cut short")))
    written = Path("whole/sample.txt").read_text()
    assert Path("cut short/sample.txt").read_text() == written
    finished = here("--resume", "cut short")  # shows the results again, and changes nothing
    assert finished.stdout.split()[-3] == resumed.stdout.split()[-3]
    assert same(result(Path("whole")), result(Path("cut short")))
    assert Path("cut short/sample.txt").read_text() == written


def test_a_second_signal_ends_the_process_at_once(text: Path, here, monkeypatch):
    handlers = []

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        handlers.append(signal.getsignal(signal.SIGTERM))

    monkeypatch.setattr(trainer, "to_tokens", at_step(2, interrupt))
    assert here("--data", text, *TINY, "--steps", 4, "--out", "run").returncode == 143
    assert handlers == [signal.SIG_DFL]


@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device")]
)
def test_output_that_goes_nowhere_costs_no_step(text: Path, here, monkeypatch, error: OSError):
    """As Ctrl-C ends `tee`, too, in `train.py | tee log`; or the log's disk is full."""

    class Pipe(io.StringIO):
        def write(self, line: str) -> int:
            if line.startswith("step"):
                raise error
            return len(line)

    monkeypatch.setattr(trainer, "to_tokens", stopping(37, signal.SIGINT))
    monkeypatch.setattr(sys, "stdout", Pipe())
    stopped = here("--data", text, *TINY, "--steps", 130, "--out", "run")
    assert stopped.stderr == "train.py: stopped after step 37; to go on: --resume run\n"
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 37


def test_a_signal_while_the_last_checkpoint_is_written_ends_the_run(text, here, monkeypatch):
    def write(path: Path, data: bytes, original=trainer.write_atomically) -> None:
        original(path, data)
        if path.name == "checkpoint.pt":
            writes.append(path)
            if len(writes) == 2:  # of steps 0 and 4
                os.kill(os.getpid(), signal.SIGTERM)

    writes = []
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "write_atomically", write)
        stopped = here("--data", text, *TINY, "--steps", 4, "--out", "run")
    assert stopped.returncode == 143
    assert stopped.stderr == "train.py: stopped after step 4; to go on: --resume run\n"
    assert here("--resume", "run").returncode == 0


def test_an_error_is_one_write(monkeypatch):
    """Or lines of several processes mix."""
    writes = []
    monkeypatch.setattr(sys.stderr, "write", writes.append)
    with pytest.raises(SystemExit):
        trainer.fail("two\nlines")
    assert [text for text in writes if text] == ["train.py: two lines\n"]


def test_an_interrupt_outside_of_training_ends_the_run_in_one_line(text: Path, here, monkeypatch):
    def evaluate(*args: object) -> None:
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    stopped = here("--data", text, *TINY, "--steps", 4, "--out", "run")
    assert stopped.returncode == 130
    assert stopped.stderr == "train.py: interrupted\n"
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 4


def test_a_checkpoint_of_another_optimizer_is_evaluated_and_does_not_go_on(four):
    path = Path("run/checkpoint.pt")
    state = torch.load(path, weights_only=True)
    model = trainer.CompressiveTransformer(trainer.Config(**state["config"]))
    state["optimizer"] = torch.optim.AdamW(model.parameters()).state_dict()
    torch.save(state, path)
    refused(four("--resume", "run"), "run was trained with another optimizer: it can only be eval")
    assert four("--resume", "run", "--eval-only").stdout.startswith("val_bpc=")


class Malicious:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_what_is_no_checkpoint_is_refused_and_left_alone(four):
    path = Path("run/checkpoint.pt")
    good = path.read_bytes()
    state = torch.load(path, weights_only=True)

    def damaged(**changes: object) -> bytes:
        changed = {name: value for name, value in (state | changes).items() if value is not None}
        torch.save(changed, "other")
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
        damaged(optimizer=None): "is no checkpoint of train.py",
        damaged(model=other): "is no checkpoint of train.py for this model: ",
    }
    with Path("run/metrics.jsonl").open("a") as file:
        file.write('{"step": 9}\n')  # of a run that had gone further
    before = {x: x.read_bytes() for x in Path("run").iterdir() if x != path}
    for content, message in bad.items():
        path.write_bytes(content)
        for options in ([], ["--eval-only"], ["--sample"]):
            result = four("--resume", "run", *options)
            refused(result, message)
            assert result.stdout == ""
        assert path.read_bytes() == content
    assert {x: x.read_bytes() for x in Path("run").iterdir() if x != path} == before
    assert not Path("harmed").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--lr 0.1", "lr cannot be given with --resume: the run has its settings"),
        ("--steps 1000", "steps cannot be given with --resume"),  # the default, given
        ("--d-model 32", "d_model cannot be given with --resume"),
        ("--dtype bfloat16", "dtype cannot be given with --resume"),
        ("--norm-first", "norm_first cannot be given with --resume"),
        ("--out elsewhere", "out cannot be given with --resume"),
        ("--data other", "--data other is another text"),
        ("--eval-only --eval-mem-len 0", "eval_mem_len must be at least"),
    ],
)
def test_settings_that_contradict_the_run_are_refused(four, options: str, message: str):
    Path("other").write_bytes(TEXT[:-1] + b"!")
    before = {x: x.read_bytes() for x in Path("run").iterdir()}
    refused(four("--resume", "run", *options.split()), message)
    assert {x: x.read_bytes() for x in Path("run").iterdir()} == before


def test_what_may_be_given_with_resume_is_taken(four):
    Path("moved").write_bytes(TEXT)
    assert trainer.WITH_RESUME == [
        *("data", "device", "compile", "save_every", "sample_bytes"),
        *("eval_mem_len", "eval_c_mem_len"),
    ]
    options = "--data moved --device cpu --save-every 3 --eval-mem-len 20 --sample-bytes 7 "
    options += "--no-compile --prompt Prompt"
    assert four("--resume", "run", *options.split(), "--eval-c-mem-len", 6).returncode == 0
    settings = torch.load("run/checkpoint.pt", weights_only=True)["settings"]
    assert (settings["data"], settings["save_every"], settings["steps"]) == ("moved", 3, 4)
    assert Path("run/sample.txt").read_text().startswith("--- prompt\nPrompt\n---")


def test_a_full_disk_is_one_line_and_the_good_checkpoint_stands(text: Path, here, monkeypatch):
    """The disk has room for so many bytes of a checkpoint."""

    class Full:
        def __init__(self, file, room: int) -> None:
            self.file = file
            self.room = room

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

    options = ["--data", text, *TINY, "--steps", 8]
    assert here(*options, "--out", "whole").returncode == 0
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "to_tokens", stopping(4, signal.SIGINT))
        assert here(*options, "--out", "run").returncode == 130
    before = Path("run/checkpoint.pt").read_bytes()
    for room in (0, 20_000):

        def open_full(path, mode="r", room=room, **options):
            file = open(path, mode, **options)
            return Full(file, room) if mode == "wb" else file

        with monkeypatch.context() as patch:
            patch.setattr(trainer, "open", open_full, raising=False)
            failed = here("--resume", "run", "--save-every", 1)
        message = r"run/\S+ could not be written: No space left on device; nothing was replaced"
        refused(failed, message)
        assert Path("run/checkpoint.pt").read_bytes() == before
        assert not list(Path("run").glob(".*.part"))
    assert here("--resume", "run").returncode == 0
    assert same(result(Path("run"))[0]["model"], result(Path("whole"))[0]["model"])
    assert same(result(Path("run"))[1], result(Path("whole"))[1])


def test_a_line_of_metrics_that_the_disk_has_no_room_for_is_one_line(four, monkeypatch):
    """Half of the line is written; a resumed run drops it."""

    class Full:
        def __init__(self, file) -> None:
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *exception: object) -> None:
            self.file.close()

        def write(self, line: str) -> int:
            self.file.write(line[:20])
            raise OSError(28, "No space left on device")

    def open_full(path, mode="r", **options):
        file = open(path, mode, **options)
        return Full(file) if mode == "a" else file

    Path("run").rename("old")
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "open", open_full, raising=False)
        failed = four("--data", "text.txt", *TINY, "--steps", 4, "--out", "run")
    refused(failed, "writing: No space left on device")
    assert Path("run/metrics.jsonl").read_bytes()
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 0
    assert four("--resume", "run").returncode == 0
    assert same(result(Path("run")), result(Path("old")))


def test_every_step_and_every_process_draws_anew(text: Path, here, monkeypatch):
    """What is drawn depends on the seed, the step and the process alone: nothing of it is saved."""
    drawn: list[int] = []

    def to_tokens(*args: object, original=trainer.to_tokens) -> torch.Tensor:
        drawn.append(torch.initial_seed())
        return original(*args)

    monkeypatch.setattr(trainer, "to_tokens", to_tokens)
    seeds = []
    for seed, rank in ((0, 0), (1, 0), (0, 1)):
        drawn.clear()
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "RANK", rank)
            patch.setattr(trainer, "WORLD_SIZE", 2)
            options = ["--steps", 4, "--seed", seed, "--out", f"run{seed}{rank}"]
            assert here("--data", text, *TINY, *options).returncode == 0
        seeds += drawn[:4]  # the rest is of the sample and evaluation
    assert len(set(seeds)) == len(seeds) == 12


def test_a_resumed_run_replaces_what_a_kill_at_its_last_write_left(four):
    part = Path("run/.checkpoint.pt.part")
    part.write_bytes(b"half")
    assert four("--resume", "run").returncode == 0
    assert not part.exists()
    refused(four("--data", "text.txt", *TINY, "--out", "run"), "--out run is not empty")


def test_of_two_runs_at_once_one_alone_has_the_folder(four, monkeypatch):
    """Another one writes there just after this one has looked."""
    Path("new").mkdir()

    def touch(path: Path, original=Path.touch, **options: object) -> None:
        path.write_text("the other's")
        original(path, **options)

    monkeypatch.setattr(Path, "touch", touch)
    second = four("--data", "text.txt", *TINY, "--steps", 4, "--out", "new")
    refused(second, "new/metrics.jsonl: File exists")
    assert [path.name for path in Path("new").iterdir()] == ["metrics.jsonl"]
    assert Path("new/metrics.jsonl").read_text() == "the other's"


@pytest.mark.parametrize("at", [1, 14])
def test_a_loss_that_is_not_finite_stops_the_run(text: Path, here, monkeypatch, at: int):
    steps = 0

    def cross_entropy(*args: object, original=torch.nn.functional.cross_entropy, **options):
        nonlocal steps
        steps += 1
        bad = math.nan if steps == at else 1
        return original(*args, **options) * bad

    monkeypatch.setattr(trainer.F, "cross_entropy", cross_entropy)
    stopped = here("--data", text, *TINY, "--steps", 400, "--save-every", 4, "--out", "run")
    assert stopped.returncode == 1
    good = (at - 1) // 4 * 4
    assert stopped.stderr == (
        f"train.py: the loss or its gradient is not finite after step {good}\n"
    )
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == good
    assert all(x.isfinite().all() for x in parameters(Path("run")).values())
    if good:
        assert [record["step"] for record in records("run")] == [*range(1, good + 1)]


def test_parameters_that_are_not_finite_are_not_saved(text: Path, here, monkeypatch):
    """A gradient can be infinite where the loss is not; only the next loss would show it."""

    def clip(group: list, norm: float, original=torch.nn.utils.clip_grad_norm_):
        for parameter in group[:1]:
            if parameter.grad is not None:
                parameter.grad.fill_(math.inf)
        return original(group, norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    stopped = here("--data", text, *TINY, "--steps", 40, "--save-every", 1, "--out", "run")
    assert stopped.returncode == 1
    assert stopped.stderr == "train.py: the loss or its gradient is not finite after step 0\n"
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 0


@pytest.mark.parametrize("left", [0, 1000, len(TEXT) - 1])
def test_a_text_that_is_cut_short_while_training_is_one_line(four, monkeypatch, left: int):
    monkeypatch.setattr(trainer, "to_tokens", at_step(10, lambda: os.truncate("text.txt", left)))
    options = [*TINY, "--steps", 30, "--save-every", 5, "--out", "new"]
    refused(four("--data", "text.txt", *options), "text.txt was cut short: it had 2160 bytes")
    assert torch.load("new/checkpoint.pt", weights_only=True)["step"] >= 5


@pytest.mark.parametrize("accelerator", [True, False])
def test_memory_that_is_not_there_is_one_line_and_the_checkpoint_stands(
    text: Path, here, monkeypatch, accelerator: bool
):
    def allocate() -> None:
        if accelerator:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0")
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(trainer, "to_tokens", at_step(7, allocate))
    failed = here("--data", text, *TINY, "--steps", 8, "--save-every", 5, "--out", "run")
    asked = "Tried to allocate 20.00 MiB" if accelerator else f"you tried to allocate {2**60} bytes"
    refused(failed, f"{asked}.*; lower --batch-size, --segment or --d-model")
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 5


def test_a_folder_larger_than_memory_is_one_line(text: Path, here, monkeypatch):
    def read_bytes(path: Path) -> bytes:
        raise MemoryError

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    failed = here("--data", text.parent, *TINY, "--out", "run")
    refused(failed, "out of memory: name one file for --data")
    assert not Path("run").exists()


def test_other_errors_are_told_in_full(text: Path, here, monkeypatch):
    def fault() -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(trainer, "to_tokens", at_step(1, fault))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        here("--data", text, *TINY, "--steps", 1)


# ------------------------------------------------------------------- evaluation, samples, pictures


def test_evaluation_takes_the_lengths_of_memory_that_are_asked_for(four):
    state = torch.load("run/checkpoint.pt", weights_only=True)
    found = []
    for mem_len, c_mem_len in ((8, 4), (400, 3), (2, 40), (2, 0)):
        lengths = ["--eval-mem-len", mem_len, "--eval-c-mem-len", c_mem_len]
        done = four("--resume", "run", "--eval-only", *lengths)
        found.append(float(done.stdout.removeprefix("val_bpc=")))
        config = {**state["config"], "mem_len": mem_len, "c_mem_len": c_mem_len}
        model = trainer.CompressiveTransformer(trainer.Config(**config))
        model.load_state_dict(state["model"])
        expected = test_train.held_out_bpc(model, test_train.HELD_OUT, 8)
        assert found[-1] == pytest.approx(expected, abs=1e-4)
    assert len(set(found)) == 4


def test_a_sample_is_shown_as_text(four, monkeypatch):
    made = "né € \x1b[31m\U0001f600".encode() + b"\xff" + "é".encode()[:1]

    def generate(self, prompt, count, **options):
        assert bytes(prompt[0].tolist()) == "Prompt é: ".encode()
        assert count == 77
        return torch.cat([prompt, torch.tensor([[*made]])], dim=1)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.CompressiveTransformer, "generate", generate)
        options = ["--sample", "--prompt", "Prompt é: ", "--sample-bytes", 77]
        done = four("--resume", "run", *options)
    assert done.returncode == 0, done.stderr
    opening = "--- prompt\nPrompt é: \n--- continuation\n"
    assert done.stdout == opening + "né € \ufffd[31m\U0001f600\ufffd\ufffd\n---\n"
    first = four("--resume", "run", "--sample").stdout
    other = four("--resume", "run", "--sample", "--eval-only").stdout
    prompt = TEXT[-(len(TEXT) // 10) :][:64].decode()  # held-out text
    assert first.startswith(f"--- prompt\n{prompt}\n--- continuation\n")
    assert not other.startswith(first)  # another text each time
    score = four("--resume", "run", "--eval-only").stdout
    assert other.endswith(f"---\n{score}")


def test_a_picture_is_drawn_if_matplotlib_is_there(four, monkeypatch):
    """With a stand-in that keeps what is drawn; if installed, the real one draws in other tests."""
    drawn: list[tuple] = []

    class Axes:
        lines = [1, 2]

        def __getattr__(self, name):
            return lambda *args, **options: drawn.append((name, args, options))

    class Figure(Axes):
        def __init__(self, **options) -> None:
            pass

        def subplots(self, rows, columns):
            return [Axes() for _ in range(columns)]

        def savefig(self, path, **options):
            path.write_bytes(b"PNG")

    figure = types.ModuleType("matplotlib.figure")
    figure.Figure = Figure
    monkeypatch.setitem(sys.modules, "matplotlib", types.ModuleType("matplotlib"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", figure)
    done = four("--resume", "run")
    assert "picture in run/run.png\n" in done.stdout
    assert Path("run/run.png").read_bytes() == b"PNG"
    found = records("run")
    loss, compression = [args for name, args, _ in drawn if name == "plot"]
    assert loss == ([x["step"] for x in found], [x["bpc"] for x in found])
    assert compression[1] == [x["compression_loss_of_layers"] for x in found]

    def fails(self, *args: object, **options: object) -> None:
        raise ValueError("\n$_$\n^\x1bexpected")

    monkeypatch.setattr(Figure, "savefig", fails)
    *_, line, bpc = four("--resume", "run").stdout.splitlines()
    assert re.fullmatch(r"no run.png: \S+expected", line)
    assert bpc.startswith("val_bpc=")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # not installed
    done = four("--resume", "run")
    assert (done.returncode, done.stderr) == (0, "")
    *_, line, bpc = done.stdout.splitlines()
    assert line.startswith("no run.png: ") and bpc.startswith("val_bpc=")


# --------------------------------------------------------------------------------- data and speed


def test_a_file_larger_than_memory_is_read_where_it_stands(tmp_path: Path, here, monkeypatch):
    path = tmp_path / "large"
    with open(path, "wb") as file:
        try:
            file.truncate(2**40)
        except OSError:
            file.truncate(10 * 2**30)
        file.seek(12345)
        file.write(b"here")
    text = trainer.find_text("large")
    assert text.read(12340, 12352) == bytes(5) + b"here" + bytes(3)
    resource = pytest.importorskip("resource", reason="memory cannot be measured on this system")
    monkeypatch.setattr(trainer, "to_tokens", stopping(1, signal.SIGINT))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert here("--data", "large", *TINY, "--out", "run").returncode == 130
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB, or bytes


@pytest.mark.elsewhere
def test_compilation_ends_once_memory_is_full():
    """Memory grows for 14 segments, compressed memory for as many more: no length is compiled for
    itself."""
    counter = CompileCounter()
    plain = torch.nn.Module.compile
    torch._dynamo.reset()
    counts = []  # in each step, those of the steps before

    def to_tokens(*args: object, original=trainer.to_tokens) -> torch.Tensor:
        counts.append(counter.frame_count)
        return original(*args)

    lengths = "--n-layers 1 --segment 4 --mem-len 56 --c-mem-len 28 --steps 44".split()
    options = ["--data", "text", *TINY, *lengths]
    with (
        empty_folder() as folder,
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        (folder / "text").write_bytes(TEXT)
        patch.chdir(folder)
        patch.setattr(torch.nn.Module, "compile", lambda self: plain(self, backend=counter))
        patch.setattr(trainer, "to_tokens", to_tokens)
        torch.set_default_dtype(torch.float32)  # that of a new process
        trainer.main([*options, "--compile", "--out", "compiled"])
        assert 0 < counts[34] == counts[44]
        assert sum(before < after for before, after in pairwise(counts)) <= 6  # steps that compiled
        trainer.main([*options, "--out", "eager"])
        torch.set_default_dtype(torch.float64)
        assert farthest(folder / "compiled", folder / "eager") < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, whose waits it watches")
def test_a_step_on_cuda_waits_for_nothing(text: Path, here, monkeypatch):
    steps = count()

    def to_tokens(*args: object, original=trainer.to_tokens) -> torch.Tensor:
        if 0 < next(steps) < 400:  # the first may wait
            torch.cuda.set_sync_debug_mode("error")
        return original(*args)

    def all_reduce(*args: object, original=trainer.all_reduce) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("default")  # a step has ended
        return original(*args)

    monkeypatch.setattr(trainer, "to_tokens", to_tokens)
    monkeypatch.setattr(trainer, "all_reduce", all_reduce)
    options = ["--steps", 400, "--save-every", 1000, "--device", "cuda", "--dtype", "bfloat16"]
    done = here("--data", text, *TINY, *options, "--out", "run")
    assert done.returncode == 0, done.stderr


# --------------------------------------------------------------------------- processes of their own


def launch(
    processes: int, *options: object, cwd: Path, main: Callable = train_as_new
) -> tuple[int, str]:
    """What torchrun does, but in forks of this process, which has torch loaded already: the exit
    status, and what all printed."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="here",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
    )

    def work(options: Sequence[object]) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not torchrun's handler
        main(options)

    return wait(start(cwd, *options, main=elastic_launch(config, work)), cwd)


@pytest.mark.elsewhere
def test_killed_runs_end_as_one_left_alone():
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", ["train_kill", "--times", "5"])
        train_kill.main()
    assert printed.getvalue().startswith("5 kills, ")
    assert printed.getvalue().endswith("every run ended bitwise as one that was left alone\n")


@pytest.mark.elsewhere
def test_signals_of_a_user_reach_the_process():
    with empty_folder() as folder:
        (folder / "text").write_bytes(TEXT)
        options = ["--data", "text", *TINY, "--out", "run", "--steps", "100000"]
        command = [sys.executable, TRAIN, *options]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, cwd=folder, **pipes)
        for line in process.stdout:
            if line.startswith("step "):
                break
        process.send_signal(signal.SIGINT)
        errors = process.communicate()[1]
        assert process.returncode == 130, errors
        assert errors.startswith("train.py: stopped after step ") and errors.count("\n") == 1


def limited(options: Sequence[object]) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
    train_as_new(options)


@pytest.mark.elsewhere
def test_a_limit_of_the_system_on_files_is_one_line_too():
    with empty_folder() as folder:
        (folder / "text").write_bytes(TEXT)
        options = ["--data", "text", "--out", "run", "--steps", 4]
        status, printed = wait(start(folder, *options, main=limited), folder)
        assert status == 2
        message = "train.py: run/checkpoint.pt could not be written: File too large; nothing was "
        assert printed.splitlines()[1].startswith(message) and printed.count("\n") == 2
        assert os.listdir(folder / "run") == ["metrics.jsonl"]  # empty: the folder was taken


MANY = [*TINY, "--batch-size", 8, "--steps", 50, "--mem-len", 20]
MANY += ["--c-mem-len", 6, "--compression-rate", 4, "--segment", 6]


@pytest.mark.elsewhere
def test_processes_train_as_one():
    """Memory fills for three segments, so that the first step compresses nothing and has no
    gradient for f_c. With four processes, layers run again in the backward pass. All in float64: in
    float32 the order of a sum matters, since Adam makes of a gradient that is rounding a step as
    large as of any other."""
    with empty_folder() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_kill, "DTYPE", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        (folder / "text").write_bytes(TEXT)
        options = ["--data", "text", *MANY]
        finish(start(folder, *options, "--out", "one"), folder)
        expected = result(folder / "one")[1]
        for processes, more in ((2, []), (4, ["--recompute"])):
            out = f"run{processes}"
            status, printed = launch(processes, *options, *more, "--out", out, cwd=folder)
            assert status == 0, printed
            assert printed.count(f"results in {out}") == printed.count("val_bpc=") == 1
            assert farthest(folder / "one", folder / out) < 1e-6
            found = result(folder / out)[1]
            assert len(found) == len(expected) == 50
            assert expected[0]["compression_loss"] == 0 < expected[4]["compression_loss"]
            for a, b in zip(expected, found, strict=True):
                for name in ("bpc", "compression_loss", "gradient_norm", "lr"):
                    assert abs(a[name] - b[name]) < 1e-6
        score = finish(start(folder, "--resume", "run4", "--eval-only"), folder)
        assert score == f"val_bpc={printed.split('val_bpc=')[1].split()[0]}\n"


@pytest.mark.elsewhere
def test_the_replica_is_gone_before_the_group_of_processes():
    """Or its end joins gloo's thread, holding Python's lock, for which that thread may wait: now
    and then a run never ended."""

    def destroy(original=dist.destroy_process_group) -> None:
        kind = torch.nn.parallel.DistributedDataParallel
        print("replicas:", sum(type(x) is kind for x in gc.get_objects()))
        original()

    with empty_folder() as folder, pytest.MonkeyPatch.context() as patch:
        (folder / "text").write_bytes(TEXT)
        patch.setattr(dist, "destroy_process_group", destroy)
        options = ["--data", "text", *TINY, "--steps", 2, "--out", "run"]
        status, printed = launch(1, *options, cwd=folder)
    assert status == 0, printed
    assert "replicas: 0\n" in printed


# In both, process 1 gets a signal in one of its steps.
STOPPED = f"""import signal, sys
sys.path.insert(0, {str(TRAIN.parent)!r})
import train
from spec_tests.test_train_runs import stopping

if train.RANK == 1:
    train.to_tokens = stopping(2, signal.SIGTERM)
train.main()
"""


def killed(options: Sequence[object]) -> None:
    importlib.reload(trainer)
    if trainer.RANK == 1:
        trainer.to_tokens = stopping(7, signal.SIGKILL)
    trainer.main([str(option) for option in options])


@pytest.mark.elsewhere
def test_one_process_killed_or_stopped_ends_all_and_they_go_on_exactly():
    with empty_folder() as folder:
        (folder / "text").write_bytes(TEXT)
        options = "--steps 12 --dropout 0.1 --save-every 3 --batch-size 4".split()
        options = ["--data", "text", *TINY, *options]
        assert launch(2, *options, "--out", "whole", cwd=folder)[0] == 0

        status, printed = launch(2, *options, "--out", "whole", cwd=folder)
        assert status != 0
        ours = [line for line in printed.splitlines() if line.startswith("train.py: ")]
        mend = "name a new folder, so that no run is lost"
        assert ours == [f"train.py: --out whole is not empty: {mend}"]

        assert launch(2, *options, "--out", "run", cwd=folder, main=killed)[0] != 0
        assert torch.load(folder / "run/checkpoint.pt", weights_only=True)["step"] == 6

        # Once as a user does it.
        script = folder / "stopped.py"
        script.write_text(STOPPED)
        stopped = run("--resume", "run", cwd=folder, command=(*TORCHRUN, 2, script))
        said = "train.py: stopped after step 8; to go on: --resume run\n"
        assert said in stopped.stderr, stopped.stderr
        assert "find_unused_parameters" not in stopped.stderr
        state = torch.load(folder / "run/checkpoint.pt", weights_only=True)
        assert state["step"] == 8
        assert {len(slots) for layers in state["memory"] for slots in layers} == {4}  # all rows

        assert launch(2, "--resume", "run", cwd=folder)[0] == 0
        assert same(result(folder / "run"), result(folder / "whole"))
