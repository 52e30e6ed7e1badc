"""The rules, and what usually is wrong where one is broken."""

from typing import NamedTuple

VERSION = "3.1"  # README.md has what changed with each


class Rule(NamedTuple):
    sentence: str
    causes: tuple[str, ...]
    level: str = "MUST"


RULES = {
    "ATT-1": Rule(
        "logits at t do not depend on any token after t",
        ("the causal mask is missing or one column too far", "its value is too small to mask"),
    ),
    "ATT-2": Rule(
        "logits at t do depend on token t, every earlier token of the segment and every slot of "
        "both memories",
        ("the causal mask hides one column too many", "a memory is cut before it is read"),
    ),
    "ATT-3": Rule(
        "the relative term is the one of distance t - j, whatever the lengths and however full the "
        "memories",
        (
            "distances are numbered from a fixed length instead of the number of slots held",
            "the relative shift is off by one, or right for square scores alone",
            "compressed slots count as other than one position",
            "the scale or a bias enters at another place",
        ),
    ),
    "ATT-4": Rule(
        "only distances count: the same context gives the same logits anywhere in the stream",
        ("positions are absolute, or counted from the start", "state is kept in the model"),
    ),
    "ATT-5": Rule(
        "while nothing overflows, any split into segments gives the same logits",
        (
            "a token of the memory stands at another distance than one of the segment",
            "memory holds something else than what the segment's attention reads",
            "a normalisation is applied to memory twice, or not at all",
        ),
    ),
    "ATT-6": Rule(
        "rows of a batch do not see each other",
        ("a reshape mixes rows with heads or time", "a statistic is taken over the batch"),
    ),
    "MEM-1": Rule(
        "memory is the newest slots, compressed memory comes before it, both oldest first",
        (
            "the newest were evicted instead of the oldest",
            "new slots are put before the old ones",
            "what was kept is one slot too early or too late",
        ),
    ),
    "MEM-2": Rule(
        "after every step neither memory is longer than its length, for any segment lengths",
        (
            "x[-0:] is all of x: a length of 0 needs a slice from the other end",
            "the overflow is rounded down, so that a rest stays",
            "compressed memory is not cut, or only where it overflows by one slot",
        ),
    ),
    "MEM-3": Rule(
        "every token fed is in exactly one slot or forgotten; the order is kept, and only the "
        "oldest are forgotten",
        (
            "what is compressed is not what left the memory, so that tokens are lost or doubled",
            "a rest that c does not divide is dropped or padded by a wrong number",
            "the newest compressed slots are forgotten instead of the oldest",
        ),
    ),
    "MEM-4": Rule(
        "exactly c * n memories become exactly n slots, and only when something overflows",
        (
            "the number of slots made is rounded down",
            "memory is compressed before it is full",
            "the loss is not zero where nothing was compressed",
        ),
    ),
    "MEM-5": Rule(
        "new compressed slots are f_c of what left the memory of the same layer",
        (
            "another layer's f_c or another layer's memories are used",
            "what is compressed is raw where attention reads normalised, or the reverse",
            "the memories that stay are compressed, instead of those that leave",
        ),
    ),
    "MEM-6": Rule(
        "slots made in a step are first attended to in the next",
        ("memory is updated before attention reads it", "new slots are thrown away"),
    ),
    "MEM-7": Rule(
        "layers keep separate memories of their own inputs",
        (
            "a layer's output is stored instead of its input",
            "all layers share one memory, or the order of the layers is wrong",
        ),
    ),
    "MEM-8": Rule(
        "memories handed in are not changed; those handed back carry no gradient and keep dtype "
        "and device",
        ("a memory is edited in place", "a detach is missing on memory or on compressed memory"),
    ),
    "MEM-9": Rule(
        "a token influences a later logit if and only if the memories still carry it there",
        (
            "a slot is lost or kept one step too long",
            "a layer reads the memory of another",
            "f_c leaves out part of a block",
        ),
    ),
    "CMP-1": Rule(
        "f_c gives n slots for c * n memories, for every n >= 0",
        ("the stride is not c", "padding adds or removes slots"),
    ),
    "CMP-2": Rule(
        "slot k depends on memories c * k to c * (k + 1) - 1 and on no others",
        ("the kernel is not c wide", "padding moves the blocks", "channels stand for time"),
    ),
    "CMP-3": Rule(
        "the layers' compression functions share no parameters",
        ("one module is used in all layers",),
    ),
    "CMP-4": Rule(
        "each compression function equals its definition by loops",
        ("another reduction than the one named", "a nonlinearity too many or too few"),
    ),
    "LOSS-1": Rule(
        "the compression loss has a gradient on every parameter of every f_c that compressed, and "
        "none on any other parameter or input",
        (
            "projections, normalisation, h or the evicted block are not held constant",
            "the compressed slots are detached before the loss",
            "only some layers enter the loss",
        ),
    ),
    "LOSS-2": Rule(
        "the language-model loss's gradients are the same with the compression loss added or not, "
        "and reach every parameter but f_c, in every step",
        (
            "a parameter was frozen in place (detach_() or requires_grad_(False))",
            "the language-model loss reaches f_c through memory",
            "the compression loss reaches a projection",
        ),
    ),
    "LOSS-3": Rule(
        "with c = 1 and f_c the identity the attention loss is zero",
        (
            "the two attentions differ in more than their slots: mask, positions, dropout",
            "the compressed slots are compared with other memories than those that they stand for",
        ),
    ),
    "LOSS-4": Rule(
        "the attention loss depends on the evicted block alone",
        ("the whole memory, or what stays of it, is compared instead of what left it",),
    ),
    "LOSS-5": Rule(
        "the compression loss equals its definition by loops",
        (
            "attention is scaled, masked or given positions that Algorithm 2 has not",
            "memories and h are compared raw where attention reads them normalised",
            "the reduction over layers, heads or features is another than the one declared",
        ),
    ),
    "LOSS-6": Rule(
        "a small step of f_c against its gradient lowers the compression loss",
        ("the gradient is that of something else than the loss", "the sign is wrong"),
    ),
    "MOD-1": Rule(
        "without compressed memory it is a Transformer-XL, without any a causal transformer",
        (
            "x[-0:] is all of x",
            "with no compressed memory more than the overflow is dropped",
            "memory is kept although its length is 0",
        ),
    ),
    "MOD-2": Rule(
        "the same inputs give the same outputs in evaluation mode, and without dropout in training "
        "mode, too",
        (
            "a dropout has a rate of its own, or drops out in evaluation",
            "state is kept in the model",
        ),
    ),
    "MOD-3": Rule(
        "a saved and loaded state continues as if it had not been",
        ("something that matters is neither in state_dict nor in the state",),
    ),
    "MOD-4": Rule(
        "a segment may be shorter or longer than the one before",
        ("a length is cached at the first step or fixed when the model is built",),
        level="SHOULD",
    ),
    "MOD-5": Rule(
        "wrong shapes, dtypes, batch sizes or settings raise an error that names the argument, "
        "what was expected and what came",
        ("nothing is checked, and torch fails later or not at all",),
        level="SHOULD",
    ),
}

