# SPDX-License-Identifier: MIT
"""Train a byte-level Compressive Transformer on text:

    python train.py                            on the sources of Python's standard library
    python train.py --data tinyshakespeare     on Tiny Shakespeare, fetched once
    python train.py --data PATH                on any file, or all files of a folder

Every row of the batch reads a stretch of the text of its own, segment after segment, with a memory
of its own. The last tenth of the text, 128 KiB at the most, is held out.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import sysconfig
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import IO, NoReturn

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch's, which needs it not

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from compressive import CompressiveTransformer, Config  # noqa: E402

SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
HELD_OUT = 2**17  # bytes held out of a text at the most
BITS = 1 / math.log(2)  # a nat in bits; the text is bytes, so that bits per byte are per character


class Refused(Exception):
    """The user's input does not work; the message says what and how to mend it."""


# ------------------------------------------------------------------------------------------- text


def read_text(data: str) -> bytes:
    """The text that `--data` names."""
    if data == "stdlib":
        folder = Path(sysconfig.get_path("stdlib"))
        paths = [path for path in sorted(folder.glob("*.py")) if not path.name.startswith("_")]
        where = f"the standard library's folder {folder}"
    elif data == "tinyshakespeare":
        paths, where = [fetch_shakespeare()], data
    else:
        root, where = Path(data), data
        if not root.exists():
            raise Refused(
                f"--data {data}: no such file or folder, nor 'stdlib' or 'tinyshakespeare'"
            )
        paths = [root]
        if root.is_dir():
            paths = sorted(path for path in root.rglob("*") if path.is_file())
    text = b"".join(path.read_bytes() for path in paths)
    if not text:
        raise Refused(f"--data {data}: {where} has no text; name a file or folder that has some")
    return text


def fetch_shakespeare(folder: Path = Path("data")) -> Path:
    """Tiny Shakespeare's path, after fetching it if it is not there yet."""
    path = folder / "tinyshakespeare.txt"
    mend = f"put the file there yourself, or train on --data PATH ({SHAKESPEARE})"
    if path.exists():
        text = path.read_bytes()
    else:
        try:
            with urllib.request.urlopen(SHAKESPEARE, timeout=30) as response:
                text = response.read()
        except OSError as error:
            raise Refused(f"{path} could not be fetched: {error}; {mend}") from None
    if hashlib.sha256(text).hexdigest() != SHAKESPEARE_SHA256:
        raise Refused(f"{path} is not Tiny Shakespeare (its sha256 differs): delete it and {mend}")
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: file.write(text))
    return path


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file beside its place and move it there: at no time is half a file to be seen."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            write(file)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def streams(text: bytes, rows: int) -> Tensor:
    """Cut text into rows of equal length, each the continuation of the one before: `[rows, N + 1]`
    bytes. Rows overlap by one byte, the last target and the next row's first input."""
    length = (len(text) - 1) // rows
    flat = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return flat.as_strided((rows, length + 1), (length, 1))


def segments(rows: Tensor, segment: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets `[B, T]` of one pass over the streams; the last may be shorter."""
    for start in range(0, rows.size(1) - 1, segment):
        part = rows[:, start : start + segment + 1].to(device, torch.int64)
        yield part[:, :-1], part[:, 1:]


# --------------------------------------------------------------------------------------- training


def find_device(name: str) -> torch.device:
    """The device that `--device` names; 'auto' takes CUDA, then MPS, then the CPU."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises all three
        reason = str(error).splitlines()[0]
        raise Refused(f"--device {name} cannot be used: {reason}; try --device cpu") from None
    return device


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the matrix products; 'auto' takes bfloat16 where the hardware has it."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        can = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        fast = can.get("avx512_bf16", False) or can.get("amx_bf16", False)
    return torch.bfloat16 if fast else torch.float32


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """The share of the peak learning rate: up in a line, then down by a cosine to zero."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup))


def make_optimizer(
    model: CompressiveTransformer, args: argparse.Namespace
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW, which decays the language model's matrices alone, and its learning rate's schedule."""
    language_model, compression = model.parameter_groups()
    matrices = [p for p in language_model if p.dim() >= 2]
    rest = [p for p in language_model if p.dim() < 2] + compression
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    warmup = min(100, args.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step, args.steps, warmup)
    )
    return optimizer, schedule


