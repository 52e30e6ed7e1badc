# SPDX-License-Identifier: MIT
"""Train a byte-level Compressive Transformer on text:

    python train.py                             on the sources of Python's standard library
    python train.py --data PATH                 on any file, or all files of a folder
    python train.py --resume RUN                go on where the run in the folder RUN stopped
    torchrun --nproc-per-node 8 train.py ...    on eight devices

Every row of the batch reads a stretch of the text of its own, segment after segment, with a memory
of its own. The last tenth of the text, 64 KiB at the most, is held out.
"""

import argparse
import codecs
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
import sysconfig
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, fields
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch does without it
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or DistributedDataParallel warns in vain

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from compressive import CompressiveTransformer, Config, Memory  # noqa: E402

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
BITS = 1 / math.log(2)  # a nat in bits; the text is bytes, so that bits per byte are per character
LAUNCHED = dist.is_torchelastic_launched()  # by torchrun, which sets these
RANK = int(os.environ["RANK"]) if LAUNCHED else 0
LOCAL_RANK = int(os.environ["LOCAL_RANK"]) if LAUNCHED else 0
WORLD_SIZE = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1


class Stop(BaseException):
    """Ends the program with one line and a status: 2 where what the user gave does not work. No
    Exception, so that nothing takes it for an error of its own."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


def show(text: str) -> None:
    if RANK == 0:
        print(text, end="", flush=True)


# ------------------------------------------------------------------------------------ command line

# Of parameters, for each --dtype: under bfloat16, matrix products alone are in it.
DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}
ACTIONS = ["out", "resume", "eval_only", "sample", "prompt"]  # all other options are settings
WITH_RESUME = ACTIONS[1:] + ["data", "device", "compile", "save_every"]
WITH_RESUME += ["sample_bytes", "eval_mem_len", "eval_c_mem_len"]


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise Stop(message)


def make_parser() -> Parser:
    parser = Parser(
        "train.py",
        description="Train a byte-level Compressive Transformer on text.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", default="", help="the run's folder; by default runs/ and the time")
    add("--resume", default="", help="go on with the run in this folder, with its settings")
    add("--eval-only", action="store_true", help="only evaluate the run")
    add("--sample", action="store_true", help="only generate from the run")
    add("--prompt", default="", help="text for --sample to continue; by default held-out text")
    add("--sample-bytes", type=int, default=500, help="length of a sample")
    add("--data", default="stdlib", help="stdlib, tinyshakespeare (fetched once), file or folder")
    add("--device", default="auto", help="auto (an accelerator or the CPU) or a torch device")
    add(
        "--dtype",
        choices=["auto", *DTYPES],
        default="auto",
        help="of matrix products, or float64 of all",
    )
    add("--compile", action="store_true", help="let torch.compile make it faster")
    add("--seed", type=int, default=0, help="of the weights and dropout")
    add("--steps", type=int, default=1200, help="optimiser steps, of a segment each")
    add("--batch-size", type=int, default=32, help="rows, each a stream of its own")
    add("--segment", type=int, default=64, help="tokens of a row in a segment")
    add("--lr", type=float, default=3e-3, help="peak learning rate of AdamW")
    add("--save-every", type=int, default=500, help="steps from checkpoint to checkpoint")
    add("--eval-mem-len", type=int, help="mem_len in evaluation; by default as trained")
    add("--eval-c-mem-len", type=int, help="c_mem_len in evaluation; by default as trained")
    for field in fields(Config):
        option = "--" + field.name.replace("_", "-")
        help = field.metadata["help"]
        if field.name in ("vocab_size", "bptt"):  # a byte has 256 values; steps end at the segment
            continue
        if field.type is bool:
            add(option, action=argparse.BooleanOptionalAction, default=field.default, help=help)
        else:
            add(option, type=field.type, default=field.default, help=help)
    return parser


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict | None]:
    """The settings, and the checkpoint of the run to go on with, from which they then come."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if not args.resume:
        if args.eval_only or args.sample:
            raise Stop("--eval-only and --sample need a run: add --resume RUN")
        args.out = Path(args.out or time.strftime("runs/%Y-%m-%d_%H-%M-%S"))
        return args, None
    # argparse puts no default where a value stands: what is not None afterwards was given.
    nothing = argparse.Namespace(**dict.fromkeys(vars(args)))
    given = vars(parser.parse_args(argv, nothing))
    state = load(Path(args.resume, "checkpoint.pt"))
    vars(args).update(state["settings"])
    for name, value in given.items():
        if value is not None and name not in WITH_RESUME:
            option = name.replace("_", "-")
            raise Stop(f"--{option} cannot be given with --resume: the run has its settings")
        if value is not None:
            setattr(args, name, value)
    args.out = Path(args.resume)
    return args, state


