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
from argparse import BooleanOptionalAction, Namespace
from dataclasses import asdict, fields, replace
from io import BytesIO
from pathlib import Path
from statistics import fmean
from typing import BinaryIO, NoReturn, get_args

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch does without it
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or DistributedDataParallel warns in vain

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from compressive import CompressiveTransformer, Config  # noqa: E402

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
BITS = 1 / math.log(2)  # a nat in bits; bpc is bits per byte, as on enwik8
LAUNCHED = dist.is_torchelastic_launched()  # by torchrun, which sets these
RANK = int(os.environ["RANK"]) if LAUNCHED else 0
WORLD_SIZE = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1


def fail(message: str, status: int = 2) -> NoReturn:
    """End the program with one line. Status 2: what the user gave does not work."""
    line = printable(message.replace("\n", " "))
    print(f"train.py: {line}\n", end="", file=sys.stderr)  # one write: processes' lines do not mix
    sys.exit(status)


def printable(text: object, keep: str = "") -> str:
    """Text in one line that no terminal takes for a command."""
    return "".join(c if c.isprintable() or c in keep else "\ufffd" for c in str(text))


# ------------------------------------------------------------------------------------ command line

# All of Config's but vocab_size (a byte has 256 values) and bptt (a step is one segment).
MODEL_SETTINGS = [x for x in fields(Config) if x.name not in ("vocab_size", "bptt")]
ACTIONS = "out resume eval_only sample prompt".split()  # all other options are settings
WITH_RESUME = "data device compile save_every sample_bytes eval_mem_len eval_c_mem_len".split()


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "train.py",
        description="Train a byte-level Compressive Transformer on text.",
        usage=argparse.SUPPRESS,  # so that an error is one line
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=time.strftime("runs/%Y-%m-%d_%H-%M-%S"), help="its new folder")
    add("--resume", help="go on with the run in this folder, with its settings")
    add("--eval-only", action="store_true", help="only evaluate the run")
    add("--sample", action="store_true", help="only generate from the run")
    add("--prompt", default="", help="text that the sample continues; by default held-out text")
    add("--sample-bytes", type=int, default=500, help="length of a sample")
    add("--data", default="stdlib", help="stdlib, tinyshakespeare (fetched once), file or folder")
    add("--device", default="auto", help="auto (an accelerator or the CPU) or a torch device")
    add("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="of matmuls")
    add("--compile", action=BooleanOptionalAction, default=False, help="faster, by torch.compile")
    add("--seed", type=int, default=0, help="of the weights and dropout")
    add("--steps", type=int, default=1000, help="optimiser steps, of a segment each")
    add("--batch-size", type=int, default=64, help="rows, each a stream of its own")
    add("--segment", type=int, default=16, help="tokens of a row in a segment")
    add("--lr", type=float, default=3e-3, help="peak rate of all parameters but u and v")
    add("--save-every", type=int, default=500, help="steps from checkpoint to checkpoint")
    add("--eval-mem-len", type=int, help="mem_len in evaluation; by default as trained")
    add("--eval-c-mem-len", type=int, help="c_mem_len in evaluation; by default as trained")
    for field in MODEL_SETTINGS:
        option = "--" + field.name.replace("_", "-")
        kind, help = get_args(field.type)
        if kind is bool:
            add(option, action=BooleanOptionalAction, default=field.default, help=help)
        else:
            add(option, type=kind, default=field.default, help=help)
    # Otherwise than in Config: so small a model learns more in three minutes.
    parser.set_defaults(n_heads=8, mem_len=16, c_mem_len=8, norm_first=False)
    return parser


def parse(argv: list[str] | None) -> tuple[Namespace, dict | None]:
    """The settings, and the checkpoint of the run to go on with, from which they then come."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.resume is None:
        if args.eval_only or args.sample:
            fail("--eval-only and --sample need a run: add --resume RUN")
        return args, None
    state = load(Path(args.resume, "checkpoint.pt"))
    settings = state["settings"] | {"out": Path(args.resume)}
    parser.set_defaults(**settings)
    args = parser.parse_args(argv)
    for name, value in settings.items():
        if getattr(args, name) != value and name not in WITH_RESUME:
            fail(f"{name} cannot be given with --resume: the run has its settings")
    return args, state


def make_configs(args: Namespace) -> tuple[Config, Config]:
    """The model's settings in training and in evaluation. Refuses all that cannot work."""
    positive = ["steps", "batch_size", "segment", "save_every", "sample_bytes", "lr"]
    for name, value in vars(args).items():
        if name in positive and not value > 0:
            fail(f"{name} must be above 0, got {value}")
        if isinstance(value, (int, float)) and not abs(value) < 2**31:
            fail(f"{name} must be between -2**31 and 2**31, got {value}")
    if args.batch_size % WORLD_SIZE:
        fail(f"batch_size must be divisible by {WORLD_SIZE} processes, got {args.batch_size}")
    if args.eval_mem_len is None:
        args.eval_mem_len = args.mem_len
    if args.eval_c_mem_len is None:
        args.eval_c_mem_len = args.c_mem_len
    try:
        config = Config(**{x.name: getattr(args, x.name) for x in MODEL_SETTINGS})
    except ValueError as error:
        fail(str(error))
    try:
        return config, replace(config, mem_len=args.eval_mem_len, c_mem_len=args.eval_c_mem_len)
    except ValueError as error:
        fail(f"eval_{error}")


def find_device(name: str) -> torch.device:
    if name == "auto":
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if name == "cuda" and LAUNCHED:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=name).item()  # the meta device has no numbers
    except Exception as error:  # torch raises many kinds
        fail(f"--device {name} cannot be used: {error}; try --device cpu")
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
            fail(f"--data {name} is no file or folder with text: name one")
        self.split = self.length - min(self.length // 10, 2**16)  # where held-out text begins
        held_out = hashlib.sha256(self.read(self.split, self.length))
        self.fingerprint = f"{self.length} {held_out.hexdigest()}"  # of two texts, seldom the same

    def read(self, start: int, end: int) -> bytes:
        self.file.seek(start)
        part = self.file.read(end - start)
        if len(part) < end - start:
            fail(f"{self.name} was cut short: it had {self.length} bytes")
        return part


def find_text(data: str) -> Text:
    """The text that `--data` names: a file is read where it stands, a folder is joined."""
    path = Path(data or os.devnull)  # an empty name is not the current folder's
    if data == "tinyshakespeare":
        path = fetch_tiny_shakespeare()
    if path.is_file():
        return Text(open(path, "rb", buffering=0), data)
    if data == "stdlib":
        paths = sorted(Path(sysconfig.get_path("stdlib")).glob("[!_]*.py"))
    else:
        paths = sorted(path.rglob("*"))
    for folder in filter(Path.is_dir, paths):
        os.listdir(folder)  # raises where it may not be read; rglob passes it over
    parts = [path.read_bytes() for path in paths if path.is_file()]
    return Text(BytesIO(b"".join(parts)), data)


def fetch_tiny_shakespeare() -> Path:
    path = Path("data/tinyshakespeare.txt")
    path.parent.mkdir(exist_ok=True)
    try:
        if not path.exists():
            torch.hub.download_url_to_file(URL, str(path), SHAKESPEARE_SHA256, progress=False)
    except (OSError, RuntimeError) as error:  # the latter if it is another text
        fail(f"{URL} could not be fetched: {error}; put it at {path}, or train on --data PATH")
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHAKESPEARE_SHA256:
        fail(f"{path} is not the whole of Tiny Shakespeare: delete it to fetch it again")
    return path


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file: whenever the machine stops, the old one or the new one stands there whole."""
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        fail(f"{path} could not be written: {error.strerror}; nothing was replaced")
    finally:
        part.unlink(missing_ok=True)


def load(path: Path) -> dict:
    """A checkpoint. It is data: no code of whatever the file holds is run."""
    with open(path, "rb") as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            CompressiveTransformer(Config(**state["config"])).load_state_dict(state["model"])
            if not state.keys() >= {"optimizer", "memory", "step", "text", "settings"}:
                raise KeyError
        except Exception:  # torch raises many kinds
            why = "it is truncated, something else, or more than data (no code of it was run)"
            fail(f"{path} is no checkpoint of train.py for this model: {why}")
    return state


# --------------------------------------------------------------------------------------- training


def learning_rate(args: Namespace, step: int) -> float:
    """Up in a line to the peak, then down to zero in another."""
    warmup = min(25, args.steps // 10)
    up = (step + 1) / (warmup + 1)
    down = (args.steps - step) / (args.steps - warmup)
    return args.lr * min(up, down)


def make_optimizer(model: CompressiveTransformer) -> torch.optim.Optimizer:
    """Adam, with a higher rate for attention's u and v."""
    biases = [p for name, p in model.named_parameters() if name.endswith("_bias")]
    others = [p for name, p in model.named_parameters() if not name.endswith("_bias")]
    groups = [{"params": others, "scale": 1.0}, {"params": biases, "scale": 10.0}]
    return torch.optim.Adam(groups, betas=(0.5, 0.95), fused=True)  # short means: steps are few


def to_tokens(rows: list[bytes], device: torch.device) -> Tensor:
    """Rows of bytes as tokens `[B, T]`."""
    tokens = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(len(rows), -1)
    if device.type == "cuda":
        tokens = tokens.pin_memory()  # only then does the host not wait for the copy
    return tokens.to(device, non_blocking=True).long()


def all_reduce(tensor: Tensor, op=dist.ReduceOp.SUM) -> Tensor:
    """Over the processes, in place."""
    if LAUNCHED:
        dist.all_reduce(tensor, op)
    return tensor


def gather_rows(slots: Tensor) -> Tensor:
    """The slots `[B, N, D]` of all processes' rows."""
    if not LAUNCHED:
        return slots
    parts = [torch.empty_like(slots) for _ in range(WORLD_SIZE)]
    dist.all_gather(parts, slots)
    return torch.cat(parts)


def train(
    args: Namespace, config: Config, text: Text, device: torch.device, state: dict | None
) -> tuple[dict, float]:
    """Train to the last step or a signal. Returns the last checkpoint, and tokens read a second."""
    if LAUNCHED:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(args.seed)
    model = CompressiveTransformer(config).to(device)
    for layer in model.layers:  # from the first step on, each head prefers distances of its own
        nn.init.normal_(layer.attention.position_bias, std=3.0)
    optimizer = make_optimizer(model)
    rows = args.batch_size // WORLD_SIZE
    mine = range(RANK * rows, (RANK + 1) * rows)  # this process's rows of the batch
    memory = model.initial_memory(rows)
    step = 0
    if state:
        model.load_state_dict(state["model"])
        try:
            optimizer.load_state_dict(state["optimizer"])
        except ValueError:
            fail(f"{args.out} was trained with another optimizer: it can only be evaluated")
        memory = state["memory"].map(lambda slots: slots[mine].to(device))
        step = state["step"]
    parallel = model
    if args.compile:
        torch._dynamo.config.recompile_limit = 32  # a few are needed until memory is full
        model.compile()
    if LAUNCHED:  # without find_unused_parameters, rounding changes after the first step
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)

    if RANK == 0:
        if not state and any(args.out.glob("[!.]*")):  # looked at just before it is written to
            fail(f"--out {args.out} is not empty: name a new folder, so that no run is lost")
        args.out.mkdir(parents=True, exist_ok=True)
        metrics = args.out / "metrics.jsonl"
        metrics.touch(exist_ok=state is not None)  # of two runs at once, one has the folder
        lines = metrics.read_bytes().splitlines(keepends=True)
        write_atomically(metrics, b"".join(lines[:step]))  # those after the checkpoint go
        parameters = sum(p.numel() for p in model.parameters())
        about = f"{text.length:,} bytes of {args.data}; {parameters:,} parameters; {device.type}"
        print(printable(f"{about}, {args.dtype}; results in {args.out}"))

    received = [0]  # the signals' numbers

    def receive(number, frame):
        received.append(number)
        if not LAUNCHED:  # torchrun passes on a Ctrl-C that the terminal has sent us already
            signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once

    signal.signal(signal.SIGINT, receive)
    signal.signal(signal.SIGTERM, receive)
    row_length = (text.split - 1) // args.batch_size  # its last target is the next row's first byte
    segments = math.ceil(row_length / args.segment)  # of a pass over the text
    every = max(1, min(args.steps // 40, 50))
    losses = []  # of each step since the last record
    began = time.perf_counter()
    tokens_read = 0
    while True:  # report and save what was done, then, unless this is the end, do a step
        stop = all_reduce(torch.tensor(max(received)), dist.ReduceOp.MAX).item()
        last = stop or step == args.steps
        saving = last or step % args.save_every == 0
        if losses and (saving or step % every == 0):
            means = all_reduce(torch.stack(losses) / WORLD_SIZE)
            if not means.isfinite().all():
                fail(f"the loss or its gradient is not finite after step {step - len(losses)}", 1)
            losses = []
            if RANK == 0:
                report(args, step, means, tokens_read / (time.perf_counter() - began))
        if saving:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "memory": memory.map(gather_rows),
                "step": step,
                "text": text.fingerprint,
                "config": asdict(config),
                "settings": {k: v for k, v in vars(args).items() if k not in ACTIONS},
            }
            if RANK == 0:
                file = BytesIO()
                torch.save(state, file)
                write_atomically(args.out / "checkpoint.pt", file.getbuffer())
        if last:
            break

        # A step. The host waits for no device; what is drawn depends on seed, step and process.
        torch.manual_seed((args.seed * args.steps + step) * WORLD_SIZE + RANK)
        begin = step % segments * args.segment
        end = min(begin + args.segment, row_length)
        parts = [text.read(row * row_length + begin, row * row_length + end + 1) for row in mine]
        tokens = to_tokens(parts, device)
        if begin == 0:  # the rows begin, or begin anew
            memory = model.initial_memory(rows)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            output = parallel(tokens[:, :-1], memory)
        memory = output.memory
        logits = output.logits.flatten(0, 1).float()
        targets = tokens[:, 1:].flatten()
        loss = F.cross_entropy(logits, targets)
        (loss + output.compression_loss).backward()
        values = [loss, *output.compression_losses]
        for group in model.parameter_groups():  # jointly, either would scale the other down
            norm = nn.utils.clip_grad_norm_(group, 1.0)
            values.append(norm.to(device, non_blocking=True))  # of no gradients, it is on the CPU
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * learning_rate(args, step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(torch.stack(values).detach())
        tokens_read += args.batch_size * (end - begin)
        step += 1

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    stop = max(stop, *received)  # a signal may have come while the last checkpoint was written
    speed = tokens_read / (time.perf_counter() - began)
    if RANK == 0 and sys.stdout.isatty():
        print()
    if LAUNCHED:
        all_reduce(torch.zeros(1))  # or a process that ends breaks off what another still reads
        del parallel  # if it ends after the group, it can wait for a thread that waits for it
        dist.destroy_process_group()
    if stop:
        out = shlex.quote(str(args.out))
        fail(f"stopped after step {step}; to go on: --resume {out}", 128 + stop)
    return state, speed


def report(args: Namespace, end: int, means: Tensor, speed: float) -> None:
    """Add a line for each of the last steps to metrics.jsonl, and show their mean."""
    with open(args.out / "metrics.jsonl", "a") as file:
        for step, losses in enumerate(means.tolist(), end - len(means)):
            nats, *layers, norm, _ = losses  # the last, of f_c's gradient, need only be finite
            record = {
                "step": step + 1,
                "bpc": nats * BITS,
                "compression_loss": fmean(layers),
                "compression_loss_of_layers": layers,
                "gradient_norm": norm,
                "lr": learning_rate(args, step),
            }
            file.write(json.dumps(record) + "\n")
    nats, *layers, _, _ = means.mean(dim=0).tolist()
    left = (args.steps - end) * args.batch_size * args.segment / speed
    line = (
        f"step {end:>{len(str(args.steps))}}/{args.steps}  bpc {nats * BITS:.3f}  "
        f"compression loss {fmean(layers):.4f}  {speed:,.0f} tokens/s  {left:.0f} s left"
    )
    if sys.stdout.isatty():  # over the line before, and no longer than the terminal is wide
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{line[:width]}\x1b[K", end="", flush=True)
    else:
        try:
            print(line)
        except OSError:  # Ctrl-C ends `| tee log`, too, or the disk is full: the run goes on
            sys.stdout = open(os.devnull, "w")


# --------------------------------------------------------------------- evaluation, samples, main


def evaluate(model: CompressiveTransformer, text: Text, segment: int) -> float:
    """Bits per character of the held-out text, in eight rows (all but up to seven last bytes)."""
    held_out = to_tokens([text.read(text.split - 1, text.length)], model.logits.weight.device)[0]
    row_length = max(1, (len(held_out) - 1) // 8)
    rows = held_out.unfold(0, row_length + 1, row_length)  # each ends with the next one's first
    memory = None
    nats = 0.0
    for start in range(0, row_length, segment):
        tokens = rows[:, start : start + segment + 1]
        output = model(tokens[:, :-1], memory, need_loss=False)
        memory = output.memory
        logits = output.logits.flatten(0, 1).float()
        nats += F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum")
    return float(nats) * BITS / (len(rows) * row_length)


def sample(model: CompressiveTransformer, text: Text, args: Namespace) -> str:
    """A prompt and its continuation."""
    held_out = text.read(text.split, min(text.split + 64, text.length))
    prompt = os.fsencode(args.prompt) or held_out
    torch.manual_seed(time.time_ns() if args.sample else args.seed)  # --sample: another each time
    tokens = to_tokens([prompt], model.logits.weight.device)
    tokens = model.generate(tokens, args.sample_bytes, temperature=0.8)
    continuation = bytes(tokens[0, len(prompt) :].tolist()).decode(errors="replace")
    begin = prompt.decode(errors="replace")
    return printable(f"--- prompt\n{begin}\n--- continuation\n{continuation}\n---\n", keep="\n\t")


def draw(out: Path) -> None:
    """Draw run.png from metrics.jsonl."""
    from matplotlib.figure import Figure

    with open(out / "metrics.jsonl") as file:
        records = [json.loads(line) for line in file]
    steps = [record["step"] for record in records]
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, compression = figure.subplots(1, 2)
    loss.plot(steps, [record["bpc"] for record in records])
    loss.set(title="training loss", xlabel="step", ylabel="bits per character")
    compression.plot(steps, [record["compression_loss_of_layers"] for record in records])
    compression.set(title="compression loss of each layer", xlabel="step", ylabel="mean square")
    compression.legend(range(1, len(compression.lines) + 1), title="layer")
    figure.savefig(out / "run.png", dpi=120)


def run(args: Namespace, state: dict | None) -> None:
    """Do what the options say."""
    began = time.perf_counter()
    config, eval_config = make_configs(args)
    device = find_device(args.device)
    if args.dtype == "auto":
        args.dtype = "bfloat16" if has_bfloat16(device) else "float32"
    text = find_text(args.data)
    if text.length < 20 * args.batch_size:  # or a row may have no byte to predict
        fail(f"--data {args.data} is too short for {args.batch_size} rows: name a longer text")
    if state and state["text"] != text.fingerprint:
        fail(f"--data {args.data} is another text than the one that {args.out} was trained on")
    training = not (args.eval_only or args.sample)
    if training:
        state, speed = train(args, config, text, device, state)
    if RANK > 0:
        return
    model = CompressiveTransformer(eval_config).to(device).eval()
    model.load_state_dict(state["model"])
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    with torch.inference_mode(), autocast:
        if training or args.sample:
            written = sample(model, text, args)
            print(written, end="")
        if training or args.eval_only:
            bpc = evaluate(model, text, args.segment)
    if not training:
        if args.eval_only:
            print(f"val_bpc={bpc:.4f}")
        return
    write_atomically(args.out / "sample.txt", written.encode())
    try:
        draw(args.out)
        print("picture in", printable(args.out / "run.png"))
    except Exception as error:  # no picture is worth a result
        print("no run.png:", printable(error))
    seconds = time.perf_counter() - began
    print(f"val_bpc={bpc:.4f} tokens_per_second={speed:.0f} seconds={seconds:.1f}")


def main(argv: list[str] | None = None) -> None:
    try:
        run(*parse(argv))
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except OSError as error:
        fail(f"{error.filename or 'writing'}: {error.strerror or error}")
    except MemoryError:  # Python's, for the text of a folder
        fail("out of memory: name one file for --data, which is read where it stands")
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        fail(f"{error}; lower --batch-size, --segment or --d-model")


if __name__ == "__main__":
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where it is closed
    sys.stdout.reconfigure(errors="replace", line_buffering=True)  # for any terminal, and a log
    main()
