"""train.py as a user meets it: its options, its texts, its output and its files."""

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import train as trainer

from .adapters.reference import Adapter as Reference
from .train_kill import start, wait

api = Reference().module

TRAIN = Path(api.__file__).with_name("train.py")
TINY = "--d-model 16 --n-heads 2 --n-layers 2 --d-ff 16 --mem-len 8 --c-mem-len 4".split()
TINY += "--compression-rate 2 --segment 8 --batch-size 2 --sample-bytes 20".split()
TINY += "--device cpu --dtype float32".split()
FILES = ["checkpoint.pt", "metrics.jsonl", "run.png", "sample.txt"]
if find_spec("matplotlib") is None:
    FILES.remove("run.png")
TEXT = b"In the beginning was the word, and the word was long. " * 40
HELD_OUT = TEXT[-len(TEXT) // 10 - 1 :]  # and the byte before


def run(*options: object, cwd: Path, command: tuple = (sys.executable, TRAIN)):
    """In a process of its own."""
    words = [str(word) for word in (*command, *options)]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=300)


@contextlib.contextmanager
def empty_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch, capsys):
    """Runs train.py's main in this process, for speed, in `tmp_path`: the exit status and what it
    printed. torch's default dtype is that of a new process."""
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    handlers = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}

    def run_here(*options: object) -> subprocess.CompletedProcess:
        status = 0
        try:
            trainer.main([str(option) for option in options])
        except SystemExit as exit:
            status = exit.code
        return subprocess.CompletedProcess(options, status, *capsys.readouterr())

    yield run_here
    for kind, handler in handlers.items():
        signal.signal(kind, handler)
    torch.set_default_dtype(torch.float64)


@pytest.fixture(scope="session")
def run_of_four_steps(tmp_path_factory) -> Path:
    """A folder with the text and a finished run."""
    folder = tmp_path_factory.mktemp("four")
    (folder / "text.txt").write_bytes(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.set_default_dtype(torch.float32)
        trainer.main(["--data", "text.txt", *TINY, "--steps", "4", "--out", "run"])
        torch.set_default_dtype(torch.float64)
    return folder


@pytest.fixture
def four(run_of_four_steps: Path, tmp_path: Path, here):
    """`here`, in a folder that has the text and that run."""
    shutil.copytree(run_of_four_steps, tmp_path, dirs_exist_ok=True)
    return here


def refused(result: subprocess.CompletedProcess, message: str) -> None:
    """One line on standard error that says what is wrong; status 2, no traceback."""
    assert result.returncode == 2, result.stderr
    assert re.search(message, result.stderr), result.stderr
    assert result.stderr.count("\n") == 1, result.stderr


def records(folder: str | Path) -> list[dict]:
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_shows_progress_and_leaves_metrics_and_a_checkpoint(text: Path, here):
    result = here("--data", text, *TINY, "--steps", 130, "--out", "run")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0] == "2,160 bytes of " + str(text) + lines[0][15 + len(str(text)) :]
    assert lines[0].endswith(" parameters; cpu, float32; results in run")
    shown = [line for line in lines if line.startswith("step ")]
    assert len(shown) == 44  # every 130 // 40 steps, and the last
    pattern = (
        r"step +\d+/130  bpc \d\.\d{3}  compression loss \d\.\d{4}  [\d,]+ tokens/s  \d+ s left"
    )
    assert all(re.fullmatch(pattern, line) for line in shown)
    summary = re.fullmatch(r"val_bpc=(\d\.\d{4}) tokens_per_second=\d+ seconds=\d+\.\d", lines[-1])
    assert summary and float(summary[1]) < 5  # a model that knows nothing would have 8
    assert "--- continuation" in lines

    found = records("run")
    assert [record["step"] for record in found] == [*range(1, 131)]
    assert found[-1]["bpc"] < found[0]["bpc"] < 9
    assert found[-1]["lr"] < 1e-4 < max(record["lr"] for record in found) <= 3e-3
    for record in found:
        assert record["gradient_norm"] > 0
        layers = record["compression_loss_of_layers"]
        assert len(layers) == 2
        anew = record["step"] in (1, 123)  # memory is empty, as every 122 segments, and takes all
        assert max(layers) == 0 if anew else min(layers) > 0
        assert abs(sum(layers) / 2 - record["compression_loss"]) < 1e-12

    state = torch.load("run/checkpoint.pt", weights_only=True)
    assert all(group["fused"] for group in state["optimizer"]["param_groups"])
    model = api.CompressiveTransformer(api.Config(**state["config"]))
    model.load_state_dict(state["model"])
    assert sorted(path.name for path in Path("run").iterdir()) == FILES
    written = Path("run/sample.txt").read_text()
    assert written in result.stdout and written.startswith("--- prompt")
    assert held_out_bpc(model, HELD_OUT, 8) == pytest.approx(float(summary[1]), abs=1e-4)
    assert here("--resume", "run", "--eval-only").stdout == f"val_bpc={summary[1]}\n"


