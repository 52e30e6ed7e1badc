"""train.py as a user runs it: a process, its options, its output and its files."""

import hashlib
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import train as trainer

from .adapters.reference import Adapter as Reference

api = Reference().module

TRAIN = Path(api.__file__).with_name("train.py")
TINY = "--d-model 16 --n-heads 2 --n-layers 2 --d-ff 16 --mem-len 8 --c-mem-len 4".split()
TINY += "--compression-rate 2 --segment 8 --batch-size 2 --sample-bytes 20".split()
TINY += "--device cpu --dtype float32".split()
FILES = ["checkpoint.pt", "metrics.jsonl", "run.png", "sample.txt", "settings.json"]
if find_spec("matplotlib") is None:
    FILES.remove("run.png")
TEXT = b"In the beginning was the word, and the word was long. " * 40


def run(*options: object, cwd: Path, env: dict[str, str] | None = None):
    """In a process with as many threads as the tests themselves: rounding depends on that."""
    command = [sys.executable, str(TRAIN), *map(str, options)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=env)


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


def refused(result: subprocess.CompletedProcess, message: str) -> None:
    """One line on standard error that says what is wrong; status 2, no traceback."""
    assert result.returncode == 2, result.stderr
    assert re.search(message, result.stderr), result.stderr
    assert result.stderr.count("\n") == 1, result.stderr