def check(args: argparse.Namespace) -> None:
    """Refuse settings that cannot work."""
    for name in ("steps", "batch_size", "segment", "save_every", "lr"):
        if not 0 < getattr(args, name) < math.inf:
            raise Stop(f"{name} must be above 0, got {getattr(args, name)}")
    for name in ("seed", "sample_bytes"):
        if not 0 <= getattr(args, name) < 2**32:
            raise Stop(f"{name} must be at least 0, got {getattr(args, name)}")
    if args.batch_size % WORLD_SIZE:
        raise Stop(f"batch_size must be divisible by {WORLD_SIZE} processes, got {args.batch_size}")


def make_configs(args: argparse.Namespace) -> tuple[Config, Config]:
    """The model's settings in training and in evaluation."""
    settings = {x.name: getattr(args, x.name) for x in fields(Config) if x.name in vars(args)}
    eval_settings = settings.copy()
    if args.eval_mem_len is not None:
        eval_settings["mem_len"] = args.eval_mem_len
    if args.eval_c_mem_len is not None:
        eval_settings["c_mem_len"] = args.eval_c_mem_len
    try:
        return Config(**settings), Config(**eval_settings)
    except ValueError as error:
        raise Stop(str(error)) from None


def find_device(name: str) -> torch.device:
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        name = accelerator.type if accelerator else "cpu"
    if name == "cuda":
        name = f"cuda:{LOCAL_RANK}"
    try:
        torch.zeros(1, device=name).item()  # the meta device has no numbers
    except (RuntimeError, AssertionError) as error:  # torch raises either
        reason = str(error).splitlines()[0]
        raise Stop(f"--device {name} cannot be used: {reason}; try --device cpu") from None
    return torch.device(name)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 itself."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    can = torch.cpu.get_capabilities()
    return device.type == "cpu" and bool(can.get("avx512_bf16") or can.get("amx_bf16"))


# ------------------------------------------------------------------------------- text, files


class Text:
    """Bytes that are read where they stand, from a file, which may be larger than memory."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.file = file
        self.name = name
        self.length = file.seek(0, os.SEEK_END)
        if self.length == 0:
            raise Stop(f"--data {name} is not there or has no text: name a file or folder that has")
        self.split = self.length - min(self.length // 10, 2**16)  # where held-out text begins

    def read(self, start: int, end: int) -> bytes:
        self.file.seek(start)
        part = self.file.read(end - start)
        if len(part) < end - start:
            raise Stop(f"{self.name} was cut short: it had {self.length} bytes")
        return part

    def fingerprint(self) -> str:
        """Tells another text apart, cheaply: by its length and its held-out part."""
        held_out = self.read(self.split, self.length)
        return f"{self.length} {hashlib.sha256(held_out).hexdigest()}"


def find_text(data: str) -> Text:
    """The text that `--data` names: a file is read where it stands, a folder is joined."""
    path = Path(data)
    if data == "tinyshakespeare":
        path = fetch_tiny_shakespeare()
    if path.is_file():
        return Text(open(path, "rb", buffering=0), data)
    if data == "stdlib":
        paths = Path(sysconfig.get_path("stdlib")).glob("[!_]*.py")
    else:
        paths = path.rglob("*")
    parts = [path.read_bytes() for path in sorted(paths) if path.is_file()]
    return Text(BytesIO(b"".join(parts)), data)


def fetch_tiny_shakespeare() -> Path:
    path = Path("data/tinyshakespeare.txt")
    path.parent.mkdir(exist_ok=True)
    try:
        if not path.exists():
            torch.hub.download_url_to_file(URL, str(path), SHAKESPEARE_SHA256, progress=False)
    except (OSError, RuntimeError) as error:  # the latter if it is another text
        mend = f"put it at {path} yourself, or train on --data PATH"
        raise Stop(f"{URL} could not be fetched: {error}; {mend}") from None
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHAKESPEARE_SHA256:
        raise Stop(f"{path} is not the whole of Tiny Shakespeare: delete it to fetch it again")
    return path


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file beside its place and move it there: whenever the process or the machine stops,
    the old file or the new one stands there whole."""
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise Stop(f"{path} could not be written: {error.strerror}; nothing was replaced") from None
    finally:
        part.unlink(missing_ok=True)


