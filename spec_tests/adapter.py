"""What an implementation offers to be tested: an adapter, and a declaration of where it differs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

COMPRESSIONS = ("conv", "dilated_conv", "most_used", "mean_pool", "max_pool")
OTHER = "other"  # a compression function that the paper has not
LOSSES = ("attention", "autoencoding", "none")


class Settings(NamedTuple):
    """What a model is built from. The defaults are small: the rules do not depend on size."""

    vocab_size: int = 11
    d_model: int = 8
    n_heads: int = 2
    n_layers: int = 2
    d_ff: int = 12
    mem_len: int = 4
    c_mem_len: int = 3
    compression_rate: int = 2
    compression: str = "conv"
    compression_loss: str = "attention"
    norm_first: bool = True
    dropout: float = 0.0
    bptt: bool = False
    segment: int = 4  # tokens of the longest step, for models that are built for one length


@dataclass(frozen=True)
class Declaration:
    """Where an implementation differs, legitimately: the attribute `declares` of an adapter, a dict
    with any of these fields. The tests follow it and draw only settings that it supports."""

    name: str = "unnamed"
    version: str = ""
    layout: str = "batch_first"  # or time_first: [T, B], [T, B, V], slots [N, B, D]
    start: str = "empty"  # or zeros: memories begin full, of slots that stand for no token
    storage: str = "normalised"  # memory holds what attention reads; raw: the layer's input
    positions: str = "slots"  # along [c_mem, mem, segment]; separate: c_mem has its own
    sinusoid: str = "halves"  # of R: sines, then cosines; alternating: one of each in turn
    norm_eps: float = 1e-5  # what a normalisation adds to the variance
    # When c does not divide the overflow, round_up evicts up to c - 1 slots more, pad puts zeros
    # before the oldest, drop loses the newest of the rest, keep lets the rest stay, up to c - 1
    # slots above mem_len; divisible asks for lengths that c divides (of segments alone with zeros)
    overflow: str = "round_up"
    loss_reduction: str = "mean_square"  # of a layer, over all entries; or sum_of_squares, or norm
    loss_over_layers: str = "mean"  # or sum
    loss_in_eval: bool = True  # False: there is a compression loss in training mode alone
    compressions: tuple[str, ...] = COMPRESSIONS
    compression_losses: tuple[str, ...] = LOSSES
    norms: tuple[str, ...] = ("pre", "post")
    bptt: bool = False  # the setting `bptt` works
    # or rate: each has c tokens at least; or full: each has `segment`, which the model is built for
    segments: str = "any"
    mem_len: str = "any"  # or at least one, or rate: at least c, or segment: at least a segment's
    c_mem_len: str = "any"  # or at least one, or block: at least mem_len // compression_rate
    compress_nothing: bool = False  # f_c takes an empty block
    compiled: bool = False  # True: each shape anew, which takes long, so that few are drawn
    dtype: str = "float64"  # or float32, where float64 does not work
    known: Mapping[str, str] = field(default_factory=dict)  # rule or test -> why it fails
    not_claimed: Mapping[str, str] = field(default_factory=dict)  # the same -> why not for it


CHOICES = {
    "layout": ("batch_first", "time_first"),
    "start": ("empty", "zeros"),
    "storage": ("normalised", "raw"),
    "positions": ("slots", "separate"),
    "sinusoid": ("halves", "alternating"),
    "overflow": ("round_up", "pad", "drop", "keep", "divisible"),
    "loss_reduction": ("mean_square", "sum_of_squares", "norm"),
    "loss_over_layers": ("mean", "sum"),
    "segments": ("any", "rate", "full"),
    "mem_len": ("any", "one", "rate", "segment"),
    "c_mem_len": ("any", "one", "block"),
    "dtype": ("float64", "float32"),
}
SOME = {
    "compressions": (*COMPRESSIONS, OTHER),
    "compression_losses": LOSSES,
    "norms": ("pre", "post"),
}


# What `weights` may name, and its shape: matrices are input x output, `y = x @ W`. A is the width
# of all heads, H * K, which is D in most models; F the inner width, V the vocabulary.
LAYER_WEIGHTS = {
    "norm1_weight": "D",  # before attention, in post-norm after it
    "norm1_bias": "D",
    "query": "D A",
    "query_bias": "A",  # this and the next three, if there is one
    "key": "D A",
    "key_bias": "A",
    "value": "D A",
    "value_bias": "A",
    "relative_key": "D A",
    "content_bias": "H K",
    "position_bias": "H K",
    "output": "A D",
    "output_bias": "D",
    "norm2_weight": "D",  # before the feed-forward, in post-norm after it
    "norm2_bias": "D",
    "ff1_weight": "D F",
    "ff1_bias": "F",
    "ff2_weight": "F D",
    "ff2_bias": "D",
    "convolution": "c D D",  # oldest of the c memories first
    "convolution_bias": "D",  # if there is one
    "dilated": "3 2 D D",  # those of dilation 1, 2, 4, a list; the older memory first
    "transposed_convolution": "c D D",  # [c, D recovered, D compressed]
}
MODEL_WEIGHTS = {
    "embedding": "V D",
    "norm_weight": "D",  # the last one, in pre-norm
    "norm_bias": "D",
    "logits_weight": "D V",
    "logits_bias": "V",
}


class Adapter(Protocol):
    """One implementation. Shapes are given batch first (see `Declaration.layout`).

    A state is whatever passes from step to step; the tests look into it by `read` alone. The first
    five calls are needed; a rule whose check needs one of the others is not claimed without it.
    """

    declares: Mapping[str, Any]

    def build(self, settings: Settings) -> nn.Module:
        """A new model, or NotImplemented for settings that it cannot follow: the example is left
        out. The model's parameters are overwritten with random ones."""

    def start(self, model: nn.Module, batch_size: int) -> Any:
        """The state before the first step."""

    def step(self, model: nn.Module, tokens: Tensor, state: Any) -> tuple[Tensor, Any, Tensor]:
        """`tokens [B, T]` to `logits [B, T, V]` (log-probabilities do as well), the next state, and
        the compression loss, a scalar, or a number or None where nothing was compressed. What
        training does, so with gradients."""

    def read(self, state: Any) -> Sequence[tuple[Tensor, Tensor]]:
        """For each layer its memory and compressed memory, `[B, slots, D]`, oldest first; None if
        there was no step yet and nothing is known of them."""

    def compression_parameters(self, model: nn.Module) -> Sequence[Sequence[nn.Parameter]]:
        """For each layer the parameters that only its compression loss trains."""

    # -------------------------------------------------------------------------------- optional

    def replace(self, state: Any, slots: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """A state with these memories, as `read` gives them; the one handed in stays as it was."""

    def compress(self, model: nn.Module, layer: int, old: Tensor, usage: Tensor) -> Tensor:
        """f_c alone: `old [B, c*n, D] -> [B, n, D]`; `usage [B, c*n]` is the attention received."""

    def weights(self, model: nn.Module) -> dict[str, Any]:
        """Parameters by name, as views: writing to them changes the model. `{"layers": [...]}`
        with the names of LAYER_WEIGHTS for each layer, beside it those of MODEL_WEIGHTS.

        LOSS-5 needs `query`, `key` and `value` (and their biases if there are any), with raw
        storage also `norm1_weight` and `norm1_bias`, and for the auto-encoding loss
        `transposed_convolution`. A model as plain as the paper's gives all that it has, and the
        whole step is then compared with plain loops."""
