"""What an implementation offers to be tested: an adapter, and a declaration of where it differs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

COMPRESSIONS = ("conv", "dilated_conv", "most_used", "mean_pool", "max_pool")
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
    # When c does not divide the overflow, round_up evicts up to c - 1 slots more, pad puts zeros
    # before the oldest, drop loses the newest of the rest; divisible asks for lengths that it does
    overflow: str = "round_up"
    loss_reduction: str = "mean_square"  # of a layer, over all entries; or sum_of_squares, or norm
    loss_over_layers: str = "mean"  # or sum
    loss_in_eval: bool = True  # False: there is a compression loss in training mode alone
    compressions: tuple[str, ...] = COMPRESSIONS
    compression_losses: tuple[str, ...] = LOSSES
    norms: tuple[str, ...] = ("pre", "post")
    bptt: bool = False  # the setting `bptt` works
    segments: str = "any"  # or full: every step has `segment` tokens, which the model is built for
    mem_len: str = "any"  # or at least one, or segment: at least as long as a segment
    c_mem_len: str = "any"  # or at least one, or block: at least mem_len // compression_rate
    compress_nothing: bool = True  # f_c takes an empty block; False: it is never called with one
    dtype: str = "float64"  # or float32, where float64 does not work
    known: Mapping[str, str] = field(default_factory=dict)  # rule or test -> why it fails
    not_claimed: Mapping[str, str] = field(default_factory=dict)  # the same -> why not for it


CHOICES = {
    "layout": ("batch_first", "time_first"),
    "start": ("empty", "zeros"),
    "storage": ("normalised", "raw"),
    "positions": ("slots", "separate"),
    "overflow": ("round_up", "pad", "drop", "divisible"),
    "loss_reduction": ("mean_square", "sum_of_squares", "norm"),
    "loss_over_layers": ("mean", "sum"),
    "segments": ("any", "full"),
    "mem_len": ("any", "one", "segment"),
    "c_mem_len": ("any", "one", "block"),
    "dtype": ("float64", "float32"),
}
SOME = {
    "compressions": COMPRESSIONS,
    "compression_losses": LOSSES,
    "norms": ("pre", "post"),
}


class Adapter(Protocol):
    """One implementation. Shapes are given batch first (see `Declaration.layout`).

    A state is whatever passes from step to step; the tests look into it by `read` alone. The first
    five calls are needed; a rule whose check needs one of the others is not claimed without it.
    """

    declares: Mapping[str, Any]

    def build(self, settings: Settings) -> nn.Module:
        """A new model. Its parameters are overwritten with random ones."""

    def start(self, model: nn.Module, batch_size: int) -> Any:
        """The state before the first step."""

    def step(self, model: nn.Module, tokens: Tensor, state: Any) -> tuple[Tensor, Any, Tensor]:
        """`tokens [B, T]` to `logits [B, T, V]`, the next state, and the compression loss, a scalar
        (zero or None when nothing was compressed). What training does, so with gradients."""

    def read(self, state: Any) -> Sequence[tuple[Tensor, Tensor]]:
        """For each layer its memory and compressed memory, `[B, slots, D]`, oldest first."""

    def compression_parameters(self, model: nn.Module) -> Sequence[Sequence[nn.Parameter]]:
        """For each layer the parameters that only its compression loss trains."""

    # -------------------------------------------------------------------------------- optional

    def replace(self, state: Any, slots: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """A state with these memories, as `read` gives them; the one handed in stays as it was."""

    def compress(self, model: nn.Module, layer: int, old: Tensor, usage: Tensor) -> Tensor:
        """f_c alone: `old [B, c*n, D] -> [B, n, D]`; `usage [B, c*n]` is the attention received."""

    def weights(self, model: nn.Module) -> dict[str, Any]:
        """Parameters by name, matrices input x output (`y = x @ W`), as views: writing to them
        changes the model. For LOSS-5 `{"layers": [...]}` with `query`, `key` and `value` for each
        layer, also `value_bias` if there is one, with raw storage also `norm1_weight` and
        `norm1_bias`, and for the auto-encoding loss `transposed_convolution [c, D recovered, D]`.

        A model as plain as the paper's gives all names of `oracle.py`, and the whole step is then
        compared with plain loops: for a layer also `norm1_*`, `relative_key`, `content_bias`,
        `position_bias` `[H, K]`, `output`, `norm2_*`, `ff1_weight`, `ff1_bias`, `ff2_*`,
        `convolution [c, in, out]`, and `dilated`; beside "layers", `embedding`, `logits_weight`,
        `logits_bias`, and in pre-norm `norm_weight` and `norm_bias`."""
