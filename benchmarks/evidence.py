# SPDX-License-Identifier: MIT
"""What compressed memory is good for: the paper's claims, measured on two cores.

    python benchmarks/evidence.py                   all of benchmarks/evidence.md and its pictures
    python benchmarks/evidence.py --parts recall    one part
    python benchmarks/evidence.py --quick           few seeds and steps, into runs/evidence

Part recall: a stream in which keys are given values and asked for them later, after a distance that
is drawn. Part text: bits per character on two texts, and of words by how far back they stood last.
Each training run is a line of evidence.jsonl as soon as it ends; one whose line is there is not run
again, so that the script can be stopped and started at any time. All tables and pictures are made
from that file.
"""

import argparse
import bisect
import heapq
import itertools
import json
import math
import os
import platform
import random
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.evidence_report import write  # noqa: E402
from compressive import CompressiveTransformer, Config, Output  # noqa: E402
from train import find_text  # noqa: E402

# ------------------------------------------------------------------------------- what is compared


@dataclass(frozen=True, eq=False)
class Job:
    """One model to train and to measure."""

    part: str  # "recall", or "text"
    data: str  # for text, which
    arm: str  # what is compared, a row of the tables
    seed: int
    steps: int  # of the optimiser
    batch_size: int
    segments: int  # in a step, through which gradients flow: more than one for bptt
    measured: int  # tokens that it is measured on
    config: dict  # of the model


SEGMENT = 32
RATE = 4  # c

# What an arm changes in the settings. Sixty-four slots each; the ceiling alone has more.
RECALL_ARMS = {
    "Transformer-XL, 64 slots": {"mem_len": 64, "c_mem_len": 0},
    "Transformer-XL, 160 slots": {"mem_len": 160, "c_mem_len": 0},
    "convolution, attention loss": {},
    "convolution, auto-encoding loss": {"compression_loss": "autoencoding"},
    "convolution, never trained": {"compression_loss": "none"},
    "convolution, BPTT alone": {"compression_loss": "none", "bptt": True},
    "dilated convolution, attention loss": {"compression": "dilated_conv"},
    "most-used": {"compression": "most_used"},
    "mean pooling": {"compression": "mean_pool"},
    "max pooling": {"compression": "max_pool"},
}

# Ninety-six slots each.
TEXT_ARMS = {
    "Transformer-XL, 96 slots": {"mem_len": 96, "c_mem_len": 0},
    "Compressive, 48 + 48": {"mem_len": 48, "c_mem_len": 48},
    "Compressive, 64 + 32": {"mem_len": 64, "c_mem_len": 32},
}
TEXTS = ("stdlib", "tinyshakespeare")
PARTS = ("recall", "text")


def make_jobs(parts: list[str], texts: list[str], quick: bool, steps: int | None) -> list[Job]:
    """The arms of a seed stand together, so that a script that was stopped has whole seeds."""
    jobs = []
    if "recall" in parts:
        for seed in range(2 if quick else 5):
            for arm, changes in RECALL_ARMS.items():
                jobs.append(recall_job(arm, changes, seed, quick, steps))
    if "text" in parts:
        for seed in range(2 if quick else 3):
            for data in texts:
                for arm, changes in TEXT_ARMS.items():
                    jobs.append(text_job(data, arm, changes, seed, quick, steps))
    return jobs


def recall_job(arm: str, changes: dict, seed: int, quick: bool, steps: int | None) -> Job:
    config = {
        "vocab_size": VOCABULARY,
        "d_model": 64,
        "n_heads": 8,
        "n_layers": 2,
        "d_ff": 256,
        "mem_len": 32,
        "c_mem_len": 32,
        "compression_rate": RATE,
        **changes,
    }
    batch_size = 16
    segments = 1
    if config.get("bptt"):  # as many tokens in a step as the others, but of a longer stretch
        batch_size = 4
        segments = 4
    return Job(
        part="recall",
        data="",
        arm=arm,
        seed=seed,
        steps=steps or (200 if quick else 2000),
        batch_size=batch_size,
        segments=segments,
        measured=2**12 if quick else 2**17,
        config=config,
    )


def text_job(data: str, arm: str, changes: dict, seed: int, quick: bool, steps: int | None) -> Job:
    config = {
        "vocab_size": 256,
        "d_model": 128,
        "n_heads": 4,
        "n_layers": 2,
        "d_ff": 512,
        "compression_rate": RATE,
        **changes,
    }
    return Job(
        part="text",
        data=data,
        arm=arm,
        seed=seed,
        steps=steps or (200 if quick else 2000),
        batch_size=16,
        segments=1,
        measured=2**12 if quick else 2**16,
        config=config,
    )