# Of several rules that fail the first of these says most: it is about less, and breaks the others.
SHARPEST_FIRST = ("MEM-8", "MOD-2", "MOD-3", "ATT-6", "CMP-1", "CMP-2", "CMP-3", "CMP-4", "MEM-2")
SHARPEST_FIRST += ("MEM-4", "MEM-1", "MEM-3", "MEM-5", "MEM-7", "MEM-6", "LOSS-3", "LOSS-5")
SHARPEST_FIRST += ("LOSS-4", "LOSS-1", "LOSS-2", "LOSS-6", "ATT-1", "ATT-2", "ATT-3", "ATT-5")
SHARPEST_FIRST += ("ATT-4", "MEM-9", "MOD-1", "MOD-4", "MOD-5")

DESIGN = {  # the fields of an adapter's `declares` that a rule follows
    "ATT-2": ("start",),
    "ATT-3": ("positions", "storage", "sinusoid", "norm_eps"),
    "ATT-5": ("start", "storage"),
    "MEM-1": ("layout", "start", "overflow"),
    "MEM-2": ("mem_len", "c_mem_len"),
    "MEM-3": ("overflow", "start"),
    "MEM-4": ("overflow", "start"),
    "MEM-5": ("overflow", "storage"),
    "MEM-9": ("overflow", "start"),
    "CMP-1": ("compress_nothing",),
    "LOSS-3": ("storage", "loss_reduction"),
    "LOSS-4": ("overflow",),
    "LOSS-5": ("storage", "loss_reduction", "loss_over_layers"),
    "MOD-1": ("mem_len", "c_mem_len"),
    "MOD-2": ("loss_in_eval",),
    "MOD-4": ("segments",),
}