def test_a_run_shows_progress_and_leaves_metrics_and_a_checkpoint(text: Path, tmp_path: Path):
    result = run("--data", text, *TINY, "--steps", 300, "--out", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    shown = [line for line in lines if line.startswith("step ")]
    assert len(shown) == 43  # every 300 // 40 steps, and the last
    pattern = (
        r"step +\d+/300  bpc \d\.\d{3}  compression loss \d\.\d{4}  [\d,]+ tokens/s  \d+ s left"
    )
    assert all(re.fullmatch(pattern, line) for line in shown)
    summary = re.fullmatch(r"val_bpc=(\d\.\d{4}) tokens_per_second=\d+ seconds=\d+\.\d", lines[-1])
    assert summary and float(summary[1]) < 3.5  # a model that knows nothing would have 8
    assert "--- continuation" in lines

    records = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [*range(7, 301, 7), 300]
    assert records[-1]["bpc"] < records[0]["bpc"] < 9
    assert records[-1]["lr"] < 1e-4 < max(record["lr"] for record in records) <= 3e-3
    assert all(record["compression_loss"] > 0 for record in records)

    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert all(group["fused"] for group in state["optimizer"]["param_groups"])
    model = api.CompressiveTransformer(api.Config(**state["config"]))
    model.load_state_dict(state["model"])
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == FILES
    assert json.loads((tmp_path / "run/settings.json").read_text())["steps"] == 300
    written = (tmp_path / "run/sample.txt").read_text()
    assert written in result.stdout and written.startswith("--- prompt")
    held_out = torch.tensor(list(TEXT[-len(TEXT) // 10 - 1 :]))[None]
    nats, memory = 0.0, None
    with torch.no_grad():
        for at in range(0, held_out.size(1) - 1, 8):
            part = held_out[:, at : at + 9]
            logits, memory, _ = model.float()(part[:, :-1], memory)
            nats += torch.nn.functional.cross_entropy(logits[0], part[0, 1:], reduction="sum")
    bpc = nats.item() / math.log(2) / (len(TEXT) // 10)
    assert abs(bpc - float(summary[1])) < 1e-4
    alone = run("--resume", "run", "--eval-only", cwd=tmp_path)
    assert alone.stdout == f"val_bpc={summary[1]}\n"


def test_the_same_seed_gives_the_same_run_and_another_another(text: Path, here):
    results = [
        here("--data", text, *TINY, "--steps", 30, "--seed", seed, "--out", f"run{i}").stdout
        for i, seed in enumerate((1, 1, 2))
    ]
    first, second, other = (
        re.findall(r"bpc (\S+)  compression loss (\S+)|val_bpc=(\S+)", out) for out in results
    )
    assert len(first) > 20
    assert first == second != other


@pytest.mark.parametrize(
    "options",
    [
        "--compression dilated_conv --compression-loss autoencoding --no-norm-first --dropout 0.1",
        "--compression most_used --compression-loss none --unroll 3 --dtype bfloat16",
        "--compression max_pool --c-mem-len 0 --mem-len 0 --batch-size 1",
        "--bptt --unroll 2 --compression-loss none",
    ],
)
def test_other_settings_train(text: Path, here, options: str):
    result = here("--data", text, *TINY, "--steps", 8, *options.split(), "--out", "run")
    assert result.returncode == 0, result.stderr
    config = torch.load("run/checkpoint.pt", weights_only=True)["config"]
    assert config["norm_first"] == ("--no-norm-first" not in options)
    assert config["bptt"] == ("--bptt" in options)
    assert config["compression"] in ("conv", *options.split())


def test_a_folder_of_any_bytes_is_read_in_order(tmp_path: Path, here):
    (tmp_path / "texts/sub").mkdir(parents=True)
    (tmp_path / "texts/b.bin").write_bytes(bytes(range(256)) * 3)
    (tmp_path / "texts/sub/c").write_bytes(b"\x1b[31m\x00" * 50)
    (tmp_path / "texts/empty").touch()
    result = here("--data", "texts", *TINY, "--steps", 2)
    assert result.returncode == 0, result.stderr
    assert "1,068 bytes of texts" in result.stdout
    assert "\x1b" not in result.stdout
    text, expected = trainer.find_text("texts"), bytes(range(256)) * 3 + b"\x1b[31m\x00" * 50
    assert text.length == len(expected)
    for start, end in ((0, 1068), (700, 800), (768, 769), (767, 768), (1000, 2000), (5, 5)):
        assert text.read(start, end) == expected[start:end]
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_the_default_text_is_the_standard_library(tmp_path: Path):
    result = run(*TINY, "--steps", 1, "--segment", 128, "--batch-size", 32, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    size = int(re.search(r"([\d,]+) bytes of stdlib", result.stdout)[1].replace(",", ""))
    assert size > 1_000_000


def test_a_terminal_shows_one_live_line(text: Path, tmp_path: Path):
    """Under a pseudo-terminal, as the script command of a user would give it."""
    pty = pytest.importorskip("pty", reason="no pseudo-terminals on this system")
    leader, follower = pty.openpty()
    size = struct.pack("HHHH", 24, 50, 0, 0)  # fewer columns than a line needs
    pytest.importorskip("fcntl").ioctl(follower, pytest.importorskip("termios").TIOCSWINSZ, size)
    command = [sys.executable, str(TRAIN), "--data", text, *TINY, "--steps", "40"]
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    process = subprocess.Popen(command, cwd=tmp_path, stdout=follower, stderr=follower, env=env)
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
    _, *shown = live[0].replace("\x1b[K", "").split("\r")
    assert len(shown) == live[0].count("\x1b[K") == 40
    assert max(map(len, shown)) == 49  # one more would begin another line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--data nowhere.txt", "--data nowhere.txt is not there or has no text: name a"),
        ("--data empty", "--data empty is not there or has no text"),
        ("--accumulate 3", r"batch_size must be divisible by 1 processes x 3 parts .*, got 2"),
        ("--eval-mem-len 0", "mem_len must be at least compression_rate - 1 = 1, got 0"),
        ("--eval-only", "--eval-only and --sample need a run: add --resume RUN"),
        ("--sample", "--eval-only and --sample need a run: add --resume RUN"),
        ("--resume nowhere", "nowhere/checkpoint.pt: No such file"),
        ("--data short --batch-size 8", "--data short has 100 bytes, 8 rows need 160: name a lo"),
        ("--data folder", "--data folder is not there or has no text"),
        ("--out taken", "--out taken is not empty: name a new folder"),
        ("--out short", "short: File exists"),
        ("--out short/run", "short/run: Not a directory"),
        ("--steps 0", "steps must be above 0, got 0"),
        ("--steps many", "--steps: invalid int value: 'many'"),
        ("--lr 0", "lr must be above 0, got 0"),
        ("--lr nan", "lr must be above 0, got nan"),
        ("--d-model 15", "d_model must be divisible by n_heads = 2, got 15"),
        ("--dropout 1", r"dropout must be a number in \[0, 1\), got 1.0"),
        ("--compression sum", "compression must be one of conv, .*, got 'sum'"),
        ("--bptt", "unroll must be at least 2 with bptt: slots are first read a segment later"),
        ("--device warp", "--device warp cannot be used: .*; try --device cpu"),
        ("--dtype int8", "dtype must be one of auto, float32, bfloat16, float64, got 'int8'"),
        ("--sed 3", "unrecognized arguments: --sed 3"),
        ("--seed -1", "seed must be at least 0, got -1"),
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


def test_a_refusal_ends_the_process_with_status_2_and_no_traceback(text: Path, tmp_path: Path):
    refused(run("--data", text, "--n-heads", 3, cwd=tmp_path), "d_model must be divisible by")
    assert list(tmp_path.iterdir()) == [text]


def test_tiny_shakespeare_is_refused_without_network(tmp_path: Path, here, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody listens
    command = ["--data", "tinyshakespeare", *TINY, "--steps", 1]
    refused(here(*command), "could not be fetched: .*--data PATH")
    assert list(tmp_path.rglob("*")) == [tmp_path / "data"]


def test_tiny_shakespeare_is_fetched_once_checked_and_kept(tmp_path: Path, monkeypatch):
    """The network is a file, and the checksum that of its text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "source").write_bytes(TEXT)
    monkeypatch.setattr(trainer, "URL", (tmp_path / "source").as_uri())
    with pytest.raises(trainer.Stop, match="could not be fetched: invalid hash value"):
        trainer.find_text("tinyshakespeare")
    assert list((tmp_path / "data").iterdir()) == []
    monkeypatch.setattr(trainer, "SHAKESPEARE_SHA256", hashlib.sha256(TEXT).hexdigest())
    for _ in range(2):
        assert trainer.find_text("tinyshakespeare").read(0, len(TEXT)) == TEXT
        (tmp_path / "source").unlink(missing_ok=True)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["tinyshakespeare.txt"]


@pytest.mark.parametrize(("length", "rows", "unroll"), [(100, 4, 1), (111, 3, 2), (60, 3, 3)])
def test_an_epoch_reads_every_byte_of_the_text_once(here, monkeypatch, length, rows, unroll):
    """A step reads up to `unroll` segments, fewer where the rows end; then they begin anew."""
    Path("text").write_bytes(bytes(range(length)))
    reads: list[list[bytes]] = []
    empty: list[bool] = []

    def to_tokens(parts, device, original=trainer.to_tokens):
        reads.append(parts)
        return original(parts, device)

    def forward(self, tokens, memory, original=trainer.Step.forward):
        empty.append(memory is None)
        return original(self, tokens, memory)

    monkeypatch.setattr(trainer, "to_tokens", to_tokens)
    monkeypatch.setattr(trainer.Step, "forward", forward)
    share = (length - length // 10 - 1) // rows
    steps = -(-share // (8 * unroll))
    options = ["--steps", 2 * steps, "--unroll", unroll, "--batch-size", rows]
    assert here("--data", "text", *TINY, *options, "--quiet").returncode == 0
    reads = reads[: 2 * steps]  # the rest is evaluation
    assert empty == [i % steps == 0 for i in range(2 * steps)]
    pairs = [pair for parts in reads for part in parts for pair in pairwise(part)]
    assert sorted(pairs) == sorted([(i, i + 1) for i in range(rows * share)] * 2)
    for row in range(rows):  # each row goes on where it was, and begins anew with its stretch
        targets = [byte for parts in reads for byte in parts[row][1:]]
        assert targets == 2 * list(range(row * share + 1, row * share + share + 1))


def test_help_tells_every_option(tmp_path: Path):
    result = run("--help", cwd=tmp_path)
    assert result.returncode == 0
    for name in api.Config.__dataclass_fields__.keys() - {"vocab_size"}:
        assert f"--{name.replace('_', '-')} " in result.stdout
    assert result.stdout.count("(default: ") >= 18
