# SPDX-License-Identifier: MIT
"""The tables and pictures of evidence.md, from the records that evidence.py made.

Everywhere the mean over the seeds and its 95% interval (Student's); differences are taken seed by
seed. The arms of a seed read the same text (BPTT's rows are fewer and longer), and begin with the
same weights where they have the same parameters.
"""

import itertools
import math
import statistics
from pathlib import Path
from typing import Any

# Of Student's distribution, by the number of values less one: 95% lie within so many errors.
T95 = (math.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
PAPER = {  # bits per character on enwik8, Table 5
    "convolution, attention loss": 0.973,
    "dilated convolution, attention loss": 0.977,
    "most-used": 0.980,
    "mean pooling": 0.982,
    "convolution, auto-encoding loss": 0.984,
    "max pooling": 0.986,
    "convolution, BPTT alone": 0.996,
}
RECALL_PICTURE = {  # arms, and how they are named and coloured there
    "Transformer-XL, 160 slots": ("Transformer-XL, 160 slots", "grey"),
    "convolution, attention loss": ("Compressive, 32 + 32 slots", "C0"),
    "convolution, auto-encoding loss": ("the same, auto-encoding loss", "C1"),
    "Transformer-XL, 64 slots": ("Transformer-XL, 64 slots", "C3"),
}
RECALL_EDGES = (0, 16, 32, 64, 96, 128, 160, 192, 256, 384, 640)
BEYOND = (96, 160)  # further than 64 slots and a segment reach, as far as 32 + 4 * 32 do
END = "<!-- end -->"

Records = list[dict]


def write(records: Records, out: Path) -> None:
    """Put each table between its marks in evidence.md (what else stands there is a reader's, and
    stays), and draw the pictures."""
    recall = choose(records, part="recall")
    text = choose(records, part="text")
    tables: dict[str, str] = {}
    if recall:
        tables["recall time"] = time_table(recall)
        tables["recall"] = recall_table(recall)
        tables["order"] = order_table(recall)
    if text:
        tables["text time"] = time_table(text)
        tables["text"] = text_table(text)
        tables["repeats"] = repeats_table(text)
        tables["c_mem_len"] = c_mem_len_table(text)
        tables["attention"] = attention_table(text)
        tables["compression loss"] = compression_loss_table(text)
    path = out / "evidence.md"
    page = path.read_text() if path.exists() else ""
    for name, lines in tables.items():
        mark = f"<!-- {name} -->\n"
        if mark not in page:
            page += f"\n{mark}{END}\n"
        before, _, rest = page.partition(mark)
        _, _, after = rest.partition(END)
        page = f"{before}{mark}{lines}{END}{after}"
    path.write_text(page)
    draw_pictures(recall, text, out)


# --------------------------------------------------------------------------------- records, seeds


def choose(records: Records, **wanted: str) -> Records:
    return [r for r in records if all(r[name] == value for name, value in wanted.items())]


def distinct(records: Records, name: str) -> list:
    """The values that a field has, in their order."""
    return list(dict.fromkeys(record[name] for record in records))


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95% interval."""
    count = len(values)
    error = T95[count - 1] * statistics.stdev(values) / math.sqrt(count)
    return statistics.mean(values), error


def shown(values: list[float], digits: int, sign: str = "") -> str:
    mean, error = mean_and_error(values)
    return f"{mean:{sign}.{digits}f} ± {error:.{digits}f}"


def differences(values: list[float], others: list[float]) -> list[float]:
    return [value - other for value, other in zip(values, others, strict=True)]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def time_table(records: Records) -> str:
    seconds = sum(record["seconds"] for record in records)
    row = [
        str(len(records)),
        str(len(distinct(records, "seed"))),
        f"{seconds / 60:.0f}",
        "; ".join(distinct(records, "machine")),
    ]
    return table(["runs", "seeds", "minutes, of one core each", "processor"], [row])


# ----------------------------------------------------------------------------------------- recall


def accuracies(recall: Records, arm: str, low: int, high: int) -> list[float]:
    """For each seed, of the answers at distances from low to high."""
    values = []
    for record in choose(recall, arm=arm):
        bins = slice(low // record["bin"], high // record["bin"])
        values.append(sum(record["right"][bins]) / max(1, sum(record["asked"][bins])))
    return values


def recall_table(recall: Records) -> str:
    ranges = list(itertools.pairwise(RECALL_EDGES))
    rows = []
    for arm in distinct(recall, "arm"):
        cells = [shown(accuracies(recall, arm, low, high), 2) for low, high in ranges]
        rows.append([arm, *cells])
    return table(["tokens back", *(f"{low}-{high}" for low, high in ranges)], rows)


def order_table(recall: Records) -> str:
    """The functions and losses in the order of the paper's Table 5, each compared with all that
    stand below it there."""
    arms = list(PAPER)
    rows = []
    for place, arm in enumerate(arms):
        values = accuracies(recall, arm, *BEYOND)
        verdicts = {"better here, too": 0, "worse here": 0, "undecided": 0}
        for other in arms[place + 1 :]:
            gain, error = mean_and_error(differences(values, accuracies(recall, other, *BEYOND)))
            if gain > error:
                verdicts["better here, too"] += 1
            elif -gain > error:
                verdicts["worse here"] += 1
            else:
                verdicts["undecided"] += 1
        counts = [str(count) for count in verdicts.values()]
        rows.append([arm, f"{PAPER[arm]:.3f}", shown(values, 2), *counts])
    low, high = BEYOND
    header = ["", "paper, bits per character", f"accuracy here, {low}-{high} back"]
    return table(header + ["than those below: better here, too", "worse here", "undecided"], rows)


def draw_recall(axes: Any, recall: Records) -> None:
    width = 16
    starts = range(0, 320, width)
    middles = [start + width / 2 for start in starts]
    for arm, (label, color) in RECALL_PICTURE.items():
        of_starts = [accuracies(recall, arm, start, start + width) for start in starts]
        draw_curve(axes, middles, of_starts, label=label, color=color)
    chance = 1 / recall[0]["values"]
    axes.axhline(chance, color="grey", linestyle=":", linewidth=1)
    axes.annotate("chance", (2, chance), color="grey", va="bottom")
    for place, what in ((64, "64 slots reach"), (160, "32 + 4 · 32 slots reach")):
        axes.axvspan(place, place + 32, color="grey", alpha=0.12, linewidth=0)
        axes.annotate(what, (place, 1.02), color="grey", va="bottom")
    axes.set(xlim=(0, 320), ylim=(0.15, 1.1), ylabel="right answers")
    axes.set_xlabel("tokens since the value was written")
    axes.legend(loc="center right")


# ------------------------------------------------------------------------------------------- text


def compressive(text: Records) -> list[tuple[str, str]]:
    """Text and arm, of those that have a compressed memory."""
    pairs = [(r["data"], r["arm"]) for r in text if r["config"]["c_mem_len"] > 0]
    return sorted(dict.fromkeys(pairs))


def text_table(text: Records) -> str:
    arms = distinct(text, "arm")
    rows = []
    for data in distinct(text, "data"):
        baseline = [r["bpc"] for r in choose(text, data=data, arm=arms[0])]
        for arm in arms:
            values = [r["bpc"] for r in choose(text, data=data, arm=arm)]
            gain = shown(differences(values, baseline), 4, "+")
            rows.append([data, arm, shown(values, 3), gain])
    return table(["text", "arm", "bits per character", f"less {arms[0]}"], rows)


def bits_a_byte(text: Records, data: str, arm: str, bucket: str) -> list[float]:
    """For each seed, of the words that stood last so many bytes ago."""
    values = []
    for record in choose(text, data=data, arm=arm):
        bits, count = record["words"][bucket]
        values.append(bits / max(1, count))
    return values


def repeat_gains(text: Records, data: str, arm: str, bucket: str) -> list[float]:
    """Bits per byte of words, less those of the first arm."""
    baseline = distinct(text, "arm")[0]
    values = bits_a_byte(text, data, arm, bucket)
    return differences(values, bits_a_byte(text, data, baseline, bucket))


def repeats_table(text: Records) -> str:
    header = ["bytes back"]
    for data in distinct(text, "data"):
        header.append(f"{data}: share of the words' bytes")
    header += [f"{data}: {arm}" for data, arm in compressive(text)]
    rows = []
    for bucket in text[0]["words"]:
        cells = [bucket]
        for data in distinct(text, "data"):
            words = choose(text, data=data)[0]["words"]
            share = words[bucket][1] / sum(count for _, count in words.values())
            cells.append(f"{share:.0%}")
        for data, arm in compressive(text):
            cells.append(shown(repeat_gains(text, data, arm, bucket), 3, "+"))
        rows.append(cells)
    return table(header, rows)


def c_mem_len_gains(text: Records, data: str, arm: str, c_mem_len: str) -> list[float]:
    """Bits per character with another length in evaluation, less those with the trained one."""
    gains = []
    for record in choose(text, data=data, arm=arm):
        bpc = record["bpc_of_c_mem_len"]
        gains.append(bpc[c_mem_len] - bpc[str(record["config"]["c_mem_len"])])
    return gains


def c_mem_lens(text: Records) -> list[str]:
    for record in text:
        if record["config"]["c_mem_len"] > 0:
            return list(record["bpc_of_c_mem_len"])
    return []


def c_mem_len_table(text: Records) -> str:
    """Tables 8 and 9."""
    lengths = c_mem_lens(text)
    rows = []
    for data, arm in compressive(text):
        cells = [shown(c_mem_len_gains(text, data, arm, length), 3, "+") for length in lengths]
        rows.append([data, arm, *cells])
    return table(["text", "arm", *lengths], rows)


def layers(text: Records) -> range:
    return range(text[0]["config"]["n_layers"])


def attention_of(records: Records, layer: int) -> list[list[float]]:
    """For each bin of slots, oldest first, and each seed the mean weight of a slot."""
    of_seeds = [record["attention"][layer] for record in records]
    return [list(values) for values in zip(*of_seeds, strict=True)]


def attention_table(text: Records) -> str:
    """Figure 2: does attention rise from the oldest memory to what is older and compressed?"""
    rows = []
    for data, arm in compressive(text):
        records = choose(text, data=data, arm=arm)
        for layer in layers(text):
            of_bins = attention_of(records, layer)
            first = records[0]["config"]["c_mem_len"] // records[0]["age_bin"]  # bin of memory
            compressed = of_bins[first - 1]
            oldest = of_bins[first]
            ratios = [a / b for a, b in zip(compressed, oldest, strict=True)]
            cells = []
            for values in (compressed, oldest):
                cells.append(shown([1000 * value for value in values], 2))
            rows.append([data, arm, str(layer + 1), *cells, shown(ratios, 2)])
    header = ["text", "arm", "layer", "newest compressed slots", "oldest memories", "ratio"]
    return table(header, rows)


def losses_of(records: Records, layer: int) -> list[list[float]]:
    """For each twentieth of the training and each seed."""
    of_seeds = []
    for record in records:
        of_seeds.append([of_layers[layer] for of_layers in record["compression_losses"]])
    return [list(values) for values in zip(*of_seeds, strict=True)]


def compression_loss_table(text: Records) -> str:
    """Figure 6."""
    parts = (1, 4, 9, 19)
    rows = []
    for data, arm in compressive(text):
        records = choose(text, data=data, arm=arm)
        for layer in layers(text):
            of_parts = losses_of(records, layer)
            cells = [shown(of_parts[part], 4) for part in parts]
            rows.append([data, arm, str(layer + 1), *cells])
    header = ["text", "arm", "layer"]
    return table(header + [f"{5 * part}-{5 * part + 5}% of the steps" for part in parts], rows)


def draw_repeats(axes: Any, text: Records, data: str) -> None:
    buckets = list(text[0]["words"])
    for of_data, arm in compressive(text):
        if of_data == data:
            pairs = [mean_and_error(repeat_gains(text, data, arm, b)) for b in buckets]
            means = [mean for mean, _ in pairs]
            errors = [error for _, error in pairs]
            axes.errorbar(buckets, means, errors, marker="o", capsize=3, label=arm)
    axes.axhline(0, color="grey", linewidth=1)
    axes.tick_params("x", rotation=60)
    axes.set(title=data, xlabel="bytes since the word stood last")
    axes.set_ylabel("bits per byte, less Transformer-XL's")
    axes.legend()


def draw_memory(figure: Any, text: Records) -> None:
    """Tables 8 and 9, Figure 2 and Figure 6; the latter for the first text and arm."""
    lengths, ages, losses = figure.subplots(1, 3)
    for data, arm in compressive(text):
        names = c_mem_lens(text)
        gains = [c_mem_len_gains(text, data, arm, name) for name in names]
        draw_curve(lengths, [int(name) for name in names], gains, label=f"{data}, {arm}")
    lengths.set(title="bits per character, less the trained", xlabel="c_mem_len in evaluation")
    data, arm = compressive(text)[0]
    records = choose(text, data=data, arm=arm)
    width = records[0]["age_bin"]
    c_mem_len = records[0]["config"]["c_mem_len"]
    mem_len = records[0]["config"]["mem_len"]
    for layer in layers(text):
        of_bins = attention_of(records, layer)
        middles = [width * (place + 0.5) for place in range(len(of_bins))]
        draw_curve(ages, middles, of_bins, label=f"layer {layer + 1}")
        of_parts = losses_of(records, layer)
        middles = [5 * part + 2.5 for part in range(len(of_parts))]
        draw_curve(losses, middles, of_parts, label=f"layer {layer + 1}")
    for place in (c_mem_len, c_mem_len + mem_len):
        ages.axvline(place, color="grey", linestyle="--", linewidth=1)
    ages.set(title=f"attention to a slot ({data})", yscale="log")
    ages.set_xlabel("compressed memory | memory | segment")
    losses.set(title=f"compression loss ({data})", xlabel="percent of the steps")
    for axes in (lengths, ages, losses):
        axes.legend(fontsize=7)


# --------------------------------------------------------------------------------------- pictures


def draw_curve(axes: Any, x: list[float], of_x: list[list[float]], **style: Any) -> None:
    """Means over seeds, and their 95% intervals as a band."""
    pairs = [mean_and_error(values) for values in of_x]
    (line,) = axes.plot(x, [mean for mean, _ in pairs], **style)
    low = [mean - error for mean, error in pairs]
    high = [mean + error for mean, error in pairs]
    axes.fill_between(x, low, high, alpha=0.2, linewidth=0, color=line.get_color())


def draw_pictures(recall: Records, text: Records, out: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no pictures: matplotlib is not installed")
        return
    if recall:
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        draw_recall(figure.subplots(), recall)
        figure.savefig(out / "recall.png", dpi=110)
    if text:
        figure = Figure(figsize=(10, 4.5), layout="constrained")
        texts = distinct(text, "data")
        for axes, data in zip(
            figure.subplots(1, len(texts), sharey=True, squeeze=False)[0], texts, strict=True
        ):
            draw_repeats(axes, text, data)
        figure.savefig(out / "repeats.png", dpi=110)
        figure = Figure(figsize=(12, 3.8), layout="constrained")
        draw_memory(figure, text)
        figure.savefig(out / "memory.png", dpi=110)