# ---------------------------------------------------------------------------------- one training


def run(job: Job) -> dict:
    """Train a model and measure it: a line of evidence.jsonl."""
    began = time.perf_counter()
    torch.set_num_threads(1)  # the other processes have the other cores
    torch.manual_seed(job.seed)  # arms with the same parameters begin with the same weights
    model = CompressiveTransformer(Config(**job.config))
    if job.part == "recall":
        tokens, _, targets = recall_rows(job.seed, job.batch_size, job.steps * job.segments)
        train(model, tokens, targets, job)
        result = measure_recall(model, job.measured)
    else:
        text = find_text(job.data)
        tokens = text_rows(text.read(0, text.split), job)
        losses = train(model, tokens[:, :-1], tokens[:, 1:], job)
        held_out = text.read(text.split, text.length)
        result = measure_text(model, held_out[: job.measured])
        result["compression_losses"] = losses
    seconds = time.perf_counter() - began
    return {**asdict(job), "seconds": seconds, "machine": machine(), **result}


def train(model: CompressiveTransformer, tokens: Tensor, targets: Tensor, job: Job) -> list:
    """Train on rows of text `[B, N]`; returns the compression losses of the layers, averaged over
    each twentieth of the steps."""
    peak = 3e-3
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak, job.steps, pct_start=0.1, cycle_momentum=False
    )
    memory = None
    history = []
    at = 0
    for _ in range(job.steps):
        losses = []
        for _ in range(job.segments):
            segment = slice(at, at + SEGMENT)
            at += SEGMENT
            output = model(tokens[:, segment], memory)
            memory = output.memory
            loss = mean_cross_entropy(output.logits, targets[:, segment])
            losses.append(loss + output.compression_loss)
        torch.stack(losses).mean().backward()
        memory = memory.detach()  # with bptt they have a graph
        for group in model.parameter_groups():
            nn.utils.clip_grad_norm_(group, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        history.append(output.compression_losses.detach())
    parts = torch.stack(history).chunk(20)
    return [part.mean(dim=0).tolist() for part in parts]


def mean_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Over the targets that count; zero if there are none."""
    counted = (targets != NOT_COUNTED).sum()
    total = F.cross_entropy(logits.mT, targets, ignore_index=NOT_COUNTED, reduction="sum")
    return total / counted.clamp(min=1)


@torch.no_grad()
def stream(
    model: CompressiveTransformer, tokens: Tensor, need_weights: bool = False
) -> Iterator[Output]:
    """The model's outputs over rows `[B, N]`, segment by segment."""
    model.eval()
    memory = None
    for segment in tokens.split(SEGMENT, dim=1):
        output = model(segment, memory, need_loss=False, need_weights=need_weights)
        memory = output.memory
        yield output


# ------------------------------------------------------------------------------------ part recall

# A symbol each for: nothing; key and value, written; key, asked for; value, the answer.
KEYS = 8
VALUES = 4
WRITE = 1
QUERY = WRITE + KEYS * VALUES
ANSWER = QUERY + KEYS
VOCABULARY = ANSWER + VALUES
NEAREST = 4  # distance from write to query
FURTHEST = 640
NOT_COUNTED = -100
BIN = 8  # distances are counted in bins of this width


def recall_row(generator: random.Random, length: int) -> tuple[list[int], list[int]]:
    """Symbols, and at each query how far back its key was written (else 0).

    One symbol in eight is a write, if a key is free. It is asked for once, after a distance drawn
    log-uniformly (or, where another query stands there, right behind that). Then its key is free.
    """
    symbols = [0] * length
    distances = [0] * length
    free = list(range(KEYS))
    due: list[tuple[int, int, int, int]] = []  # place of the query, key, value, place of the write
    at = 0
    while at < length - 1:
        if due and due[0][0] <= at:
            _, key, value, written = heapq.heappop(due)
            symbols[at] = QUERY + key
            symbols[at + 1] = ANSWER + value
            distances[at] = at - written
            free.append(key)
            at += 2
            continue
        if free and generator.random() < 1 / 8:
            key = free.pop(generator.randrange(len(free)))
            value = generator.randrange(VALUES)
            symbols[at] = WRITE + key * VALUES + value
            distance = math.exp(generator.uniform(math.log(NEAREST), math.log(FURTHEST)))
            heapq.heappush(due, (at + round(distance), key, value, at))
        at += 1
    return symbols, distances


def recall_rows(seed: int, rows: int, segments: int) -> tuple[Tensor, Tensor, Tensor]:
    """Symbols, distances and targets, `[rows, segments * SEGMENT]`: only answers are targets."""
    generator = random.Random(seed)
    pairs = [recall_row(generator, segments * SEGMENT + 1) for _ in range(rows)]
    symbols = torch.tensor([symbols for symbols, _ in pairs])
    distances = torch.tensor([distances for _, distances in pairs])[:, :-1]
    targets = symbols[:, 1:].masked_fill(distances == 0, NOT_COUNTED)
    return symbols[:, :-1], distances, targets


def measure_recall(model: CompressiveTransformer, tokens: int) -> dict:
    """How many answers were asked for, and how many right, in every bin of distances."""
    segments = 64
    rows = tokens // (segments * SEGMENT)
    symbols, distances, targets = recall_rows(10**6, rows, segments)  # no training has this seed
    logits = torch.cat([output.logits for output in stream(model, symbols)], dim=1)
    asked = distances > 0
    asked[:, : FURTHEST + SEGMENT] = False  # until then the near ones are more than their share
    bins = distances[asked] // BIN
    right = logits[..., ANSWER:].argmax(dim=-1)[asked] + ANSWER == targets[asked]
    count = FURTHEST // BIN
    return {
        "values": VALUES,
        "bin": BIN,
        "asked": bins.bincount(minlength=count).tolist(),
        "right": bins[right].bincount(minlength=count).tolist(),
    }


# -------------------------------------------------------------------------------------- part text

C_MEM_LENS = (0, 16, 32, 48, 64, 96, 192)  # in evaluation
AGE_BIN = 8  # slots are counted in bins of this width
WORD = re.compile(rb"[A-Za-z_]\w{2,}")
REPEATS = (32, 64, 96, 128, 192, 256, 512, 1024, 4096)  # edges of the buckets of distances


def text_rows(data: bytes, job: Job) -> Tensor:
    """`[B, N + 1]`: each row begins at a place of its own in the text, which the seed moves."""
    length = job.steps * SEGMENT + 1
    first = random.Random(job.seed).randrange(len(data))
    starts = first + torch.arange(job.batch_size) * (len(data) // job.batch_size)
    places = (starts[:, None] + torch.arange(length)) % len(data)
    return to_tokens(data)[places]


def to_tokens(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()


def measure_text(model: CompressiveTransformer, data: bytes) -> dict:
    """Bits of held-out text, in eight rows: in all, of words by how far back they stood last, for
    other lengths of compressed memory; and where attention goes."""
    length = len(data) // 8
    rows = [data[row * length : (row + 1) * length] for row in range(8)]
    tokens = torch.stack([to_tokens(row) for row in rows])
    bits = bits_of(model, tokens)
    result = {"bpc": bits.mean().item(), "words": bits_of_words(bits, rows)}
    if model.config.c_mem_len > 0:
        beginnings = tokens[:, :4096]
        result["bpc_of_c_mem_len"] = bpc_of_c_mem_len(model, beginnings)
        result["age_bin"] = AGE_BIN
        result["attention"] = attention_by_age(model, beginnings)
    return result


def bits_of(model: CompressiveTransformer, tokens: Tensor) -> Tensor:
    """What each token but the first costs: `[B, N] -> [B, N - 1]`."""
    parts = []
    targets = tokens[:, 1:].split(SEGMENT, dim=1)
    for output, target in zip(stream(model, tokens[:, :-1]), targets, strict=True):
        parts.append(F.cross_entropy(output.logits.mT, target, reduction="none"))
    return torch.cat(parts, dim=1) / math.log(2)


def bits_of_words(bits: Tensor, rows: list[bytes]) -> dict[str, list[float]]:
    """For each bucket of distances to where the word stood last: its bits, its bytes."""
    totals = {name: [0.0, 0] for name in bucket_names()}
    for row, bits_of_row in zip(rows, bits, strict=True):
        last: dict[bytes, int] = {}
        for match in WORD.finditer(row):
            word = match.group()
            start = match.start()
            if start > 0:  # the first byte is nobody's to predict
                total = totals[bucket(start - last[word] if word in last else None)]
                total[0] += bits_of_row[start - 1 : match.end() - 1].sum().item()
                total[1] += len(word)
            last[word] = start
    return totals


def bucket_names() -> list[str]:
    edges = (0, *REPEATS)
    names = [f"{low}-{high}" for low, high in itertools.pairwise(edges)]
    return [*names, f"{REPEATS[-1]} or more", "not before"]


def bucket(distance: int | None) -> str:
    names = bucket_names()
    if distance is None:
        return names[-1]
    return names[bisect.bisect_right(REPEATS, distance)]


def bpc_of_c_mem_len(model: CompressiveTransformer, tokens: Tensor) -> dict[str, float]:
    result = {}
    for c_mem_len in C_MEM_LENS:
        config = {**asdict(model.config), "c_mem_len": c_mem_len}
        other = CompressiveTransformer(Config(**config))
        other.load_state_dict(model.state_dict())
        result[str(c_mem_len)] = bits_of(other, tokens).mean().item()
    return result


def attention_by_age(model: CompressiveTransformer, tokens: Tensor) -> list[list[float]]:
    """For each layer the mean weight of a slot, from the oldest bin of compressed memory to the
    newest of the segment, once the memories are full."""
    sums = 0
    count = 0
    full = model.config.c_mem_len + model.config.mem_len + SEGMENT
    for output in stream(model, tokens, need_weights=True):
        weights = torch.stack(output.attention_weights)  # [L, B, H, T, S]
        if weights.size(-1) == full:
            sums += weights.mean(dim=(1, 2, 3))
            count += 1
    of_slots = sums / count
    return of_slots.unflatten(-1, (-1, AGE_BIN)).mean(dim=-1).tolist()


# ---------------------------------------------------------------------------- running, file, time


def machine() -> str:
    """The processor's name where Linux tells it, and torch's version."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:  # another system
        pass
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}"


def results_of(jobs: list[Job], path: Path) -> dict[Job, dict]:
    """The jobs whose line is in the file. A line that was cut off is none."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    done = {}
    for job in jobs:
        for record in records:
            if all(record.get(name) == value for name, value in asdict(job).items()):
                done[job] = record
    return done


def run_all(jobs: list[Job], path: Path, processes: int) -> dict[Job, dict]:
    """Run what the file lacks, each job on one core, and add it there."""
    done = results_of(jobs, path)
    missing = [job for job in jobs if job not in done]
    if not missing:
        return done
    began = time.perf_counter()
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        futures = {pool.submit(run, job): job for job in missing}
        for count, future in enumerate(as_completed(futures), start=1):
            job = futures[future]
            record = future.result()
            done[job] = record
            with open(path, "a") as file:
                file.write("\n" + json.dumps(record))  # ends a line that was cut off, too
            spent = time.perf_counter() - began
            left = spent / count * (len(missing) - count)
            what = f"{job.part} {job.data}".strip()
            print(
                f"{len(done)}/{len(jobs)}  {what}, {job.arm}, seed {job.seed}: "
                f"{record['seconds']:.0f} s; about {left / 60:.0f} min left",
                flush=True,
            )
    return done


# ------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description="What compressed memory is good for, measured.")
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to run and to show")
    add("--texts", nargs="+", choices=TEXTS, default=TEXTS, help="for part text")
    add("--quick", action="store_true", help="two seeds, a tenth of the steps")
    add("--steps", type=int, help="of each training, instead of those that belong to it")
    add("--out", type=Path, help="folder of the results; by default benchmarks, or runs/evidence")
    add("--processes", type=int, default=os.cpu_count(), help="runs at a time, a core each")
    args = parser.parse_args()
    out = args.out or Path("runs/evidence" if args.quick else "benchmarks")
    if args.processes < 1:
        parser.error(f"--processes must be at least 1, got {args.processes}")
    if args.steps is not None and args.steps < 20:
        parser.error(f"--steps must be at least 20, got {args.steps}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if "text" in args.parts:
            for data in args.texts:
                find_text(data)  # fetched here, before two runs fetch it at a time
        jobs = make_jobs(args.parts, args.texts, args.quick, args.steps)
        done = run_all(jobs, out / "evidence.jsonl", args.processes)
        write([done[job] for job in jobs], out)
    except KeyboardInterrupt:
        sys.exit("evidence.py: stopped; the same command goes on where it was")
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")


if __name__ == "__main__":
    main()