def test_some_parameters_have_a_higher_rate(text: Path, here):
    here("--data", text, *TINY, "--steps", 4, "--out", "run")
    state = torch.load("run/checkpoint.pt", weights_only=True)
    others, biases = state["optimizer"]["param_groups"]
    rate = records("run")[-1]["lr"]
    assert rate > 0
    assert [group["lr"] for group in (others, biases)] == [rate, 10 * rate]
    assert len(biases["params"]) == 4  # u and v of two layers
    assert len(others["params"]) == len(state["model"]) - 4


def test_heads_begin_with_distances_of_their_own(text: Path, here):
    here("--data", text, *TINY, "--steps", 1, "--lr", 1e-9, "--out", "run")
    weights = torch.load("run/checkpoint.pt", weights_only=True)["model"]
    for layer in (0, 1):
        u = weights[f"layers.{layer}.attention.content_bias"]
        v = weights[f"layers.{layer}.attention.position_bias"]
        assert u.abs().max() < 1e-6
        assert 2 < v.std() < 4


def test_the_rate_rises_in_a_line_and_falls_in_another():
    args = argparse.Namespace(lr=6.0, steps=30)
    rates = [trainer.learning_rate(args, step) for step in range(30)]
    assert rates[:5] == [1.5, 3.0, 4.5, 6.0, pytest.approx(6 * 26 / 27)]
    assert rates[-1] == pytest.approx(6 / 27)
    falls = [a - b for a, b in pairwise(rates[3:])]
    assert falls == pytest.approx([6 / 27] * 26)
    args.steps = 1000
    rates = [trainer.learning_rate(args, step) for step in range(1000)]
    assert rates.index(max(rates)) == 25  # a tenth of the steps, but no more


def test_what_is_left_is_told_by_the_speed(tmp_path: Path, capsys):
    """6 steps of 2 x 8 tokens, at 4 a second."""
    args = argparse.Namespace(out=tmp_path, steps=10, batch_size=2, segment=8, lr=1.0)
    trainer.report(args, 4, torch.ones(1, 4), speed=4.0)
    assert capsys.readouterr().out.endswith("  4 tokens/s  24 s left\n")


