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
import mmap
import os
import shlex
import signal
import sys
import sysconfig
import time
import urllib.request
import warnings
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, fields, replace
from functools import lru_cache, partial
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import fmean
from typing import IO, NoReturn

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch's, which needs it not

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from compressive import CompressiveTransformer, Config, Memory  # noqa: E402

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
HELD_OUT = 2**16  # bytes held out of a text at the most
BITS = 1 / math.log(2)  # a nat in bits; the text is bytes, so that bits per byte are per character
LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ  # by torchrun, as process RANK of WORLD_SIZE
ENV = os.environ if LAUNCHED else {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
RANK, LOCAL_RANK, WORLD_SIZE = (int(ENV[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


class Stop(BaseException):
    """Ends the program with one line and a status: 2 where what the user gave does not work. Not an
    Exception, so that nothing takes one that a signal raised for an error of its own."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


# ------------------------------------------------------------------------------------------- text


class Text:
    """Files as one text, read through memory maps: they may be far larger than memory."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = [path for path in paths if path.stat().st_size]  # an empty file has no map
        self.ends = list(accumulate(path.stat().st_size for path in self.paths))
        self.length = self.ends[-1] if self.ends else 0
        self.map = lru_cache(maxsize=128)(self.map)  # a process may keep only so many files open

    @staticmethod
    def map(path: Path) -> mmap.mmap:
        with open(path, "rb") as file:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):  # rows are far apart: reading ahead is a start of seconds
            view.madvise(mmap.MADV_RANDOM)
        return view

    def read(self, start: int, end: int) -> bytes:
        parts, i = [], bisect_right(self.ends, start)
        while start < min(end, self.length):
            offset = self.ends[i - 1] if i else 0
            parts.append(self.map(self.paths[i])[start - offset : end - offset])
            start, i = self.ends[i], i + 1
        return b"".join(parts)

    def fingerprint(self) -> str:
        """Tells another text apart, cheaply: by the files' sizes and some of their bytes."""
        places = range(0, self.length, max(256, self.length // 256))
        some = b"".join(self.read(at, at + 256) for at in places)
        return hashlib.sha256(repr(self.ends).encode() + some).hexdigest()


def find_text(data: str) -> Text:
    """The text that `--data` names."""
    if data == "stdlib":
        folder = Path(sysconfig.get_path("stdlib"))
        paths = [path for path in sorted(folder.glob("*.py")) if not path.name.startswith("_")]
    elif data == "tinyshakespeare":
        paths = [fetch_shakespeare()]
    elif Path(data).exists():
        paths = sorted(Path(data).rglob("*")) if Path(data).is_dir() else [Path(data)]
    else:
        raise Stop(f"--data {data}: no such file or folder, nor 'stdlib' or 'tinyshakespeare'")
    text = Text([path for path in paths if path.is_file()])
    if not text.length:
        raise Stop(f"--data {data} has no text: name a file or folder that has some")
    return text


def fetch_shakespeare() -> Path:
    """Tiny Shakespeare's path, after fetching it if it is not there yet."""
    path = Path("data/tinyshakespeare.txt")
    mend = f"put the file there yourself, or train on --data PATH ({URL})"
    try:
        there = path.exists()
        found = path.read_bytes() if there else urllib.request.urlopen(URL, timeout=30).read()
    except OSError as error:
        raise Stop(f"{path} could not be fetched: {error}; {mend}") from None
    if hashlib.sha256(found).hexdigest() != SHAKESPEARE_SHA256:
        raise Stop(f"{path} is not Tiny Shakespeare (its sha256 differs): delete it and {mend}")
    if not there:
        path.parent.mkdir(exist_ok=True)
        write_whole(path, lambda file: file.write(found))
    return path


def to_tokens(rows: Sequence[bytes], device: torch.device) -> Tensor:
    """Rows of bytes as tokens `[B, T]`, without making the host wait for the device."""
    tokens = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(len(rows), -1)
    if device.type == "cuda":
        tokens = tokens.pin_memory().to(device, non_blocking=True)
    return tokens.to(device).long()


# -------------------------------------------------------------- devices, processes, signals, files


def find_device(name: str) -> torch.device:
    """The device that `--device` names; 'auto' takes CUDA or another accelerator, or the CPU."""
    if name == "auto":
        name = getattr(torch.accelerator.current_accelerator(check_available=True), "type", "cpu")
    try:
        device = torch.device(name, LOCAL_RANK) if LAUNCHED and name == "cuda" else name
        device = torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises all three
        reason = str(error).splitlines()[0]
        raise Stop(f"--device {name} cannot be used: {reason}; try --device cpu") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that `--dtype` names; 'auto' takes bfloat16 where the hardware has it."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        can = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        fast = can.get("avx512_bf16", False) or can.get("amx_bf16", False)
    return torch.bfloat16 if fast else torch.float32


def agreed(number: int) -> int:
    """The largest of the processes' numbers: what one must do, all do. No device is waited for."""
    numbers = torch.tensor(number)
    if LAUNCHED:
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return int(numbers)


class Signals:
    """SIGINT and SIGTERM end the program, but during training the first waits for the step."""

    training, number, again = False, 0, ""  # again: the command to go on with

    def __call__(self, number: int, frame: object) -> None:
        if not self.training:
            raise Stop("interrupted", 128 + number)
        self.number = number
        if not LAUNCHED:  # torchrun passes on a Ctrl-C that the terminal has sent us already
            signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file beside its place and move it there: whenever the process or the machine stops,
    the old file or the new one stands there whole."""
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save can raise the second about the first
        faults = [x.strerror for x in (error, error.__context__) if isinstance(x, OSError)]
        if not faults:
            raise
        raise Stop(f"{path} could not be written: {faults[0]}; nothing was replaced") from None
    finally:
        part.unlink(missing_ok=True)


def lock(folder: Path) -> IO[str]:
    """Keep others from the folder while the file is open, which a killed process's is not."""
    file = open(folder / ".lock", "w")
    with suppress(ImportError):  # on Windows
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Stop(f"{folder} is in use by another process") from None
    return file


def load(path: Path) -> dict:
    """A checkpoint. It is data: no code of whatever the file holds is run."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = ", ".join(sorted(CHECKPOINT - state.keys()))
    except FileNotFoundError:
        raise
    except Exception:  # torch raises many kinds
        missing = "it is truncated, something else, or more than data (nothing of it was run)"
    if missing:
        raise Stop(f"{path} is no checkpoint of train.py, or lacks something: {missing}")
    return state


# ---------------------------------------------------------------------------- metrics and pictures


class Log:
    """The losses, in metrics.jsonl and for the reader."""

    def __init__(self, folder: Path, steps: int, show: Callable[[str], object]) -> None:
        self.path, self.steps, self.show = folder / "metrics.jsonl", steps, show
        self.every = max(1, min(steps // 40, 50))  # nothing of the terminal: metrics depend on it
        self.pending: list[Tensor] = []  # losses of the last steps, on the device still
        self.losses: list[list[float]] = []  # of the others since the last record
        self.tokens, self.began, self.recorded = 0, time.perf_counter(), (0, 0.0)
        self.saved = 0  # the step of the last checkpoint

    def state_dict(self) -> dict:
        seconds = time.perf_counter() - self.began
        return {"losses": self.losses, "tokens": self.tokens, "seconds": seconds}

    def load_state_dict(self, state: dict) -> None:
        self.losses, self.tokens = state["losses"], state["tokens"]
        self.began, self.recorded = self.began - state["seconds"], (self.tokens, state["seconds"])

    def cut(self, step: int) -> None:
        """Forget what was recorded after a step, a line that was never finished among it."""
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        kept = [x for x in lines if x.endswith(b"}\n") and json.loads(x)["step"] <= step]
        write_whole(self.path, lambda file: file.writelines(kept))

    def look(self, step: int) -> None:
        """Fetch the losses up to this step from the device, averaged over the processes."""
        if not self.pending:
            return
        losses = torch.stack(self.pending).cpu().double() / WORLD_SIZE
        if LAUNCHED:
            dist.all_reduce(losses)
        bad = (~losses.isfinite()).any(dim=1).nonzero()
        if len(bad):
            self.diverged(f"the loss of step {step + 1 - len(losses) + int(bad[0])}")
        self.losses += losses.tolist()
        self.pending = []

    def diverged(self, what: str) -> NoReturn:
        good = f"{self.path.with_name('checkpoint.pt')}, after step {self.saved}"
        raise Stop(f"{what} is not finite; the last good checkpoint is {good}", 1)

    def step(self, step: int, losses: Tensor, tokens: int, lr: float) -> None:
        """After a step: its losses, of the language model in nats and of each layer's compression,
        and the number of tokens it read."""
        self.pending.append(losses)
        self.tokens += tokens
        if step % self.every and step != self.steps:
            return
        self.look(step)
        nats, *layers = (fmean(column) for column in zip(*self.losses, strict=True))
        seconds, (old_tokens, old_seconds) = time.perf_counter() - self.began, self.recorded
        self.losses, self.recorded = [], (self.tokens, seconds)
        record = {"step": step, "bpc": nats * BITS, "compression_loss": fmean(layers)}
        record |= {"compression_loss_of_layers": layers, "lr": lr, "seconds": seconds}
        record["tokens_per_second"] = (self.tokens - old_tokens) / (seconds - old_seconds)
        if RANK:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
        left, width = seconds / step * (self.steps - step), len(str(self.steps))
        line = (
            f"step {step:>{width}}/{self.steps}  bpc {record['bpc']:.3f}  "
            f"compression loss {record['compression_loss']:.4f}  "
            f"{record['tokens_per_second']:,.0f} tokens/s  {left:.0f} s left"
        )
        end = "\n"
        if sys.stdout.isatty():
            line, end = f"\r{line}\x1b[K", "\n" * (step == self.steps)
        self.show(line + end)


def draw(folder: Path, ages: Sequence[Sequence[float]], title: str) -> str:
    """Draw run.png from metrics.jsonl and the attention by age; returns a line about it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no run.png: matplotlib is not installed"
    records = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [x["step"] for x in records]
    figure = Figure(figsize=(13, 4), layout="constrained")
    figure.suptitle(title)
    loss, compression, attention = figure.subplots(1, 3)
    loss.plot(steps, [x["bpc"] for x in records])
    loss.set(title="training loss", xlabel="step", ylabel="bits per character")
    layers = zip(*(x["compression_loss_of_layers"] for x in records), strict=True)
    for i, losses in enumerate(layers, 1):
        compression.plot(steps, losses, label=f"layer {i}")
    compression.set(title="compression loss", xlabel="step", ylabel="mean square")
    for i, name in enumerate(("compressed memory", "memory", "segment")):
        attention.bar(range(6 * i, 6 * i + 6), ages[i], label=name)
    attention.set(title="attention by age", xlabel="oldest to newest", ylabel="weight of a slot")
    attention.set_xticks([])
    for axes in (compression, attention):
        axes.legend()
    write_whole(folder / "run.png", partial(figure.savefig, format="png", dpi=120))
    return f"picture in {folder / 'run.png'}"


@torch.no_grad()
def evaluate(model: nn.Module, text: Text, start: int, args: argparse.Namespace) -> tuple:
    """Bits per character of the text from `start` on, one stream of which every byte is scored once
    while memory streams over it; and the mean attention weight of a slot by age: six buckets each
    of compressed memory, memory and segment, over the second half of the segments."""
    weight, segment = model.logits.weight, args.eval_segment or args.segment
    weights, nats, ages = [], [], []
    for layer in model.layers:
        note = lambda layer, inputs, out: weights.append(out[1].mean(dim=(0, 1, 2)))  # noqa: E731
        layer.attention.register_forward_hook(note)
    documents = [end for end in text.ends if args.eval_reset and start < end < text.length]
    for begin, end in pairwise([start, *documents, text.length]):
        memory = model.initial_memory(1)
        for at in range(begin, end, segment):
            row = to_tokens([text.read(at - 1, min(at + segment, end))], weight.device)
            tokens, targets = row[:, :-1], row[:, 1:]
            lengths = memory.c_mem[0].size(1), memory.mem[0].size(1), tokens.size(1)
            weights.clear()
            logits, memory, _ = model(tokens, memory)
            nats.append(F.cross_entropy(logits.to(weight.dtype).mT, targets, reduction="sum"))
            parts = torch.stack(weights).float().mean(dim=0).split(lengths)
            ages.append(torch.stack([x.mean() for part in parts for x in part.tensor_split(6)]))
    bpc = torch.stack(nats).cpu().double().sum().item() * BITS / (text.length - start)
    return bpc, torch.stack(ages[len(ages) // 2 :]).nanmean(dim=0).view(3, 6).tolist()


def harmless(text: str) -> str:
    """Text that no terminal takes for a command."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def sample(model: nn.Module, prompt: bytes, args: argparse.Namespace, show: Callable) -> None:
    """Show the continuation of the prompt as it comes."""
    device, utf8 = model.logits.weight.device, codecs.getincrementaldecoder("utf-8")("replace")
    model.generate(
        to_tokens([prompt], device),
        args.sample_bytes,
        temperature=0.8,
        generator=torch.Generator(device).manual_seed(args.seed),
        stream=lambda token: show(harmless(utf8.decode(bytes(token[0].tolist())))),
    )
    show(utf8.decode(b"", final=True))


# --------------------------------------------------------------------------------------- training


class Step(nn.Module):
    """The forward pass of an optimiser step as one module, however many segments it reads, so that
    DistributedDataParallel sees the whole of it."""

    def __init__(self, model: CompressiveTransformer, autocast: torch.autocast) -> None:
        super().__init__()
        self.model, self.autocast = model, autocast
        self.of_layers = torch.zeros(len(model.layers)).to(model.logits.weight)
        for i, layer in enumerate(model.layers):
            layer.register_forward_hook(partial(self.note, i))

    def note(self, i: int, layer: nn.Module, inputs: object, outputs: tuple[Tensor, ...]) -> None:
        self.of_layers[i] += outputs[3].detach()  # in place: torch.compile need not guard a list

    def forward(
        self, segments: Sequence[tuple[Tensor, bool]], memory: Memory | None
    ) -> tuple[Tensor, Tensor, Memory]:
        """Tokens `[B, T + 1]` and whether they begin the streams -> the loss to minimise, losses to
        report (the language model's in nats, each layer's compression loss), and the memory."""
        total = nats = self.of_layers.zero_().sum()
        for tokens, anew in segments:
            with self.autocast:
                output = self.model(tokens[:, :-1], None if anew else memory)
            logits, memory = output.logits.to(self.of_layers.dtype), output.memory
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            total = total + (loss + output.compression_loss) / len(segments)
            nats = nats + loss.detach()
        return total, torch.cat([nats[None], self.of_layers]) / len(segments), memory.detach()


def make_optimizer(model: CompressiveTransformer, args: argparse.Namespace) -> tuple:
    """AdamW, which decays the language model's matrices alone, and its learning rate's schedule: up
    in a line, then down by a cosine to zero."""
    language_model, compression = model.parameter_groups()
    matrices = [p for p in language_model if p.dim() >= 2]
    rest = [p for p in language_model if p.dim() < 2] + compression
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    warmup = min(100, args.steps // 10)

    def share_of_peak(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (args.steps - warmup))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak)


def settle(args: argparse.Namespace, given: dict, saved: dict) -> None:
    """Take the run's settings where none is given, and refuse those that contradict it."""
    only = args.eval_only or args.sample
    free = MAY_DIFFER | {"dtype", "seed"} if only else MAY_DIFFER
    for name, value in saved["settings"].items():
        if name in given and given[name] != value and name not in free:
            option = f"--{name.replace('_', '-')} {given[name]}"
            raise Stop(f"{option}: the run in {args.resume} has {value}; leave it out")
        setattr(args, name, given.get(name, value))
    if saved["world_size"] != WORLD_SIZE and not only:
        mend = f"torchrun --nproc-per-node {saved['world_size']} train.py --resume {args.resume}"
        raise Stop(f"the run is of {saved['world_size']} processes, not {WORLD_SIZE}: {mend}")


def train(args: argparse.Namespace, given: dict, signals: Signals) -> str:
    """Do what the options say; returns the last line to print."""
    start, only = time.perf_counter(), args.eval_only or args.sample
    out = Path(args.resume or args.out or time.strftime("runs/%Y-%m-%d_%H-%M-%S"))
    path, saved = out / "checkpoint.pt", None
    if only and not args.resume:
        raise Stop("--eval-only and --sample need the folder of a run: add --resume RUN")
    if args.resume:
        saved = load(path)
        settle(args, given, saved)
    if args.bptt and args.unroll < 2:
        raise Stop("--bptt needs --unroll of at least 2: slots are first read a segment later")
    if args.batch_size % (WORLD_SIZE * args.accumulate):
        shares = f"{WORLD_SIZE} processes x {args.accumulate} parts (--accumulate)"
        raise Stop(f"--batch-size must be divisible by {shares}, got {args.batch_size}")
    try:
        config = Config(**{field.name: getattr(args, field.name) for field in MODEL_SETTINGS})
        lengths = {"mem_len": args.eval_mem_len, "c_mem_len": args.eval_c_mem_len}
        eval_config = replace(config, **{k: v for k, v in lengths.items() if v is not None})
    except ValueError as error:
        raise Stop(str(error)) from None
    device = find_device(args.device)
    args.dtype = str(find_dtype(args.dtype, device)).removeprefix("torch.")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    dtype = torch.float64 if args.dtype == "float64" else torch.float32  # of the parameters
    text = find_text(args.data)
    if text.length < 20 * args.batch_size:  # every row has a byte to predict, then
        needed = f"{args.batch_size} rows need {20 * args.batch_size}"
        mend = "name a longer text or a smaller --batch-size"
        raise Stop(f"--data {args.data} has {text.length} bytes, {needed}: {mend}")
    split, fingerprint = text.length - min(text.length // 10, HELD_OUT), text.fingerprint()
    if saved and saved["text"] != fingerprint:
        raise Stop(f"--data {args.data} is another text than the one that {out} was trained on")

    show = str if RANK or args.quiet and not args.sample else partial(print, end="", flush=True)

    def at_rest(weights: dict[str, Tensor]) -> nn.Module:
        model = CompressiveTransformer(eval_config).to(device, dtype).eval()
        model.load_state_dict(weights)
        return model

    prompt = os.fsencode(args.prompt) or text.read(split, split + args.segment)
    opening = harmless(prompt.decode(errors="replace"))
    if only:
        if RANK:
            return ""
        with autocast:
            if args.eval_only:
                return f"val_bpc={evaluate(at_rest(saved['model']), text, split, args)[0]:.4f}\n"
            show(opening)
            sample(at_rest(saved["model"]), prompt, args, show)
        return "\n"

    if LAUNCHED:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(args.seed)
    model = CompressiveTransformer(config).to(device, dtype)
    if RANK:
        torch.manual_seed(args.seed + RANK)  # for dropout, which differs from row to row
    optimizer, schedule = make_optimizer(model, args)
    log = Log(out, args.steps, show)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "log": log}
    if args.compile:
        torch._dynamo.config.recompile_limit = 32  # a few are needed until memory is full
        model.compile()
    forward = Step(model, autocast)
    if LAUNCHED:  # without find_unused_parameters, buckets and thus rounding change after a step
        forward = nn.parallel.DistributedDataParallel(forward, find_unused_parameters=True)
    first, at, L = 0, 0, config.n_layers  # at: how far all rows have been read
    memories: list[Memory | None] = [None] * args.accumulate
    if saved:
        try:
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            first = log.saved = saved["step"]
            at, (random, cuda, *slots) = saved["at"], saved["ranks"][RANK]
            torch.set_rng_state(random)
            if device.type == "cuda" and len(cuda):
                torch.cuda.set_rng_state(cuda)
            for i in range(args.accumulate if slots else 0):  # each has mem and c_mem of all layers
                own = [x.to(device) for x in slots[2 * i * L : 2 * (i + 1) * L]]
                memories[i] = Memory(tuple(own[:L]), tuple(own[L:]))
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise Stop(f"{path} does not fit this run: {str(error).splitlines()[0]}") from None

    def save(step: int) -> None:
        log.look(step)
        slots = [x for memory in memories if memory for kind in memory for x in kind]
        if agreed(not all(bool(x.isfinite().all()) for x in (*model.parameters(), *slots))):
            log.diverged(f"a parameter or memory after step {step}")
        # Clones: memories are views, and with a view all is saved that it is a view of.
        cuda = torch.cuda.get_rng_state() if device.type == "cuda" else torch.empty(0)
        mine = [torch.get_rng_state(), cuda, *(x.cpu().clone() for x in slots)]
        ranks = [mine]
        if LAUNCHED:  # tensor by tensor: gathering objects needs NumPy
            ranks = [[torch.empty_like(x) for x in mine] for _ in range(WORLD_SIZE)]
            for i, x in enumerate(mine):
                dist.gather(x, None if RANK else [kept[i] for kept in ranks])
        if RANK == 0:
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"config": asdict(config), "settings": settings, "text": fingerprint}
            state |= {"step": step, "at": at, "ranks": ranks, "world_size": WORLD_SIZE}
            write_whole(path, partial(torch.save, state))
        log.saved = step

    settings = {name: value for name, value in vars(args).items() if name not in OF_A_COMMAND}
    if RANK == 0:
        if not saved and out.exists() and any(not x.name.startswith(".") for x in out.iterdir()):
            raise Stop(f"--out {out} is not empty: name a new folder, so that no run is lost")
        out.mkdir(parents=True, exist_ok=True)
        locked = lock(out)  # noqa: F841  (as long as it is open)
    if saved and RANK == 0:
        log.cut(first)
    elif not saved:
        save(0)  # first of all, so that whatever happens the run can go on
    if RANK == 0:
        words = json.dumps(settings, indent=2).encode()
        write_whole(out / "settings.json", lambda file: file.write(words))
    signals.again = f"{'torchrun --nproc-per-node ' + str(WORLD_SIZE) if LAUNCHED else 'python'} "
    signals.again += shlex.join([sys.argv[0], "--resume", str(out)])
    show(
        f"{text.length:,} bytes of {args.data}; {sum(p.numel() for p in model.parameters()):,} "
        f"parameters; {device.type}, {args.dtype}; {f'{WORLD_SIZE} processes; ' * LAUNCHED}"
        f"{f'after step {first}; ' * bool(saved)}results in {out}\n"
    )

    signals.training, share = True, args.batch_size // WORLD_SIZE
    length = (split - 1) // args.batch_size  # of a row, less the byte it shares with the next
    starts = [row * length for row in range(RANK * share, (RANK + 1) * share)]
    for step in range(first + 1, args.steps + 1):
        segments, tokens, losses = [], 0, torch.zeros(())
        for _ in range(args.unroll):
            begin = at % length  # at the end, rows begin anew, and so does the memory
            at = min(begin + args.segment, length)
            tokens += args.batch_size * (at - begin)
            rows = [text.read(start + begin, start + at + 1) for start in starts]
            segments.append((to_tokens(rows, device), begin == 0))
        for i in range(args.accumulate):
            part = [(rows.chunk(args.accumulate)[i], anew) for rows, anew in segments]
            last = i == args.accumulate - 1 or not LAUNCHED
            with nullcontext() if last else forward.no_sync():
                loss, found, memories[i] = forward(part, memories[i])
                (loss / args.accumulate).backward()
            losses = found / args.accumulate + losses
        for group in model.parameter_groups():  # apart: jointly, either would scale the other down
            torch.nn.utils.clip_grad_norm_(group, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log.step(step, losses, tokens, schedule.get_last_lr()[0])
        schedule.step()
        number = agreed(signals.number)
        if number or step % args.save_every == 0 or step == args.steps:
            save(step)
        if number:
            raise Stop(f"stopped after step {step}", 128 + number)
    signals.training = False
    agreed(0)  # all have what they need of each other: the others may end
    if RANK:
        return ""

    written = [f"--- prompt (held-out text)\n{opening}\n--- continuation\n"]
    with autocast:
        val_bpc, ages = evaluate(at_rest(model.state_dict()), text, split, args)
        show("\n" + written[0])
        sample(at_rest(model.state_dict()), prompt, args, lambda x: (written.append(x), show(x)))
    write_whole(out / "sample.txt", lambda file: file.write("".join(written).encode()))
    show(f"\n---\n{draw(out, ages, f'{args.data}: {val_bpc:.3f} bits per held-out character')}\n")
    speed, seconds = log.tokens / max(log.recorded[1], 1e-9), time.perf_counter() - start
    return f"val_bpc={val_bpc:.4f} tokens_per_second={speed:.0f} seconds={seconds:.1f}\n"


# --------------------------------------------------------------------------------- command line

MODEL_SETTINGS = [field for field in fields(Config) if field.name != "vocab_size"]  # 256: bytes
OF_A_COMMAND = {"resume", "out", "eval_only", "sample", "prompt", "quiet"}  # not of the run
MAY_DIFFER = {"data", "device", "compile", "save_every", "sample_bytes"}  # data: if equal
MAY_DIFFER |= {"eval_mem_len", "eval_c_mem_len", "eval_segment", "eval_reset"}
CHECKPOINT = {"model", "optimizer", "schedule", "log", "config", "settings", "text", "step", "at"}
CHECKPOINT |= {"ranks", "world_size"}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def number(kind: type, low: float) -> Callable[[str], float]:
    """The type of an option: a finite number of at least `low` (an int) or above it (a float)."""

    def parse(text: str) -> float:
        value = kind(text)
        if not math.isfinite(value) or value < low or (kind is float and value == low):
            bound = f"{'above' if kind is float else 'of at least'} {low}"
            raise argparse.ArgumentTypeError(f"must be a number {bound}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names the type in its own message
    return parse


def parse(argv: Sequence[str] | None) -> tuple[Parser, argparse.Namespace, dict]:
    """The options, and those of them that were given."""
    whole, any_whole, flag = number(int, 1), number(int, 0), {"action": "store_true"}
    how = {"prog": "train.py", "formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    parser = Parser(description="Train a byte-level Compressive Transformer on text.", **how)
    add = parser.add_argument
    data = "'stdlib' (the sources of Python's standard library), 'tinyshakespeare' (fetched once "
    add("--data", default="stdlib", help=data + "into data/), or a file or folder of text")
    add("--out", help="the run's folder; by default runs/ and the time")
    add("--resume", metavar="RUN", help="go on with the run in this folder, with its settings")
    add("--eval-only", **flag, help="only evaluate the run")
    add("--sample", **flag, help="only generate from the run")
    add("--prompt", default="", help="text for --sample to continue; by default held-out text")
    add("--sample-bytes", type=any_whole, default=500, help="length of a sample")
    add("--quiet", **flag, help="print the last line alone")
    add("--save-every", type=whole, default=500, help="steps from checkpoint to checkpoint")
    add("--device", default="auto", help="auto (an accelerator or the CPU) or a torch device")
    dtypes = "auto", "float32", "bfloat16", "float64"
    dtype = "of the matrix products (float64: of all); auto: bfloat16 where the hardware has it"
    add("--dtype", default="auto", choices=dtypes, help=dtype)
    add("--compile", **flag, help="let torch.compile make it faster")
    add("--steps", type=whole, default=1200, help="optimiser steps")
    add("--batch-size", type=whole, default=32, help="rows, each a stream of its own")
    add("--accumulate", type=whole, default=1, help="parts in which a step takes the rows")
    add("--segment", type=whole, default=64, help="tokens of a row in a segment")
    add("--unroll", type=whole, default=1, help="segments in an optimiser step")
    add("--lr", type=number(float, 0), default=3e-3, help="peak learning rate of AdamW")
    add("--seed", type=any_whole, default=0, help="of the weights, dropout and the sample")
    add("--eval-mem-len", type=any_whole, help="mem_len in evaluation; by default as trained")
    add("--eval-c-mem-len", type=any_whole, help="c_mem_len in evaluation; by default as trained")
    add("--eval-segment", type=whole, help="segment in evaluation; by default as trained")
    add("--eval-reset", **flag, help="in evaluation, drop the memory where a file begins")
    for field in MODEL_SETTINGS:
        how = {"type": type(field.default)}
        if isinstance(field.default, bool):
            how = {"action": argparse.BooleanOptionalAction}
        name, help = "--" + field.name.replace("_", "-"), field.metadata["help"]
        add(name, default=field.default, help=help, **how)
    args = parser.parse_args(argv)
    unset = argparse.Namespace(**dict.fromkeys(vars(args)))  # what has a value gets no default
    given = {k: v for k, v in vars(parser.parse_args(argv, unset)).items() if v is not None}
    return parser, args, given


def main(argv: Sequence[str] | None = None) -> None:
    parser, args, given = parse(argv)
    signals = Signals()
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signals)
    sys.stdout.reconfigure(errors="replace")  # for a terminal that cannot show all of UTF-8
    status, message, lost = 0, "", ""
    try:
        print(train(args, given, signals), end="", flush=True)
    except Stop as stop:
        status, message = stop.status, str(stop)
    except OSError as error:
        status, message = 2, f"{error.filename or 'writing'}: {error.strerror or error}"
    except RuntimeError as error:
        if not LAUNCHED or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        status, lost = 1, f"process {RANK} has lost another one: {str(error).splitlines()[0]}"
    if lost or status and LOCAL_RANK == 0:  # what is refused, all processes refuse
        again = f"; to go on: {signals.again}" if (lost or status > 2) and signals.again else ""
        live = signals.training and sys.stdout.isatty() and not args.quiet
        print("\n" * live + f"{parser.prog}: {message or lost}{again}", file=sys.stderr, flush=True)
    if LAUNCHED:  # gloo's threads hold Python's objects: an ordinary end can abort the process
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
