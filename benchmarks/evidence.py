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
import heapq
import json
import math
import os
import platform
import random
import re
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

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
    config: dict  # of the model


SEGMENT = 32
RATE = 4  # c

# What an arm changes in Config. Sixty-four slots each, but for the ceiling.
XL = "Transformer-XL, 64 slots"
XL_CEILING = "Transformer-XL, 160 slots"
CONV = "convolution, attention loss"
RECALL_ARMS = {
    XL: {"mem_len": 64, "c_mem_len": 0},
    XL_CEILING: {"mem_len": 160, "c_mem_len": 0},
    CONV: {},
    "convolution, auto-encoding loss": {"compression_loss": "autoencoding"},
    "convolution, never trained": {"compression_loss": "none"},
    "convolution, BPTT alone": {"compression_loss": "none", "bptt": True},
    "dilated convolution, attention loss": {"compression": "dilated_conv"},
    "dilated convolution, auto-encoding loss": {
        "compression": "dilated_conv",
        "compression_loss": "autoencoding",
    },
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
COMPRESSIVE_TEXT_ARMS = list(TEXT_ARMS)[1:]
TEXTS = ("stdlib", "tinyshakespeare")
TEXT_LAYERS = 2
PARTS = ("recall", "text")


def make_jobs(parts: list[str], quick: bool) -> list[Job]:
    """The arms of a seed stand together, so that a script that was stopped has whole seeds."""
    jobs = []
    for seed in range(2 if quick else 5):
        if "recall" in parts:
            for arm, changes in RECALL_ARMS.items():
                jobs.append(recall_job(arm, changes, seed, steps=20 if quick else 3000))
        if "text" in parts:
            for data in TEXTS:
                for arm, changes in TEXT_ARMS.items():
                    jobs.append(text_job(data, arm, changes, seed, steps=20 if quick else 2000))
    return jobs


def recall_job(arm: str, changes: dict, seed: int, steps: int) -> Job:
    config = {
        "vocab_size": VOCABULARY,
        "d_model": 64,
        "n_heads": 4,
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
    return Job("recall", "", arm, seed, steps, batch_size, segments, config)


def text_job(data: str, arm: str, changes: dict, seed: int, steps: int) -> Job:
    config = {
        "vocab_size": 256,
        "d_model": 128,
        "n_heads": 4,
        "n_layers": TEXT_LAYERS,
        "d_ff": 512,
        "compression_rate": RATE,
        **changes,
    }
    return Job("text", data, arm, seed, steps, 16, 1, config)


# ---------------------------------------------------------------------------------- one training


def run(job: Job) -> dict:
    """Train a model and measure it: a line of evidence.jsonl."""
    began = time.perf_counter()
    torch.set_num_threads(1)  # the other processes have the other cores
    torch.manual_seed(job.seed)  # arms of a seed begin with the same weights
    model = CompressiveTransformer(Config(**job.config))
    if job.part == "recall":
        tokens, _, targets = recall_rows(job.seed, job.batch_size, job.steps * job.segments)
        train(model, tokens, targets, job)
        result = measure_recall(model)
    else:
        text = find_text(job.data)
        tokens = text_rows(text.read(0, text.split), job)
        losses = train(model, tokens[:, :-1], tokens[:, 1:], job)
        result = measure_text(model, text.read(text.split, text.length))
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


def measure_recall(model: CompressiveTransformer) -> dict:
    """How many answers were asked for, and how many right, in every bin of distances."""
    symbols, distances, targets = recall_rows(seed=10**6, rows=64, segments=64)
    logits = torch.cat([output.logits for output in stream(model, symbols)], dim=1)
    asked = distances > 0
    asked[:, : FURTHEST + SEGMENT] = False  # until then the near ones are more than their share
    bins = distances[asked] // BIN
    right = logits[..., ANSWER:].argmax(dim=-1)[asked] + ANSWER == targets[asked]
    count = FURTHEST // BIN
    return {
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
    names = [f"{low}-{high}" for low, high in zip(edges, edges[1:], strict=False)]
    return [*names, f"{REPEATS[-1]} or more", "not before"]


def bucket(distance: int | None) -> str:
    names = bucket_names()
    if distance is None:
        return names[-1]
    passed = [edge for edge in REPEATS if distance >= edge]
    return names[len(passed)]


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
                file.write(json.dumps(record) + "\n")
            spent = time.perf_counter() - began
            left = spent / count * (len(missing) - count)
            what = f"{job.part} {job.data}".strip()
            print(
                f"{len(done)}/{len(jobs)}  {what}, {job.arm}, seed {job.seed}: "
                f"{record['seconds']:.0f} s; about {left / 60:.0f} min left",
                flush=True,
            )
    return done


# ----------------------------------------------------------------------------------------- tables

# Of Student's distribution, by the number of values less one: 95% lie within so many errors.
T95 = (math.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
PAPER = {  # bits per character on enwik8, Table 5
    CONV: 0.973,
    "dilated convolution, attention loss": 0.977,
    "most-used": 0.980,
    "mean pooling": 0.982,
    "convolution, auto-encoding loss": 0.984,
    "max pooling": 0.986,
    "convolution, BPTT alone": 0.996,
}
RECALL_EDGES = (0, 16, 32, 64, 96, 128, 160, 192, 256, 384, 640)
RECALL_PICTURE = (XL_CEILING, CONV, "convolution, auto-encoding loss", XL)
END = "<!-- end -->"
BEYOND = (96, 160)  # further than 64 slots and a segment reach, as far as 32 + 4 * 32 do


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95% interval, over the seeds."""
    count = len(values)
    if count < 2:
        return values[0], math.nan
    return statistics.mean(values), T95[count - 1] * statistics.stdev(values) / math.sqrt(count)


def shown(values: list[float], digits: int) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def signed(values: list[float], digits: int) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:+.{digits}f} ± {error:.{digits}f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def differences(values: list[float], of: list[float]) -> list[float]:
    """Seed by seed."""
    return [value - other for value, other in zip(values, of, strict=True)]


class Results:
    """What the finished jobs found, by part, text and arm: one record a seed, in their order."""

    def __init__(self, done: dict[Job, dict]) -> None:
        self.records = sorted(done.values(), key=lambda record: record["seed"])

    def of(self, part: str, arm: str = "", data: str = "") -> list[dict]:
        chosen = []
        for record in self.records:
            if record["part"] != part:
                continue
            if arm in ("", record["arm"]) and data in ("", record["data"]):
                chosen.append(record)
        return chosen


def accuracy(record: dict, low: int, high: int) -> float:
    """Of answers at distances from low to high."""
    bins = slice(low // BIN, high // BIN)
    return sum(record["right"][bins]) / max(1, sum(record["asked"][bins]))


def accuracies(results: Results, arm: str, low: int, high: int) -> list[float]:
    return [accuracy(record, low, high) for record in results.of("recall", arm)]


def recall_table(results: Results) -> str:
    ranges = list(zip(RECALL_EDGES, RECALL_EDGES[1:], strict=False))
    rows = []
    for arm in RECALL_ARMS:
        cells = [shown(accuracies(results, arm, low, high), 2) for low, high in ranges]
        rows.append([arm, *cells])
    return table(["accuracy at distance", *(f"{low}-{high}" for low, high in ranges)], rows)


def order_table(results: Results) -> str:
    """The functions and losses in the order of the paper's Table 5, each compared seed by seed with
    all that stand below it there."""
    rows = []
    arms = list(PAPER)
    for place, arm in enumerate(arms):
        values = accuracies(results, arm, *BEYOND)
        better = 0
        worse = 0
        for other in arms[place + 1 :]:
            gains = differences(values, accuracies(results, other, *BEYOND))
            mean, error = mean_and_error(gains)
            better += mean > error
            worse += -mean > error
        below = len(arms) - place - 1
        undecided = below - better - worse
        cells = [f"{PAPER[arm]:.3f}", shown(values, 2), str(better), str(worse), str(undecided)]
        rows.append([arm, *cells])
    low, high = BEYOND
    header = ["", "bits per character, paper", f"accuracy at {low}-{high} here"]
    header += ["of those below: worse here, too", "better here", "undecided"]
    return table(header, rows)


def bpcs(results: Results, data: str, arm: str) -> list[float]:
    return [record["bpc"] for record in results.of("text", arm, data)]


def bits_a_byte(results: Results, data: str, arm: str, bucket: str) -> list[float]:
    values = []
    for record in results.of("text", arm, data):
        bits, count = record["words"][bucket]
        values.append(bits / max(1, count))
    return values


def text_table(results: Results) -> str:
    baseline = next(iter(TEXT_ARMS))
    rows = []
    for data in TEXTS:
        of_baseline = bpcs(results, data, baseline)
        for arm in TEXT_ARMS:
            values = bpcs(results, data, arm)
            gain = signed(differences(values, of_baseline), 4)
            rows.append([data, arm, shown(values, 3), gain])
    return table(["text", "arm", "bits per character", f"less {baseline}, seed by seed"], rows)


def repeats_table(results: Results) -> str:
    """Bits per byte of words, less those of the first arm, by how far back they stood last."""
    baseline, *others = TEXT_ARMS
    rows = []
    for name in bucket_names():
        cells = [name]
        for data in TEXTS:
            words = results.of("text", baseline, data)[0]["words"]
            share = words[name][1] / sum(count for _, count in words.values())
            cells.append(f"{share:.0%}")
            for arm in others:
                cells.append(signed(gains_on_words(results, data, arm, name), 3))
        rows.append(cells)
    header = ["bytes back"]
    for data in TEXTS:
        header += [f"{data}: share of words' bytes", *others]
    return table(header, rows)


def gains_on_words(results: Results, data: str, arm: str, bucket: str) -> list[float]:
    baseline = next(iter(TEXT_ARMS))
    of_baseline = bits_a_byte(results, data, baseline, bucket)
    return differences(bits_a_byte(results, data, arm, bucket), of_baseline)


def c_mem_len_gains(results: Results, data: str, arm: str, c_mem_len: int) -> list[float]:
    trained = str(TEXT_ARMS[arm]["c_mem_len"])
    gains = []
    for record in results.of("text", arm, data):
        bpc = record["bpc_of_c_mem_len"]
        gains.append(bpc[str(c_mem_len)] - bpc[trained])
    return gains


def c_mem_len_table(results: Results) -> str:
    """Tables 8 and 9: bits per character with another c_mem_len, less those with the trained."""
    rows = []
    for data in TEXTS:
        for arm in COMPRESSIVE_TEXT_ARMS:
            cells = []
            for c_mem_len in C_MEM_LENS:
                cells.append(signed(c_mem_len_gains(results, data, arm, c_mem_len), 3))
            rows.append([data, arm, *cells])
    return table(["text", "arm", *map(str, C_MEM_LENS)], rows)


def attention_table(results: Results) -> str:
    """Figure 2: does attention rise from the oldest memory to what is older and compressed?"""
    rows = []
    for data in TEXTS:
        for arm in COMPRESSIVE_TEXT_ARMS:
            records = results.of("text", arm, data)
            newest = TEXT_ARMS[arm]["c_mem_len"] // AGE_BIN - 1  # bin of compressed memory
            for layer in range(TEXT_LAYERS):
                ages = [record["attention"][layer] for record in records]
                compressed = [1000 * age[newest] for age in ages]
                oldest = [1000 * age[newest + 1] for age in ages]
                ratios = [a / b for a, b in zip(compressed, oldest, strict=True)]
                cells = [shown(compressed, 2), shown(oldest, 2), shown(ratios, 2)]
                rows.append([data, arm, str(layer + 1), *cells])
    header = ["text", "arm", "layer", "newest compressed slots", "oldest memories", "ratio"]
    return table(header, rows)


def compression_loss_table(results: Results) -> str:
    """Figure 6: the loss of each layer over the training."""
    rows = []
    for data in TEXTS:
        for arm in COMPRESSIVE_TEXT_ARMS:
            records = results.of("text", arm, data)
            for layer in range(TEXT_LAYERS):
                cells = []
                for part in (1, 4, 9, 19):
                    values = [record["compression_losses"][part][layer] for record in records]
                    cells.append(shown(values, 4))
                rows.append([data, arm, str(layer + 1), *cells])
    header = ["text", "arm", "layer", "5-10% of the steps", "20-25%", "45-50%", "95-100%"]
    return table(header, rows)


def times_table(results: Results, part: str) -> str:
    records = results.of(part)
    seconds = sum(record["seconds"] for record in records)
    seeds = len({record["seed"] for record in records})
    machines = sorted({record["machine"] for record in records})
    header = ["runs", "seeds", "minutes of one core", "processor"]
    return table(
        header, [[str(len(records)), str(seeds), f"{seconds / 60:.0f}", "; ".join(machines)]]
    )


def write_tables(results: Results, path: Path) -> None:
    """Put each table between its marks; what else stands in the file is a reader's, and stays."""
    tables: dict[str, str] = {}
    if results.of("recall"):
        tables["recall times"] = times_table(results, "recall")
        tables["recall"] = recall_table(results)
        tables["order"] = order_table(results)
    if results.of("text"):
        tables["text times"] = times_table(results, "text")
        tables["text"] = text_table(results)
        tables["repeats"] = repeats_table(results)
        tables["c_mem_len"] = c_mem_len_table(results)
        tables["attention"] = attention_table(results)
        tables["compression loss"] = compression_loss_table(results)
    text = path.read_text() if path.exists() else ""
    for name, lines in tables.items():
        mark = f"<!-- {name} -->\n"
        if mark not in text:
            text += f"\n{mark}{END}\n"
        before, _, rest = text.partition(mark)
        _, _, after = rest.partition(END)
        text = f"{before}{mark}{lines}{END}{after}"
    path.write_text(text)


# --------------------------------------------------------------------------------------- pictures


def draw_pictures(results: Results, out: Path) -> None:
    try:
        import matplotlib.figure
    except ImportError:
        print("no pictures: matplotlib is not installed")
        return
    if results.of("recall"):
        figure = matplotlib.figure.Figure(figsize=(9, 4.5), layout="constrained")
        draw_recall(figure.subplots(), results)
        figure.savefig(out / "recall.png", dpi=110)
    if results.of("text"):
        figure = matplotlib.figure.Figure(figsize=(9, 4), layout="constrained")
        for axes, data in zip(figure.subplots(1, 2, sharey=True), TEXTS, strict=True):
            draw_repeats(axes, results, data)
        figure.savefig(out / "repeats.png", dpi=110)
        figure = matplotlib.figure.Figure(figsize=(11, 3.6), layout="constrained")
        lengths, ages, losses = figure.subplots(1, 3)
        draw_c_mem_len(lengths, results)
        draw_attention(ages, results)
        draw_compression_loss(losses, results)
        figure.savefig(out / "memory.png", dpi=110)


def draw_curve(axes: Any, x: list[float], of_x: list[list[float]], **style: Any) -> None:
    """Means over seeds, and their 95% intervals as a band."""
    pairs = [mean_and_error(values) for values in of_x]
    means = [mean for mean, _ in pairs]
    (line,) = axes.plot(x, means, **style)
    low = [mean - error for mean, error in pairs]
    high = [mean + error for mean, error in pairs]
    axes.fill_between(x, low, high, alpha=0.2, linewidth=0, color=line.get_color())


def draw_recall(axes: Any, results: Results) -> None:
    width = 16
    starts = range(0, 256, width)
    middles = [start + width / 2 for start in starts]
    for arm in RECALL_PICTURE:
        of_starts = [accuracies(results, arm, start, start + width) for start in starts]
        draw_curve(axes, middles, of_starts, label=arm)
    axes.axhline(1 / VALUES, color="grey", linestyle=":", linewidth=1)
    axes.text(1, 1 / VALUES + 0.01, "chance", color="grey", va="bottom")
    for place, what in ((64, "64 slots end"), (160, "32 + 4 * 32 slots end")):
        axes.axvline(place, color="grey", linestyle="--", linewidth=1)
        axes.text(place + 1, 1.02, what, color="grey", va="bottom")
    axes.set(xlabel="tokens since the value was written", ylabel="right answers", ylim=(0.15, 1.08))
    axes.legend(loc="upper right")


def draw_repeats(axes: Any, results: Results, data: str) -> None:
    names = bucket_names()
    for arm in COMPRESSIVE_TEXT_ARMS:
        gains = [gains_on_words(results, data, arm, name) for name in names]
        pairs = [mean_and_error(values) for values in gains]
        means = [mean for mean, _ in pairs]
        errors = [error for _, error in pairs]
        axes.errorbar(range(len(names)), means, errors, marker="o", capsize=3, label=arm)
    axes.axhline(0, color="grey", linewidth=1)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right")
    axes.set(title=data, xlabel="bytes since the word stood last")
    axes.set_ylabel("bits per byte, less Transformer-XL's")
    axes.legend()


def draw_c_mem_len(axes: Any, results: Results) -> None:
    for data in TEXTS:
        for arm in COMPRESSIVE_TEXT_ARMS:
            gains = [c_mem_len_gains(results, data, arm, length) for length in C_MEM_LENS]
            draw_curve(axes, list(C_MEM_LENS), gains, label=f"{data}, {arm}")
    axes.set(title="bits per character, less the trained", xlabel="c_mem_len in evaluation")
    axes.legend(fontsize=7)


def draw_attention(axes: Any, results: Results) -> None:
    """On the first text, by the first compressive arm."""
    arm = COMPRESSIVE_TEXT_ARMS[0]
    records = results.of("text", arm, TEXTS[0])
    c_mem_len = TEXT_ARMS[arm]["c_mem_len"]
    mem_len = TEXT_ARMS[arm]["mem_len"]
    for layer in range(TEXT_LAYERS):
        ages = [record["attention"][layer] for record in records]
        of_bins = list(zip(*ages, strict=True))
        middles = [AGE_BIN * (place + 0.5) for place in range(len(of_bins))]
        draw_curve(axes, middles, of_bins, label=f"layer {layer + 1}")
    for place in (c_mem_len, c_mem_len + mem_len):
        axes.axvline(place, color="grey", linestyle="--", linewidth=1)
    axes.set(title="attention's weight of a slot", yscale="log")
    axes.set_xlabel("slot: compressed memory, memory, segment")
    axes.legend(fontsize=7)


def draw_compression_loss(axes: Any, results: Results) -> None:
    records = results.of("text", COMPRESSIVE_TEXT_ARMS[0], TEXTS[0])
    for layer in range(TEXT_LAYERS):
        of_parts = []
        for part in range(len(records[0]["compression_losses"])):
            of_parts.append([record["compression_losses"][part][layer] for record in records])
        middles = [5 * part + 2.5 for part in range(len(of_parts))]
        draw_curve(axes, middles, of_parts, label=f"layer {layer + 1}")
    axes.set(title="compression loss", xlabel="percent of the steps")
    axes.legend(fontsize=7)


# ------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description="What compressed memory is good for, measured.")
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to run and to show")
    add("--quick", action="store_true", help="two seeds and few steps")
    add("--out", type=Path, help="folder of the results; by default benchmarks, or runs/evidence")
    add("--processes", type=int, default=os.cpu_count(), help="runs at a time, a core each")
    args = parser.parse_args()
    out = args.out or Path("runs/evidence" if args.quick else "benchmarks")
    if args.processes < 1:
        parser.error(f"--processes must be at least 1, got {args.processes}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        jobs = make_jobs(args.parts, args.quick)
        done = run_all(jobs, out / "evidence.jsonl", args.processes)
        results = Results(done)
        write_tables(results, out / "evidence.md")
        draw_pictures(results, out)
    except KeyboardInterrupt:
        sys.exit("evidence.py: stopped; the same command goes on where it was")
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")


if __name__ == "__main__":
    main()