def held_out_bpc(model: torch.nn.Module, held_out: bytes, segment: int) -> float:
    """Bits per character of a text, but for its first byte, in eight rows, one after the other."""
    length = max(1, (len(held_out) - 1) // 8)
    nats = []
    with torch.no_grad():
        for row in range(0, len(held_out) - length, length):
            memory = None
            for start in range(row, row + length, segment):
                end = min(start + segment, row + length)
                tokens = torch.tensor([list(held_out[start : end + 1])])
                output = model(tokens[:, :-1], memory)
                memory = output.memory
                chances = output.logits[0].log_softmax(dim=-1)
                nats += [-chances[i, token].item() for i, token in enumerate(tokens[0, 1:])]
    assert len(nats) >= len(held_out) - 8
    return sum(nats) / len(nats) / math.log(2)


@pytest.mark.parametrize("length", [2, 7, 8, 15, 63, 71, 200])
def test_held_out_text_is_read_in_eight_rows_each_with_its_own_memory(length: int):
    """Or in more, if it is very short."""
    data = random.Random(0).randbytes(10 * length)
    text = trainer.Text(io.BytesIO(data), "some")
    torch.manual_seed(0)
    model = api.CompressiveTransformer(api.Config(d_model=16, n_layers=2, mem_len=6, c_mem_len=2))
    expected = held_out_bpc(model, data[9 * length - 1 :], segment=4)
    with torch.no_grad():
        assert trainer.evaluate(model, text, 4) == pytest.approx(expected, rel=1e-5)


def test_every_step_is_recorded_and_the_mean_since_the_last_line_shown(
    text: Path, here, monkeypatch
):
    """Each layer's loss as the model gives it."""
    seen: list[torch.Tensor] = []

    def forward(self, tokens, memory=None, original=api.CompressiveTransformer.forward, **options):
        output = original(self, tokens, memory, **options)
        if torch.is_grad_enabled():
            seen.append(output.compression_losses.detach())
        return output

    monkeypatch.setattr(trainer.CompressiveTransformer, "forward", forward)
    done = here("--data", text, *TINY, "--steps", 80, "--out", "run")
    assert done.returncode == 0, done.stderr
    found = records("run")
    for record, expected in zip(found, seen, strict=True):
        assert record["compression_loss_of_layers"] == expected.tolist()
    shown = re.findall(r"bpc (\S+)  compression loss (\S+)", done.stdout)
    for line, pair in zip(shown, zip(found[::2], found[1::2], strict=True), strict=True):
        for value, name in zip(line, ("bpc", "compression_loss"), strict=True):
            mean = (pair[0][name] + pair[1][name]) / 2
            assert float(value) == pytest.approx(mean, abs=6e-4 if name == "bpc" else 6e-5)


def test_the_same_seed_gives_the_same_run_and_another_another(text: Path, here):
    results = []
    for i, seed in enumerate((1, 1, 2)):
        options = [*TINY, "--steps", 20, "--dropout", 0.1, "--seed", seed, "--out", f"run{i}"]
        out = here("--data", text, *options).stdout
        numbers = re.findall(r"bpc (\S+)  compression loss (\S+)|val_bpc=(\S+)", out)
        results.append((numbers, Path(f"run{i}/sample.txt").read_text()))
    first, second, other = results
    assert len(first[0]) == 21
    assert first == second != other


@pytest.mark.parametrize(
    "options",
    [
        "--compression dilated_conv --compression-loss autoencoding --norm-first --dropout 0.1",
        "--compression most_used --compression-loss none --dtype bfloat16",
        "--compression max_pool --c-mem-len 0 --mem-len 0 --batch-size 1",
        "--recompute",
    ],
)
def test_other_settings_train(text: Path, here, options: str):
    result = here("--data", text, *TINY, "--steps", 8, *options.split(), "--out", "run")
    assert result.returncode == 0, result.stderr
    state = torch.load("run/checkpoint.pt", weights_only=True)
    assert state["config"]["norm_first"] == ("--norm-first" in options)
    assert state["config"]["recompute"] == ("--recompute" in options)
    assert state["config"]["compression"] in ("conv", *options.split())
    assert state["model"]["logits.weight"].dtype == torch.float32


def test_a_folder_of_any_bytes_is_read_in_order(tmp_path: Path, here):
    (tmp_path / "texts/sub").mkdir(parents=True)
    (tmp_path / "texts/b.bin").write_bytes(bytes(range(256)) * 3)
    (tmp_path / "texts/sub/c").write_bytes(b"\x1b[31m\x00" * 50)
    (tmp_path / "texts/empty").touch()
    result = here("--data", "texts", *TINY, "--steps", 2)
    assert result.returncode == 0, result.stderr
    assert "1,068 bytes of texts" in result.stdout
    assert "\x1b" not in result.stdout
    expected = bytes(range(256)) * 3 + b"\x1b[31m\x00" * 50
    (tmp_path / "one").write_bytes(expected)
    for name in ("texts", "one"):
        text = trainer.find_text(name)
        assert text.length == len(expected)
        for begin, end in ((0, 1068), (700, 800), (768, 769), (767, 768), (1000, 1068), (5, 5)):
            assert text.read(begin, end) == expected[begin:end]
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_the_default_text_is_the_standard_library(here):
    result = here(*TINY, "--steps", 1, "--segment", 256, "--batch-size", 32)
    assert result.returncode == 0, result.stderr
    size = int(re.search(r"([\d,]+) bytes of stdlib", result.stdout)[1].replace(",", ""))
    assert size > 1_000_000


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals on this system")
@pytest.mark.elsewhere
def test_a_terminal_shows_one_live_line():
    """Under a pseudo-terminal, as the script command of a user would give it."""
    with empty_folder() as folder:
        import fcntl
        import pty
        import termios

        leader, follower = pty.openpty()
        size = struct.pack("HHHH", 24, 50, 0, 0)  # fewer columns than a line needs
        fcntl.ioctl(follower, termios.TIOCSWINSZ, size)
        (folder / "text").write_bytes(TEXT)
        command = [sys.executable, str(TRAIN), "--data", "text", *TINY, "--steps", "40"]
        env = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
        process = subprocess.Popen(command, cwd=folder, stdout=follower, stderr=follower, env=env)
        os.close(follower)
        shown = b""
        while True:
            try:
                part = os.read(leader, 4096)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            shown += part
        os.close(leader)
        assert process.wait() == 0
        lines = shown.decode().split("\r\n")
        live = [line for line in lines if "step 40/40" in line]
        assert len(live) == 1
        _, *updates = live[0].replace("\x1b[K", "").split("\r")
        assert len(updates) == live[0].count("\x1b[K") == 40
        assert max(map(len, updates)) == 49  # one more would begin another line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--data nowhere.txt", "--data nowhere.txt is no file or folder with text: name one"),
        ("--data empty", "--data empty is no file or folder with text"),
        ("--eval-mem-len 0", "eval_mem_len must be at least compression_rate - 1 = 1, got 0"),
        ("--eval-c-mem-len -1", "eval_c_mem_len must be an integer of at least 0, got -1"),
        ("--eval-only", "--eval-only and --sample need a run: add --resume RUN"),
        ("--sample", "--eval-only and --sample need a run: add --resume RUN"),
        ("--resume nowhere", "nowhere/checkpoint.pt: No such file"),
        ("--resume=", "checkpoint.pt: No such file"),
        ("--data short --batch-size 8", "--data short is too short for 8 rows: name a longer"),
        ("--data folder", "--data folder is no file or folder with text"),
        ("--data=", "--data  is no file or folder with text"),
        ("--device privateuseone", "--device privateuseone cannot be used: .*; try --device cpu"),
        ("--out taken", "--out taken is not empty: name a new folder"),
        ("--out short", "short: File exists"),
        ("--out short/run", "short/run: Not a directory"),
        ("--steps 0", "steps must be above 0, got 0"),
        ("--segment -3", "segment must be above 0, got -3"),
        ("--steps many", "argument --steps: invalid int value: 'many'"),
        ("--steps 1000000000000000000", r"steps must be between -2\*\*31 and 2\*\*31, got 10+$"),
        ("--mem-len 100000000000000000000", r"mem_len must be between .* and 2\*\*31, got 10+$"),
        ("--lr 0", "lr must be above 0, got 0"),
        ("--lr nan", "lr must be above 0, got nan"),
        ("--d-model 15", "d_model must be divisible by n_heads = 2, got 15"),
        ("--dropout 1", r"dropout must be a number in \[0, 1\), got 1.0"),
        ("--compression sum", "compression must be one of conv, .*, got 'sum'"),
        ("--device warp", "--device warp cannot be used: .*; try --device cpu"),
        ("--device meta", "--device meta cannot be used: .*; try --device cpu"),
        ("--dtype int8", "argument --dtype: invalid choice: 'int8'"),
        ("--sed 3", "unrecognized arguments: --sed 3"),
        ("--seed -9999999999", r"seed must be between -2\*\*31 and 2\*\*31, got -9999999999"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    tmp_path: Path, text: Path, here, options: str, message: str
):
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_bytes(b"x" * 100)
    (tmp_path / "folder").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/metrics.jsonl").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    result = here("--data", text, *TINY, "--steps", 1, *options.split())
    refused(result, message)
    assert result.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "taken/metrics.jsonl").read_text() == "precious"