def evaluate(
    model: CompressiveTransformer, rows: Tensor, segment: int, autocast: torch.autocast
) -> float:
    """Bits per character of the rows, memory streaming from segment to segment."""
    model.eval()
    nats, memory = 0.0, None
    with torch.no_grad(), autocast:
        for tokens, targets in segments(rows, segment, model.embedding.weight.device):
            logits, memory, _ = model(tokens, memory)
            nats += F.cross_entropy(logits.float().mT, targets, reduction="sum").item()
    model.train()
    return nats * BITS / (rows.size(0) * (rows.size(1) - 1))


class Progress:
    """Shows a line of progress (one that changes, on a terminal) and keeps it as a line of JSON."""

    def __init__(self, path: Path, steps: int) -> None:
        self.path, self.steps = path, steps
        self.live = sys.stdout.isatty()
        self.every = max(1, steps // (200 if self.live else 20))
        self.start = self.last = time.perf_counter()
        self.losses: list[Tensor] = []
        self.tokens = self.tokens_at_last = 0

    def step(self, step: int, losses: Tensor, tokens: int, lr: float) -> None:
        """After step number `step`: its `losses [2]`, of the language model in nats and of
        compression, and the number of tokens it read."""
        self.losses.append(losses)
        self.tokens += tokens
        if step % self.every and step != self.steps:
            return
        nats, compression = torch.stack(self.losses).mean(dim=0).tolist()
        now = time.perf_counter()
        speed = (self.tokens - self.tokens_at_last) / (now - self.last)
        left = (now - self.start) / step * (self.steps - step)
        record = {
            "step": step,
            "bpc": nats * BITS,
            "compression_loss": compression,
            "lr": lr,
            "tokens_per_second": speed,
            "seconds": now - self.start,
        }
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        line = (
            f"step {step:>{len(str(self.steps))}}/{self.steps}  bpc {nats * BITS:.3f}  "
            f"compression loss {compression:.4f}  {speed:,.0f} tokens/s  {left:.0f} s left"
        )
        if self.live:
            print(f"\r{line}\x1b[K", end="" if step < self.steps else "\n", flush=True)
        else:
            print(line, flush=True)
        self.last, self.tokens_at_last, self.losses = now, self.tokens, []


def readable(text: Tensor) -> str:
    """Generated bytes as text that no terminal takes for a command."""
    decoded = bytes(text.tolist()).decode(errors="replace")
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in decoded)


