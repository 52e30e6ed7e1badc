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
import shutil
import signal
import sys
import sysconfig
import time
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from functools import lru_cache, partial
from io import BytesIO, FileIO
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import fmean

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch's, which needs it not
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or DistributedDataParallel warns in vain

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from compressive import CompressiveTransformer, Config, Memory  # noqa: E402

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
BITS = 1 / math.log(2)  # a nat in bits; the text is bytes, so that bits per byte are per character
LAUNCHED = dist.is_torchelastic_launched()  # by torchrun, as process RANK of WORLD_SIZE
ENV = os.environ if LAUNCHED else {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
RANK, LOCAL_RANK, WORLD_SIZE = (int(ENV[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
DTYPES = "auto", "float32", "bfloat16", "float64"

COMMAND = {  # what to do: defaults, and what they are
    "out": ("", "the run's folder; by default runs/ and the time"),
    "resume": ("", "go on with the run in this folder, with its settings"),
    "eval_only": (False, "only evaluate the run"),
    "sample": (False, "only generate from the run"),
    "prompt": ("", "text for --sample to continue; by default held-out text"),
    "quiet": (False, "print the last line alone"),
}
FREE = {  # settings that may change when a run is resumed
    "data": ("stdlib", "stdlib, tinyshakespeare (fetched once), or a file or folder of text"),
    "device": ("auto", "auto (an accelerator or the CPU) or a torch device"),
    "compile": (False, "let torch.compile make it faster"),
    "save_every": (500, "steps from checkpoint to checkpoint"),
    "sample_bytes": (500, "length of a sample"),
    "eval_mem_len": (-1, "mem_len in evaluation; -1: as trained"),
    "eval_c_mem_len": (-1, "c_mem_len in evaluation; -1: as trained"),
    "eval_segment": (0, "segment in evaluation; 0: as trained"),
    "eval_reset": (False, "in evaluation, drop the memory where a file begins"),
}
FIXED = {  # settings that may not
    "dtype": ("auto", f"of matrix products, or float64 of all: {', '.join(DTYPES)}"),
    "seed": (0, "of the weights, dropout and the sample"),
    "steps": (1200, "optimiser steps"),
    "batch_size": (32, "rows, each a stream of its own"),
    "accumulate": (1, "parts in which a step takes the rows"),
    "segment": (64, "tokens of a row in a segment"),
    "unroll": (1, "segments in an optimiser step"),
    "lr": (3e-3, "peak learning rate of AdamW"),
}
MODEL = {x.name: (x.default, x.metadata["help"]) for x in fields(Config) if x.name != "vocab_size"}
SETTINGS = FREE | FIXED | MODEL


class Stop(BaseException):
    """Ends the program with one line and a status: 2 where what the user gave does not work. Not an
    Exception, so that nothing takes one that a signal raised for an error of its own."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


def need(ok: object, message: str) -> None:
    if not ok:
        raise Stop(message)


# ------------------------------------------------------------------------------------------- text


def memory_map(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):  # rows are far apart: reading ahead is a start of seconds
        view.madvise(mmap.MADV_RANDOM)
    return view


class Text:
    """Files as one text, read through memory maps: they may be far larger than memory."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = [path for path in paths if path.stat().st_size]  # an empty file has no map
        self.ends = list(accumulate(path.stat().st_size for path in self.paths))
        self.length = self.ends[-1] if self.ends else 0
        self.map = lru_cache(128)(memory_map)  # a process may keep only so many files open
        self.split = self.length - min(self.length // 10, 2**16)  # where held-out text begins

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
    path = Path("data/tinyshakespeare.txt" if data == "tinyshakespeare" else data)
    if data == "tinyshakespeare" and not path.exists():
        path.parent.mkdir(exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL, str(path), SHAKESPEARE_SHA256, progress=False)
        except (OSError, RuntimeError) as error:  # the latter if it is another text
            mend = f"put it at {path} yourself, or train on --data PATH"
            raise Stop(f"{URL} could not be fetched: {error}; {mend}") from None
    if data == "stdlib":
        paths = Path(sysconfig.get_path("stdlib")).glob("[!_]*.py")
    else:
        paths = path.rglob("*") if path.is_dir() else [path]
    text = Text(sorted(path for path in paths if path.is_file()))
    mend = "name a file or folder that has some, or 'stdlib' or 'tinyshakespeare'"
    need(text.length, f"--data {data} is not there or has no text: {mend}")
    return text


def to_tokens(rows: Sequence[bytes], device: torch.device) -> Tensor:
    """Rows of bytes as tokens `[B, T]`, without making the host wait for the device."""
    tokens = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(len(rows), -1)
    if device.type == "cuda":
        tokens = tokens.pin_memory().to(device, non_blocking=True)
    return tokens.to(device).long()


# -------------------------------------------------------------- devices, processes, signals, files


def find_device(name: str) -> torch.device:
    """The device that `--device` names; 'auto' takes an accelerator if there is one, or the CPU."""
    if name == "auto":
        name = getattr(torch.accelerator.current_accelerator(check_available=True), "type", "cpu")
    try:
        device = torch.zeros(1, device=f"cuda:{LOCAL_RANK}" if name == "cuda" else name).device
    except (RuntimeError, AssertionError) as error:  # torch raises either
        reason = str(error).splitlines()[0]
        raise Stop(f"--device {name} cannot be used: {reason}; try --device cpu") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 itself."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    can = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return can.get("avx512_bf16", False) or can.get("amx_bf16", False)


def agreed(number: int) -> int:
    """The largest of the processes' numbers: what one must do, all do. No device is waited for."""
    numbers = torch.tensor(number)
    if LAUNCHED:
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return int(numbers)


class Signals:
    """SIGINT and SIGTERM end the program, but during training the first waits for the step."""

    training, number, again = False, 0, ""  # again: the command to go on with, once there is one

    def __call__(self, number: int, frame: object) -> None:
        if not self.training:
            raise Stop("interrupted", 128 + number)
        self.number = number
        if not LAUNCHED:  # torchrun passes on a Ctrl-C that the terminal has sent us already
            signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once


def write_whole(path: Path, data: bytes) -> None:
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
    with open(path, "rb") as file, suppress(Exception):  # torch raises many kinds
        state = torch.load(file, map_location="cpu", weights_only=True)
        if state.keys() >= {"model", "settings", "text"}:
            return state
    why = "it is truncated, something else, or more than data (no code of it was run)"
    raise Stop(f"{path} is no checkpoint of train.py: {why}")


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Refuses a checkpoint whose parts are not those of its settings."""
    try:
        yield
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise Stop(f"{path} does not fit this run: {str(error).splitlines()[0]}") from None


def open_metrics(path: Path, step: int) -> FileIO:
    """metrics.jsonl, cut after a step and any line that was never finished. While it is open, which
    a killed process's is not, no other process can open it like this."""
    file = open(path, "a+b", buffering=0)
    with suppress(ImportError):  # on Windows
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Stop(f"{path.parent} is in use by another process") from None
    file.seek(0)
    lines = file.read().splitlines(keepends=True)
    kept = [x for x in lines if x.endswith(b"}\n") and json.loads(x)["step"] <= step]
    file.truncate(sum(map(len, kept)))
    return file


# --------------------------------------------------------------------------------------- training


class Step(nn.Module):
    """The forward pass of an optimiser step as one module, however many segments it reads, so that
    DistributedDataParallel sees the whole of it."""

    def __init__(self, model: CompressiveTransformer, args: argparse.Namespace) -> None:
        super().__init__()
        self.model, self.autocast, self.segment = model, args.autocast, args.segment
        self.losses = model.logits.weight.new_zeros(1 + len(model.layers))
        for i, layer in enumerate(model.layers, 1):
            layer.register_forward_hook(partial(self.note, i))

    def note(self, i: int, layer: nn.Module, inputs: object, outputs: tuple[Tensor, ...]) -> None:
        self.losses[i] += outputs[3].detach()  # in place: torch.compile need not guard a list

    def forward(self, tokens: Tensor, memory: Memory | None) -> tuple[Tensor, Tensor, Memory]:
        """Tokens `[B, T + 1]` -> the loss to minimise, losses to report (the language model's, in
        nats, and each layer's of compression), and the memory."""
        total = self.losses.zero_().sum()
        segments = [x.split(self.segment, dim=1) for x in (tokens[:, :-1], tokens[:, 1:])]
        for inputs, targets in zip(*segments, strict=True):
            with self.autocast:
                logits, memory, compression_loss = self.model(inputs, memory)
            logits = logits.flatten(0, 1).to(self.losses.dtype)
            loss = F.cross_entropy(logits, targets.flatten())
            total = total + (loss + compression_loss) / len(segments[0])
            self.losses[0] += loss.detach()
        return total, self.losses / len(segments[0]), memory.detach()


def share_of_peak(steps: int, step: int) -> float:
    """The learning rate's: up in a line, then down by a cosine to zero."""
    warmup = min(100, steps // 10)
    up, down = (step + 1) / (warmup + 1), (step - warmup) / (steps - warmup)
    return min(up, 0.5 + 0.5 * math.cos(math.pi * down))


class Training:
    """What a checkpoint holds, and the step that changes it. `state` is the checkpoint to go on
    from. A new run has none, and is saved before its first step so that it can always go on."""

    PARTS = "model", "optimizer", "schedule"

    def __init__(self, args: argparse.Namespace, text: Text, state: dict) -> None:
        self.args, self.text = args, text
        torch.manual_seed(args.seed)
        self.model = CompressiveTransformer(args.config).to(args.device, args.parameters)
        language_model, compression = self.model.parameter_groups()
        matrices = {"params": [p for p in language_model if p.dim() >= 2], "weight_decay": 0.1}
        rest = {"params": [p for p in language_model if p.dim() < 2] + compression}
        how = {"betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
        self.optimizer = torch.optim.AdamW([matrices, rest], lr=args.lr, **how)
        share = partial(share_of_peak, args.steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, share)
        if args.compile:
            torch._dynamo.config.recompile_limit = 32  # a few are needed until memory is full
            self.model.compile()
        self.forward = Step(self.model, args)
        if LAUNCHED:  # without find_unused_parameters, buckets and rounding change after a step
            parallel = nn.parallel.DistributedDataParallel
            self.forward = parallel(self.forward, find_unused_parameters=True)
        self.length = (text.split - 1) // args.batch_size  # of a row; the next byte is shared
        self.starts = [row * self.length for row in range(RANK, args.batch_size, WORLD_SIZE)]
        self.memories: list[Memory] = []  # of every part of the rows, once a step has been taken
        self.losses = self.model.logits.weight.new_zeros(0, 1 + args.n_layers)  # not yet recorded
        self.step = self.at = self.saved = 0  # at: how many bytes of a row have been read
        self.began, self.recorded = time.perf_counter(), (0, 0.0)
        if state:
            with fitting(args.path):
                self.restore(state)
        if RANK == 0:
            args.path.parent.mkdir(parents=True, exist_ok=True)
            self.metrics = open_metrics(args.path.with_name("metrics.jsonl"), self.step)
        self.save()  # if resumed, with the settings as they are now, and over half a file left

    def advance(self) -> None:
        """An optimiser step, in which the host waits for no device."""
        args, parts, losses = self.args, self.args.accumulate, 0
        torch.manual_seed(hash((args.seed, self.step, RANK)))  # all that chance depends on
        begin = self.at % self.length
        end = min(begin + args.unroll * args.segment, self.length)
        rows = [self.text.read(start + begin, start + end + 1) for start in self.starts]
        memories = self.memories if begin else [None] * parts  # the rows begin, or begin anew
        self.memories = []
        for i, tokens in enumerate(to_tokens(rows, args.device).chunk(parts)):
            self.forward.require_backward_grad_sync = i == parts - 1  # what no_sync() sets
            loss, found, memory = self.forward(tokens, memories[i])
            (loss / parts).backward()
            self.memories.append(memory)
            losses = found / parts + losses
        for group in self.model.parameter_groups():  # jointly, either would scale the other down
            nn.utils.clip_grad_norm_(group, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.lr = self.schedule.get_last_lr()[0]
        self.schedule.step()
        self.losses = torch.cat([self.losses, losses[None]])
        self.step, self.at = self.step + 1, self.at + end - begin

    def look(self) -> Tensor:
        """The losses not yet recorded, averaged over the processes, if all is finite."""
        losses = self.losses.cpu().double() / WORLD_SIZE
        if LAUNCHED:
            dist.all_reduce(losses)
        slots = [x for memory in self.memories for layers in memory for x in layers]
        finite = all(x.isfinite().all() for x in (*self.model.parameters(), *slots))
        bad = [i for i, row in enumerate(losses, 1 - len(losses)) if not row.isfinite().all()]
        if agreed(not finite) or bad:
            what = f"loss of step {self.step + bad[0]}" if bad else f"state after step {self.step}"
            good = f"the last good checkpoint is {self.args.path}, after step {self.saved}"
            raise Stop(f"the {what} is not finite; {good}", 1)
        return losses

    def record(self) -> dict:
        """Tell metrics.jsonl of the steps since the last record, in a whole line or not at all."""
        nats, *layers = self.look().mean(dim=0).tolist()
        seconds, (old_at, old_seconds) = time.perf_counter() - self.began, self.recorded
        self.losses, self.recorded = self.losses[:0], (self.at, seconds)
        speed = self.args.batch_size * (self.at - old_at) / (seconds - old_seconds)
        record = {"step": self.step, "bpc": nats * BITS, "compression_loss": fmean(layers)}
        record |= {"compression_loss_of_layers": layers, "lr": self.lr}
        record |= {"seconds": seconds, "tokens_per_second": speed}
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        if RANK == 0 and (written := self.metrics.write(line)) < len(line):
            self.metrics.truncate(self.metrics.tell() - written)
            raise Stop(f"{self.metrics.name} could not be written: the disk is full")
        return record

    def save(self) -> None:
        self.look()
        slots = [torch.stack(layers) for memory in self.memories for layers in memory]
        own = [x.cpu() for x in (self.losses, *slots)]
        ranks = [[torch.empty_like(x) for x in own] for _ in range(WORLD_SIZE)]
        for i, x in enumerate(own if LAUNCHED else ()):  # one by one: for objects torch needs NumPy
            dist.gather(x, None if RANK else [of[i] for of in ranks])
        if RANK == 0:
            state = {name: getattr(self, name).state_dict() for name in self.PARTS}
            state |= {"step": self.step, "at": self.at, "ranks": ranks if LAUNCHED else [own]}
            state |= {"seconds": time.perf_counter() - self.began, "text": self.text.fingerprint()}
            state |= {"config": asdict(self.args.config), "settings": self.args.settings}
            torch.save(state, buffer := BytesIO())
            write_whole(self.args.path, buffer.getbuffer())
            settings = json.dumps(self.args.settings, indent=2).encode()
            write_whole(self.args.path.with_name("settings.json"), settings)
        self.saved = self.step

    def restore(self, state: dict) -> None:
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.step, self.at, self.saved = state["step"], state["at"], state["step"]
        self.began -= state["seconds"]
        self.recorded = self.at, state["seconds"]
        self.losses, *slots = (x.to(self.args.device) for x in state["ranks"][RANK])
        self.memories = [Memory(*map(tuple, x)) for x in zip(slots[::2], slots[1::2], strict=True)]


def train(training: Training, show: Callable, signals: Signals) -> None:
    """Train to the last step, or until a signal comes."""
    steps, live = training.args.steps, sys.stdout.isatty()
    every = max(1, min(steps // 40, 50))  # nothing of the terminal: metrics depend on it
    signals.training = True
    try:
        while training.step < steps:
            training.advance()
            step = training.step
            if step % every == 0 or step == steps:
                record = training.record()
                left = record["seconds"] / step * (steps - step)
                line = (
                    f"step {step:>{len(str(steps))}}/{steps}  bpc {record['bpc']:.3f}  "
                    f"compression loss {record['compression_loss']:.4f}  "
                    f"{record['tokens_per_second']:,.0f} tokens/s  {left:.0f} s left"
                )
                width = shutil.get_terminal_size().columns - 1
                show(f"\r{line[:width]}\x1b[K" if live else f"{line}\n")
            number = agreed(signals.number)
            if number or step % training.args.save_every == 0 or step == steps:
                training.save()
            if number:
                raise Stop(f"stopped after step {step}", 128 + number)
    finally:
        signals.training = False
        show("\n" * live)
    agreed(0)  # all have what they need of each other: the others may end


# ---------------------------------------------------------------- evaluation, samples, pictures


@torch.no_grad()
def evaluate(model: nn.Module, text: Text, args: argparse.Namespace) -> tuple:
    """Bits per character of the held-out text, one stream of which every byte is scored once
    while memory streams over it; and the mean attention weight of a slot by age: six buckets each
    of compressed memory, memory and segment, over the second half of the segments."""
    weight, segment, start = model.logits.weight, args.eval_segment or args.segment, text.split
    weights, nats, ages = [], [], []
    ask = lambda layer, args, named: (args, named | {"need_weights": True})  # noqa: E731
    note = lambda layer, args, out: weights.append(out[1].mean(dim=(0, 1, 2)))  # noqa: E731
    for layer in model.layers:
        layer.attention.register_forward_pre_hook(ask, with_kwargs=True)
        layer.attention.register_forward_hook(note)
    documents = [end for end in text.ends if args.eval_reset and start < end < text.length]
    for begin, end in pairwise([start, *documents, text.length]):
        memory = model.initial_memory(1)
        for at in range(begin, end, segment):
            row = to_tokens([text.read(at - 1, min(at + segment, end))], weight.device)
            tokens, targets = row[:, :-1], row[:, 1:]
            lengths = memory.c_mem[0].size(1), memory.mem[0].size(1), tokens.size(1)
            weights.clear()
            logits, memory, _ = model(tokens, memory, need_loss=False)
            nats.append(F.cross_entropy(logits.to(weight.dtype).mT, targets, reduction="sum"))
            parts = torch.stack(weights).float().mean(dim=0).split(lengths)
            ages.append(torch.stack([x.mean() for part in parts for x in part.tensor_split(6)]))
    bpc = torch.stack(nats).cpu().double().sum().item() * BITS / (text.length - start)
    return bpc, torch.stack(ages[len(ages) // 2 :]).nanmean(dim=0).view(3, 6).tolist()


def harmless(text: str) -> str:
    """Text that no terminal takes for a command."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def sample(model: nn.Module, text: Text, args: argparse.Namespace, show: Callable) -> str:
    """Show the prompt and, as it comes, its continuation; returns all that was shown."""
    device, utf8 = model.logits.weight.device, codecs.getincrementaldecoder("utf-8")("replace")
    prompt = os.fsencode(args.prompt) or text.read(text.split, text.split + args.segment)
    opening = harmless(prompt.decode(errors="replace"))
    if not args.only:
        opening = f"--- prompt (held-out text)\n{opening}\n--- continuation\n"
    show(opening)
    tokens = model.generate(
        to_tokens([prompt], device),
        args.sample_bytes,
        temperature=0.8,
        generator=torch.Generator(device).manual_seed(args.seed),
        stream=lambda token: show(harmless(utf8.decode(bytes(token[0].tolist())))),
    )
    show(utf8.decode(b"", final=True))
    return opening + harmless(bytes(tokens[0, len(prompt) :].tolist()).decode(errors="replace"))


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
    figure.savefig(picture := BytesIO(), format="png", dpi=120)
    write_whole(folder / "run.png", picture.getbuffer())
    return f"picture in {folder / 'run.png'}"


# ------------------------------------------------------------------------------------ command line


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict]:
    """The options, and the checkpoint of a run to go on with, whose settings are the defaults."""
    how = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    parser = argparse.ArgumentParser("train.py", description=__doc__.splitlines()[0], **how)
    parser.error = partial(need, False)
    for name, (default, help) in (COMMAND | SETTINGS).items():
        flag = isinstance(default, bool)
        how = {"action": argparse.BooleanOptionalAction} if flag else {"type": type(default)}
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, help=help, **how)
    args, state = parser.parse_args(argv), {}
    only = args.eval_only or args.sample
    need(args.resume or not only, "--eval-only and --sample need a run: add --resume RUN")
    path = Path(args.resume or args.out or time.strftime("runs/%Y-%m-%d_%H-%M-%S"), "checkpoint.pt")
    if args.resume:
        state = load(path)
        old = state["settings"]
        parser.set_defaults(**old)
        args = parser.parse_args(argv)
        args.processes = WORLD_SIZE
        for name in old.keys() - FREE.keys() - ({"dtype", "seed", "processes"} if only else set()):
            known, new = old[name], getattr(args, name)
            need(new == known, f"the run in {args.resume} has {name} {known}, not {new}")
    args.only, args.path = only, path
    return args, state


def check(args: argparse.Namespace) -> None:
    """Refuse settings that cannot work, and find what 'auto' stands for."""
    for name, (default, _) in (FREE | FIXED).items():
        value = getattr(args, name)
        if isinstance(default, int | float):  # above 0, as the default is, or at least the default
            ok = 0 < value < math.inf if default > 0 else default <= value < 2**63
            bound = "above 0" if default > 0 else f"at least {default}"
            need(ok, f"{name} must be {bound}, got {value}")
    need(args.dtype in DTYPES, f"dtype must be one of {', '.join(DTYPES)}, got {args.dtype!r}")
    early = "slots are first read a segment later"
    need(args.unroll > 1 or not args.bptt, f"unroll must be at least 2 with bptt: {early}")
    parts = f"{WORLD_SIZE} processes x {args.accumulate} parts (accumulate)"
    fair = args.batch_size % (WORLD_SIZE * args.accumulate) == 0
    need(fair, f"batch_size must be divisible by {parts}, got {args.batch_size}")
    try:
        args.config = Config(**{name: getattr(args, name) for name in MODEL})
        lengths = {"mem_len": args.eval_mem_len, "c_mem_len": args.eval_c_mem_len}
        args.at_rest = replace(args.config, **{k: v for k, v in lengths.items() if v >= 0})
    except ValueError as error:
        raise Stop(str(error)) from None
    device = find_device(args.device)
    if args.dtype == "auto":
        args.dtype = "bfloat16" if has_bfloat16(device) else "float32"
    args.settings = {name: getattr(args, name) for name in SETTINGS} | {"processes": WORLD_SIZE}
    args.device = device
    args.parameters = torch.float64 if args.dtype == "float64" else torch.float32
    args.autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")


def run(args: argparse.Namespace, state: dict, signals: Signals) -> str:
    """Do what the options say; returns the last line to print."""
    start, out, rows = time.perf_counter(), args.path.parent, args.batch_size
    check(args)
    text = find_text(args.data)
    enough = text.length >= 20 * rows  # every row has a byte to predict, then
    mend = f"{rows} rows need {20 * rows}: name a longer text or a smaller --batch-size"
    need(enough, f"--data {args.data} has {text.length} bytes, {mend}")
    known = not state or state["text"] == text.fingerprint()
    need(known, f"--data {args.data} is another text than the one that {out} was trained on")
    quiet = RANK or args.quiet and not args.sample
    show = str if quiet else partial(print, end="", flush=True)
    files = [x for x in out.glob("[!.]*") if x.stat().st_size]
    mend = "name a new folder, so that no run is lost"
    need(state or not files, f"--out {out} is not empty: {mend}")
    if not args.only:
        if LAUNCHED:
            dist.init_process_group("cpu:gloo,cuda:nccl" if args.device.type == "cuda" else "gloo")
        training = Training(args, text, state)
        command = f"torchrun --nproc-per-node {WORLD_SIZE}" if LAUNCHED else "python"
        signals.again = f"; to go on: {command} {shlex.join([sys.argv[0], '--resume', str(out)])}"
        show(
            f"{text.length:,} bytes of {args.data}; "
            f"{sum(p.numel() for p in training.model.parameters()):,} parameters; "
            f"{args.device.type}, {args.dtype}; {f'{WORLD_SIZE} processes; ' * LAUNCHED}"
            f"{f'after step {training.step}; ' * bool(state)}results in {out}\n"
        )
        train(training, show, signals)
        state = {"model": training.model.state_dict()}
    if RANK:
        return ""

    model = CompressiveTransformer(args.at_rest).to(args.device, args.parameters).eval()
    with fitting(args.path):
        model.load_state_dict(state["model"])
    with args.autocast:
        if args.sample or not args.only:
            written = sample(model, text, args, show)
        if args.eval_only or not args.only:
            val_bpc, ages = evaluate(model, text, args)
    if args.only:
        return "\n" * args.sample + (f"val_bpc={val_bpc:.4f}\n" if args.eval_only else "")
    write_whole(out / "sample.txt", written.encode())
    show(f"\n---\n{draw(out, ages, f'{args.data}: {val_bpc:.3f} bits per held-out character')}\n")
    speed, seconds = training.at * rows / training.recorded[1], time.perf_counter() - start
    return f"val_bpc={val_bpc:.4f} tokens_per_second={speed:.0f} seconds={seconds:.1f}\n"


def main(argv: Sequence[str] | None = None) -> None:
    signals, status, message = Signals(), 0, ""
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signals)
    sys.stdout.reconfigure(errors="replace")  # for a terminal that cannot show all of UTF-8
    try:
        print(run(*parse(argv), signals), end="", flush=True)
    except Stop as stop:
        status, message = stop.status, str(stop)
    except OSError as error:
        status, message = 2, f"{error.filename or 'writing'}: {error.strerror or error}"
    except RuntimeError as error:
        if not LAUNCHED or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        why = str(error).splitlines()[0].split(". ")[0]
        status, message = 3, f"process {RANK} has lost another one: {why}"
    if LOCAL_RANK and status in (1, 2):  # the first process says the same, and torchrun ends this
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # one; if not, the fault is its own
        time.sleep(10)
    if LOCAL_RANK == 0 < status or status in (1, 2, 3):
        again = signals.again if status > 2 else ""
        print(f"train.py: {message}{again}", file=sys.stderr, flush=True)
    if LAUNCHED:  # gloo's threads hold Python's objects: an ordinary end can abort the process
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