def test_a_folder_that_cannot_be_read_whole_is_refused(tmp_path: Path, here, monkeypatch):
    """Its files are not left out without a word."""
    (tmp_path / "folder/closed").mkdir(parents=True)
    (tmp_path / "folder/text").write_bytes(TEXT)

    def listdir(path: Path, original=os.listdir) -> list[str]:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "listdir", listdir)  # root may read all
    result = here("--data", "folder", *TINY, "--steps", 1)
    refused(result, "folder/closed: Permission denied")


@pytest.mark.elsewhere
def test_a_refusal_ends_the_process_with_status_2_and_no_traceback():
    with empty_folder() as folder:
        (folder / "text").write_bytes(TEXT)
        refused(run("--data", "text", "--n-heads", 3, cwd=folder), "d_model must be divisible by")
        assert [path.name for path in folder.iterdir()] == ["text"]


@pytest.mark.skipif(sys.platform == "win32", reason="no shell that closes a file")
@pytest.mark.elsewhere
def test_output_may_be_closed():
    with empty_folder() as folder:
        (folder / "text").write_bytes(TEXT)
        command = shlex.join([sys.executable, str(TRAIN), "--data", "text", *TINY, "--steps", "1"])
        done = run("-c", f"{command} --out run >&-", cwd=folder, command=("sh",))
        assert (done.returncode, done.stderr) == (0, "")
        assert (folder / "run/sample.txt").exists()