def load(path: Path) -> dict:
    """A checkpoint. It is data: no code of whatever the file holds is run."""
    with open(path, "rb") as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            complete = state.keys() >= {"model", "optimizer", "memory", "settings", "text"}
        except Exception:  # torch raises many kinds
            complete = False
    if not complete:
        why = "it is truncated, something else, or more than data (no code of it was run)"
        raise Stop(f"{path} is no checkpoint of train.py: {why}")
    return state


# --------------------------------------------------------------------------------------- training


class Signals:
    """SIGINT and SIGTERM end the program, but during training the first waits for the step."""

    training = False
    received = 0

    def __call__(self, number: int, frame: object) -> None:
        if not self.training:
            raise Stop("interrupted", 128 + number)
        self.received = number
        if not LAUNCHED:  # torchrun passes on a Ctrl-C that the terminal has sent us already
            signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once


def largest(number: int) -> int:
    """The largest of the processes' numbers: what one must do, all do. No device is waited for."""
    numbers = torch.tensor(number)
    if LAUNCHED:
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return int(numbers)


def learning_rate(args: argparse.Namespace, step: int) -> float:
    """Up in a line, then down by a cosine to zero."""
    warmup = min(100, args.steps // 10)
    if step < warmup:
        return args.lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / (args.steps - warmup)
    return args.lr * (0.5 + 0.5 * math.cos(math.pi * progress))


def make_optimizer(model: CompressiveTransformer, lr: float) -> torch.optim.Optimizer:
    language_model, compression = model.parameter_groups()
    decayed = [p for p in language_model if p.dim() >= 2]
    others = [p for p in language_model if p.dim() < 2]
    groups = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": others + compression, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def autocast(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")


def to_tokens(rows: list[bytes], device: torch.device) -> Tensor:
    """Rows of bytes as tokens `[B, T]`."""
    tokens = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8)
    tokens = tokens.view(len(rows), -1)
    if device.type == "cuda":
        tokens = tokens.pin_memory()  # only then does the host not wait for the copy
    return tokens.to(device, non_blocking=True).long()