def train(args: argparse.Namespace) -> str:
    """Run the training that the options describe; returns its summary line."""
    start = time.perf_counter()
    if args.bptt and args.unroll < 2:
        raise Refused("--bptt needs --unroll of at least 2: slots are first read a segment later")
    try:
        config = Config(**{field.name: getattr(args, field.name) for field in MODEL_SETTINGS})
    except ValueError as error:
        raise Refused(str(error)) from None
    device = find_device(args.device)
    bfloat16 = find_dtype(args.dtype, device) == torch.bfloat16
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)

    text = read_text(args.data)
    if len(text) < 20 * args.batch_size:  # held out, too, every row has a byte to predict
        needed = f"{args.batch_size} rows need {20 * args.batch_size}"
        mend = "name a longer text or a smaller --batch-size"
        raise Refused(f"--data {args.data} has {len(text)} bytes, {needed}: {mend}")
    split = len(text) - min(len(text) // 10, HELD_OUT)
    train_rows = streams(text[:split], args.batch_size)
    held_out = streams(text[split:], args.batch_size)

    torch.manual_seed(args.seed)
    model = CompressiveTransformer(config).to(device)
    groups = model.parameter_groups()
    optimizer, schedule = make_optimizer(model, args)
    out = Path(args.out or time.strftime("runs/%Y-%m-%d_%H-%M-%S"))
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise Refused(f"--out {out} is not empty: name a new folder, so that no run is lost")
    print(
        f"{len(text):,} bytes of {args.data}; {sum(p.numel() for p in model.parameters()):,} "
        f"parameters; {device.type}, {'bfloat16' if bfloat16 else 'float32'}; results in {out}"
    )

    progress = Progress(out / "metrics.jsonl", args.steps)
    feed, memory = iter(()), None
    for step in range(1, args.steps + 1):
        losses, read = torch.zeros(2, device=device), 0
        for _ in range(args.unroll):
            batch = next(feed, None)
            if batch is None:  # the streams begin anew, and so does the memory
                feed, memory = segments(train_rows, args.segment, device), None
                batch = next(feed)
            tokens, targets = batch
            with autocast:
                logits, memory, compression_loss = model(tokens, memory)
            loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
            losses = losses + torch.stack([loss, compression_loss.float()]) / args.unroll
            read += tokens.numel()
        losses.sum().backward()
        memory = memory.detach()
        for group in groups:  # apart: a joint norm would let either loss scale the other's step
            torch.nn.utils.clip_grad_norm_(group, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.step(step, losses.detach(), read, schedule.get_last_lr()[0])
        schedule.step()

    speed = progress.tokens / (progress.last - progress.start)
    val_bpc = evaluate(model, held_out, args.segment, autocast)
    state = {"config": asdict(config), "model": model.state_dict(), "step": args.steps}
    write_whole(out / "checkpoint.pt", partial(torch.save, state))
    prompt = held_out[:1, : args.segment].to(device, torch.int64)
    sampler = torch.Generator(device).manual_seed(args.seed)
    model.eval()
    with autocast:
        sample = model.generate(prompt, args.sample, temperature=0.8, generator=sampler)[0]
    new = sample[prompt.size(1) :]
    print(f"\n--- prompt (held-out text)\n{readable(prompt[0])}")
    print(f"--- continuation\n{readable(new)}\n---")
    seconds = time.perf_counter() - start
    return f"val_bpc={val_bpc:.4f} tokens_per_second={speed:.0f} seconds={seconds:.1f}"


# --------------------------------------------------------------------------------- command line

MODEL_SETTINGS = [field for field in fields(Config) if field.name != "vocab_size"]  # 256: bytes


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


def parse(argv: Sequence[str] | None) -> tuple[Parser, argparse.Namespace]:
    parser = Parser(
        prog="train.py",
        description="Train a byte-level Compressive Transformer on text.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--data",
        default="stdlib",
        help="'stdlib' (the sources of Python's standard library), 'tinyshakespeare' (fetched once "
        "into data/), or a file or folder of text",
    )
    add("--out", help="folder for metrics.jsonl and checkpoint.pt; by default runs/ and the time")
    add("--device", default="auto", help="auto (CUDA, then MPS, then CPU) or a torch device")
    add(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="of the matrix products; auto: bfloat16 where the hardware has it",
    )
    add("--steps", type=number(int, 1), default=1200, help="optimiser steps")
    add("--batch-size", type=number(int, 1), default=32, help="rows, each a stream of its own")
    add("--segment", type=number(int, 1), default=64, help="tokens of a row in a segment")
    add("--unroll", type=number(int, 1), default=1, help="segments in an optimiser step")
    add("--lr", type=number(float, 0), default=3e-3, help="peak learning rate of AdamW")
    add("--sample", type=number(int, 0), default=500, help="bytes of the sample at the end")
    add("--seed", type=number(int, 0), default=0, help="of the weights, dropout and the sample")
    model = parser.add_argument_group("the model")
    for field in MODEL_SETTINGS:
        how = {"type": type(field.default)}
        if isinstance(field.default, bool):
            how = {"action": argparse.BooleanOptionalAction}
        model.add_argument(
            "--" + field.name.replace("_", "-"),
            default=field.default,
            help=field.metadata["help"],
            **how,
        )
    return parser, parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    parser, args = parse(argv)
    try:
        summary = train(args)
    except Refused as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except OSError as error:
        parser.exit(2, f"{parser.prog}: {error.filename or 'writing'}: {error.strerror or error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: interrupted; the metrics so far are kept\n")
    print(summary)


if __name__ == "__main__":
    main()