@pytest.mark.elsewhere
def test_names_that_are_no_text_are_shown_as_far_as_they_can_be():
    """Not UTF-8, a line end, and what a terminal or a picture would take for a command."""
    with empty_folder() as folder:
        name = os.fsdecode(b"t\xff\n\x1b[31m $x")
        try:
            (folder / name).write_bytes(TEXT)
        except (OSError, ValueError):
            pytest.skip("no such names on this system")
        done = run("--data", name, *TINY, "--steps", 2, "--out", name + "run", cwd=folder)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        lines = done.stdout.splitlines()
        assert re.match(r"2,160 bytes of t\S+\[31m \$x; .*; results in t\S+\[31m \$xrun$", lines[0])
        assert lines[-1].startswith("val_bpc=")
        status, printed = wait(start(folder, "--resume", name + "run", "--eval-only"), folder)
        assert status == 0, printed
        status, printed = wait(start(folder, "--data", name + "?"), folder)
        assert status == 2
        message = r"train.py: --data t\S+ \S+\[31m \$x\? is no file or folder with text: name one\n"
        assert re.fullmatch(message, printed)


@pytest.mark.elsewhere
def test_help_tells_every_option():
    """Without docstrings, too."""
    with empty_folder() as folder:
        result = run("--help", cwd=folder, command=(sys.executable, "-OO", TRAIN))
        assert result.returncode == 0
        for name in api.Config.__dataclass_fields__.keys() - {"vocab_size", "bptt"}:
            assert re.search(rf"^  --{name.replace('_', '-')}\b", result.stdout, re.MULTILINE)
        assert result.stdout.count("(default: ") >= 24