class Training:
    """What a checkpoint holds, and the step that changes it."""

    def __init__(self, args: argparse.Namespace, text: Text) -> None:
        self.args = args
        self.text = text
        torch.manual_seed(args.seed)
        self.model = CompressiveTransformer(args.config).to(args.device, DTYPES[args.dtype])
        self.optimizer = make_optimizer(self.model, args.lr)
        self.forward = self.model
        if args.compile:
            torch._dynamo.config.recompile_limit = 32  # a few are needed until memory is full
            self.model.compile()
        if LAUNCHED:  # without find_unused_parameters, rounding changes after the first step
            parallel = nn.parallel.DistributedDataParallel
            self.forward = parallel(self.model, find_unused_parameters=True)
        rows = args.batch_size // WORLD_SIZE
        self.length = (text.split - 1) // args.batch_size  # of a row; the next byte is shared
        self.starts = [row * self.length for row in range(RANK * rows, (RANK + 1) * rows)]
        self.memory: Memory | None = None
        self.step = 0
        self.at = 0  # bytes read of each row, over all passes of the text
        self.saved = 0  # the step of the last checkpoint
        self.recorded = 0  # the step of the last record
        self.losses = torch.zeros(3 + args.n_layers, device=args.device)  # summed since then
        self.seconds = 0.0  # of training, until the last record
        self.began = time.perf_counter()

    def advance(self) -> None:
        """An optimiser step, in which the host waits for no device."""
        args = self.args
        # All that is drawn depends on this: a resumed run draws what one left alone would.
        torch.manual_seed((args.seed * args.steps + self.step) * WORLD_SIZE + RANK)
        begin = self.at % self.length
        end = min(begin + args.segment, self.length)
        rows = [self.text.read(start + begin, start + end + 1) for start in self.starts]
        tokens = to_tokens(rows, args.device)
        if begin == 0:  # the rows begin, or begin anew
            self.memory = None
        with autocast(args):
            output = self.forward(tokens[:, :-1], self.memory)
        self.memory = output.memory
        logits = output.logits.to(DTYPES[args.dtype])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        (loss + output.compression_loss).backward()
        norms = []
        for group in self.model.parameter_groups():  # jointly, either would scale the other down
            norm = nn.utils.clip_grad_norm_(group, 1.0)
            norms.append(norm.to(args.device, non_blocking=True))  # without gradients on the CPU
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(args, self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        losses = torch.stack([loss, *output.compression_losses]).detach() / WORLD_SIZE
        if LAUNCHED:
            dist.all_reduce(losses)
        self.losses += torch.cat([losses, torch.stack(norms)])
        self.step += 1
        self.at += end - begin

    def check(self) -> None:
        if not self.losses.isfinite().all():
            where = f"between steps {self.recorded} and {self.step}"
            good = f"the last good checkpoint is of step {self.saved}"
            raise Stop(f"the loss or its gradient is not finite {where}; {good}", 1)

    def record(self) -> dict:
        """Add to metrics.jsonl what the steps since the last record gave, on average."""
        self.check()
        losses = self.losses.double() / (self.step - self.recorded)
        nats, *layers, norm, _ = losses.tolist()
        self.losses.zero_()
        self.recorded = self.step
        self.seconds = time.perf_counter() - self.began
        record = {
            "step": self.step,
            "bpc": nats * BITS,
            "compression_loss": sum(layers) / len(layers),
            "compression_loss_of_layers": layers,
            "gradient_norm": norm,
            "lr": learning_rate(self.args, self.step - 1),
            "seconds": self.seconds,
            "tokens_per_second": self.at * self.args.batch_size / self.seconds,
        }
        if RANK == 0:
            line = json.dumps(record).encode() + b"\n"
            path = self.args.out / "metrics.jsonl"
            with open(path, "ab", buffering=0) as file:
                if file.write(line) < len(line):
                    raise Stop(f"{path} could not be written: the disk is full")
        return record

    def save(self) -> None:
        self.check()
        memory = None
        if self.memory is not None:
            memory = [gather_rows(torch.stack(layers)) for layers in self.memory]
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "memory": memory,
            "step": self.step,
            "at": self.at,
            "losses": self.losses,
            "recorded": self.recorded,
            "seconds": self.seconds,
            "text": self.text.fingerprint(),
            "config": asdict(self.model.config),
            "settings": self.args.settings,
        }
        if RANK == 0:
            file = BytesIO()
            torch.save(state, file)
            write_atomically(self.args.out / "checkpoint.pt", file.getbuffer())
        self.saved = self.step

    def restore(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if state["memory"] is not None:
            mem, c_mem = state["memory"]  # of all processes' rows, [L, B, N, D] each
            mem = mem.chunk(WORLD_SIZE, dim=1)[RANK].to(self.args.device)
            c_mem = c_mem.chunk(WORLD_SIZE, dim=1)[RANK].to(self.args.device)
            self.memory = Memory(tuple(mem), tuple(c_mem))
        self.losses.copy_(state["losses"])
        for name in ("step", "at", "recorded", "seconds"):
            setattr(self, name, state[name])
        self.saved = self.step
        self.began -= self.seconds


def gather_rows(slots: Tensor) -> Tensor:
    """The slots `[L, B, N, D]` of all processes' rows."""
    if not LAUNCHED:
        return slots
    parts = [torch.empty_like(slots) for _ in range(WORLD_SIZE)]
    dist.all_gather(parts, slots.contiguous())
    return torch.cat(parts, dim=1)


def cut_metrics(path: Path, step: int) -> None:
    """Drop the records of steps after the checkpoint, and one that was never finished."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"}\n") and json.loads(line)["step"] <= step:
            kept.append(line)
    write_atomically(path, b"".join(kept))


def train(training: Training, signals: Signals) -> None:
    """Train to the last step, or until a signal comes."""
    args = training.args
    live = sys.stdout.isatty()
    every = max(1, min(args.steps // 40, 50))
    signals.training = True
    while training.step < args.steps:
        training.advance()
        step = training.step
        if step % every == 0 or step == args.steps:
            show_progress(training.record(), args.steps, live)
        received = largest(signals.received)
        if received or step % args.save_every == 0 or step == args.steps:
            training.save()
        if received:
            if live:
                show("\n")
            command = f"torchrun --nproc-per-node {WORLD_SIZE}" if LAUNCHED else "python"
            again = shlex.join([sys.argv[0], "--resume", str(args.out)])
            raise Stop(f"stopped after step {step}; to go on: {command} {again}", 128 + received)
    signals.training = False
    if live:
        show("\n")
    if LAUNCHED:
        largest(0)  # or a process that ends breaks off what another still reads
        dist.destroy_process_group()


def show_progress(record: dict, steps: int, live: bool) -> None:
    left = record["seconds"] / record["step"] * (steps - record["step"])
    line = (
        f"step {record['step']:>{len(str(steps))}}/{steps}  bpc {record['bpc']:.3f}  "
        f"compression loss {record['compression_loss']:.4f}  "
        f"{record['tokens_per_second']:,.0f} tokens/s  {left:.0f} s left"
    )
    if live:  # over the line before, and no longer than the terminal is wide
        width = shutil.get_terminal_size().columns - 1
        show(f"\r{line[:width]}\x1b[K")
    else:
        show(f"{line}\n")


# ---------------------------------------------------------------- evaluation, samples, pictures


@torch.no_grad()
def evaluate(model: CompressiveTransformer, text: Text, segment: int) -> float:
    """Bits per character of the held-out text, one stream of which every byte is scored once
    while memory streams over it."""
    device = model.logits.weight.device
    memory = None
    nats = torch.zeros((), device=device)
    for start in range(text.split, text.length, segment):
        end = min(start + segment, text.length)
        tokens = to_tokens([text.read(start - 1, end)], device)
        output = model(tokens[:, :-1], memory, need_loss=False)
        memory = output.memory
        nats += F.cross_entropy(output.logits[0].float(), tokens[0, 1:], reduction="sum")
    return nats.item() * BITS / (text.length - text.split)


def printable(text: str) -> str:
    """Text that no terminal takes for a command."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def sample(model: CompressiveTransformer, text: Text, args: argparse.Namespace) -> str:
    """Show a prompt and, as it comes, its continuation; returns what was shown."""
    held_out = text.read(text.split, min(text.split + args.segment, text.length))
    prompt = os.fsencode(args.prompt) or held_out
    shown = [f"--- prompt\n{printable(prompt.decode(errors='replace'))}\n--- continuation\n"]
    show(shown[0])
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def show_token(token: Tensor) -> None:
        shown.append(printable(utf8.decode(bytes(token[0].tolist()))))
        show(shown[-1])

    if args.sample:
        torch.seed()  # another text each time
    tokens = to_tokens([prompt], args.device)
    model.generate(tokens, args.sample_bytes, temperature=0.8, stream=show_token)
    shown.append(utf8.decode(b"", final=True) + "\n---\n")
    show(shown[-1])
    return "".join(shown)


def draw(out: Path, title: str) -> str:
    """Draw run.png from metrics.jsonl; returns a line about it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no run.png: matplotlib is not installed\n"
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records]
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    loss, compression = figure.subplots(1, 2)
    loss.plot(steps, [record["bpc"] for record in records])
    loss.set(title="training loss", xlabel="step", ylabel="bits per character")
    compression.plot(steps, [record["compression_loss_of_layers"] for record in records])
    compression.set(title="compression loss of each layer", xlabel="step", ylabel="mean square")
    compression.legend(range(1, len(compression.lines) + 1), title="layer")
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomically(out / "run.png", picture.getbuffer())
    return f"picture in {out / 'run.png'}\n"


# ------------------------------------------------------------------------------------------- main


def load_parameters(model: CompressiveTransformer, state: dict, out: Path) -> None:
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise Stop(f"{out / 'checkpoint.pt'} does not fit this model: {reason}") from None


def start(args: argparse.Namespace, text: Text, state: dict | None) -> Training:
    """Begin a run, with a checkpoint so that it can always go on, or go on with one."""
    needed = 20 * args.batch_size  # then every row has a byte to predict
    if text.length < needed:
        few = f"--data {args.data} has {text.length} bytes"
        raise Stop(f"{few}, {args.batch_size} rows need {needed}: name a longer text")
    if not state and RANK == 0 and any(args.out.glob("[!.]*")):
        raise Stop(f"--out {args.out} is not empty: name a new folder, so that no run is lost")
    if LAUNCHED:
        dist.init_process_group("cpu:gloo,cuda:nccl" if args.device.type == "cuda" else "gloo")
    training = Training(args, text)
    if state:
        load_parameters(training.model, state, args.out)
        training.restore(state)
    if RANK == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        cut_metrics(args.out / "metrics.jsonl", training.step)
    training.save()
    return training


def run(args: argparse.Namespace, state: dict | None, signals: Signals) -> None:
    """Do what the options say."""
    began = time.perf_counter()
    check(args)
    device = find_device(args.device)
    if args.dtype == "auto":
        args.dtype = "bfloat16" if has_bfloat16(device) else "float32"
    args.settings = {name: value for name, value in vars(args).items() if name not in ACTIONS}
    args.device = device
    args.config, args.eval_config = make_configs(args)
    text = find_text(args.data)
    if state and state["text"] != text.fingerprint():
        raise Stop(
            f"--data {args.data} is another text than the one that {args.out} was trained on"
        )
    only = args.eval_only or args.sample
    if not only:
        training = start(args, text, state)
        parameters = sum(p.numel() for p in training.model.parameters())
        show(f"{text.length:,} bytes of {args.data}; {parameters:,} parameters; ")
        show(f"{device.type}, {args.dtype}; results in {args.out}\n")
        train(training, signals)
        state = {"model": training.model.state_dict()}
    if RANK > 0:
        return

    model = CompressiveTransformer(args.eval_config).to(device, DTYPES[args.dtype]).eval()
    load_parameters(model, state, args.out)
    with autocast(args):
        if args.sample or not only:
            written = sample(model, text, args)
        if args.eval_only or not only:
            bpc = evaluate(model, text, args.segment)
    if not only:
        write_atomically(args.out / "sample.txt", written.encode())
        show(draw(args.out, f"{args.data}: {bpc:.3f} bits per held-out character"))
        speed = training.at * args.batch_size / training.seconds
        seconds = time.perf_counter() - began
        show(f"val_bpc={bpc:.4f} tokens_per_second={speed:.0f} seconds={seconds:.1f}\n")
    elif args.eval_only:
        show(f"val_bpc={bpc:.4f}\n")


def main(argv: Sequence[str] | None = None) -> None:
    signals = Signals()
    signal.signal(signal.SIGINT, signals)
    signal.signal(signal.SIGTERM, signals)
    sys.stdout.reconfigure(errors="replace")  # for a terminal that cannot show all of UTF-8
    try:
        args, state = parse(argv)
        run(args, state, signals)
        return
    except Stop as stop:
        status = stop.status
        message = str(stop)
    except OSError as error:
        status = 2
        message = f"{error.filename or 'writing'}: {error.strerror or error}"
    if LOCAL_RANK > 0:  # the first process says the same, and torchrun then ends this one
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
    print(f"train.py: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