def test_tiny_shakespeare_is_refused_without_network(tmp_path: Path, here, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody listens
    command = ["--data", "tinyshakespeare", *TINY, "--steps", 1]
    refused(here(*command), "could not be fetched: .*--data PATH")
    assert list(tmp_path.rglob("*")) == [tmp_path / "data"]


def test_main_can_be_called_where_output_is_no_terminal_nor_file():
    """As in a notebook."""
    with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit) as ended:
        trainer.main(["--help"])
    assert ended.value.code == 0
    assert "--batch-size" in said.getvalue()


def test_tiny_shakespeare_is_fetched_once_checked_and_kept(tmp_path: Path, monkeypatch, capsys):
    """The network is a file, and the checksum that of its text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "source").write_bytes(TEXT)
    monkeypatch.setattr(trainer, "URL", (tmp_path / "source").as_uri())
    with pytest.raises(SystemExit, match="2"):
        trainer.find_text("tinyshakespeare")
    assert "could not be fetched: invalid hash value" in capsys.readouterr().err
    assert list((tmp_path / "data").iterdir()) == []
    monkeypatch.setattr(trainer, "SHAKESPEARE_SHA256", hashlib.sha256(TEXT).hexdigest())
    for _ in range(2):
        assert trainer.find_text("tinyshakespeare").read(0, len(TEXT)) == TEXT
        (tmp_path / "source").unlink(missing_ok=True)
    kept = tmp_path / "data/tinyshakespeare.txt"
    assert list((tmp_path / "data").iterdir()) == [kept]
    kept.write_bytes(TEXT[:-1])
    with pytest.raises(SystemExit, match="2"):
        trainer.find_text("tinyshakespeare")
    assert "tinyshakespeare.txt is not the whole of Tiny Shakes" in capsys.readouterr().err


@pytest.mark.parametrize(("length", "rows", "segment"), [(100, 4, 8), (111, 3, 16), (60, 3, 24)])
def test_an_epoch_reads_every_byte_of_the_text_once(here, monkeypatch, length, rows, segment):
    """A step reads up to a segment, less where the rows end; then they begin anew."""
    Path("text").write_bytes(bytes(range(length)))
    reads: list[list[bytes]] = []
    empty: list[bool] = []

    def to_tokens(parts, device, original=trainer.to_tokens):
        reads.append(parts)
        return original(parts, device)

    def forward(self, tokens, memory=None, original=api.CompressiveTransformer.forward, **options):
        empty.append(memory is None or memory.mem[0].size(1) == 0)
        return original(self, tokens, memory, **options)

    monkeypatch.setattr(trainer, "to_tokens", to_tokens)
    monkeypatch.setattr(trainer.CompressiveTransformer, "forward", forward)
    share = (length - length // 10 - 1) // rows
    steps = -(-share // segment)
    options = ["--steps", 2 * steps, "--segment", segment, "--batch-size", rows]
    assert here("--data", "text", *TINY, *options).returncode == 0
    reads = reads[: 2 * steps]  # the rest is evaluation
    assert empty[: 2 * steps] == [i % steps == 0 for i in range(2 * steps)]
    pairs = [pair for parts in reads for part in parts for pair in pairwise(part)]
    assert sorted(pairs) == sorted([(i, i + 1) for i in range(rows * share)] * 2)
    for row in range(rows):  # each row goes on where it was, and begins anew with its stretch
        targets = [byte for parts in reads for byte in parts[row][1:]]
        assert targets == 2 * list(range(row * share + 1, row * share + share + 1))


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [({}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True)],
)
def test_bfloat16_is_for_a_cpu_that_multiplies_it(monkeypatch, capabilities: dict, fast: bool):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert trainer.has_bfloat16(torch.device("cpu")) == fast
    assert not trainer.has_bfloat16(torch.device("meta"))
