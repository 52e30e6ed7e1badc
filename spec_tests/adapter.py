"""How the tests see an implementation: by an adapter, and not otherwise."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

import compressive


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


class Slots(NamedTuple):
    """A layer's memories, each `[B, slots, D]`, oldest first, as attention reads them."""

    mem: Tensor
    c_mem: Tensor


class Step(NamedTuple):
    """What one step gives: `logits [B, T, V]`, the state for the next step, and the compression
    loss (zero when nothing was compressed)."""

    logits: Tensor
    state: Any
    loss: Tensor


class Adapter(Protocol):
    """One implementation. A state is what passes from step to step; the tests never look inside."""

    def build(self, settings: Settings) -> nn.Module: ...

    def start(self, model: nn.Module, batch_size: int) -> Any: ...

    def step(self, model: nn.Module, tokens: Tensor, state: Any) -> Step: ...

    def read(self, state: Any) -> list[Slots]:
        """The memories of each layer."""

    def replace(self, state: Any, slots: Sequence[Slots]) -> Any:
        """A state with these memories; the one handed in stays as it was."""

    def compression_parameters(self, model: nn.Module) -> list[list[nn.Parameter]]:
        """For each layer the parameters that only its compression loss trains."""

    def compress(self, model: nn.Module, layer: int, old: Tensor, usage: Tensor) -> Tensor:
        """f_c alone: `old [B, c*n, D] -> [B, n, D]`; `usage [B, c*n]` is the attention received."""

    def loss(self, model: nn.Module, layer: int, h: Tensor, old: Tensor) -> Tensor:
        """The loss alone: `h [B, T, D]`, `old [B, c*n, D]`, both as attention reads them."""

    def weights(self, model: nn.Module) -> dict[str, Any]:
        """The parameters under the names of the oracle, matrices input x output, as views:
        writing to them changes the model."""

    def layers(self, model: nn.Module, h: Tensor, state: Any) -> tuple[Tensor, Any, list[Tensor]]:
        """The layers alone: `h [B, T, D]`, the first layer's input, to the last one's output, the
        next state and the attention weights `[B, H, T, S]` of each layer."""

    def relative_shift(self, scores: Tensor) -> Tensor:
        """`[T, S]`, columns from distance S - 1 to 0, to `[T, S]`, columns by slot."""

    def sinusoid(self, length: int, width: int) -> Tensor:
        """The encodings of the distances length - 1, ..., 0, `[length, width]`."""


class Reference:
    """The adapter of `compressive.py`."""

    module = compressive  # for what the file promises beyond the rules

    def build(self, settings: Settings) -> nn.Module:
        return compressive.CompressiveTransformer(compressive.Config(**settings._asdict()))

    def start(self, model: nn.Module, batch_size: int) -> Any:
        return model.initial_memory(batch_size)

    def step(self, model: nn.Module, tokens: Tensor, state: Any) -> Step:
        return Step(*model(tokens, state))

    def read(self, state: Any) -> list[Slots]:
        return [Slots(mem, c_mem) for mem, c_mem in zip(state.mem, state.c_mem, strict=True)]

    def replace(self, state: Any, slots: Sequence[Slots]) -> Any:
        return compressive.Memory(*(tuple(part) for part in zip(*slots, strict=True)))

    def compression_parameters(self, model: nn.Module) -> list[list[nn.Parameter]]:
        listed = {id(p) for p in model.parameter_groups()[1]}
        return [[p for p in layer.parameters() if id(p) in listed] for layer in model.layers]

    def compress(self, model: nn.Module, layer: int, old: Tensor, usage: Tensor) -> Tensor:
        f_c = model.layers[layer].compress
        return f_c(old, usage) if model.config.compression == "most_used" else f_c(old)

    def loss(self, model: nn.Module, layer: int, h: Tensor, old: Tensor) -> Tensor:
        layer = model.layers[layer]
        if model.config.compression_loss == "autoencoding":
            return compressive.autoencoding_loss(layer.decompress, old, layer.compress(old))
        return compressive.attention_reconstruction_loss(
            layer.attention, h, old, layer.compress(old)
        )

    def weights(self, model: nn.Module) -> dict[str, Any]:
        config = model.config
        D, c = config.d_model, config.compression_rate
        layers = []
        for layer in model.layers:
            attention, (ff1, _, ff2) = layer.attention, layer.feed_forward
            named = {
                "norm1_weight": layer.attention_norm.weight,
                "norm1_bias": layer.attention_norm.bias,
                "query": attention.query.weight.T,
                "key": attention.key_value.weight[:D].T,
                "value": attention.key_value.weight[D:].T,
                "relative_key": attention.relative_key.weight.T,
                "content_bias": attention.content_bias,
                "position_bias": attention.position_bias,
                "output": attention.output.weight.T,
                "norm2_weight": layer.feed_forward_norm.weight,
                "norm2_bias": layer.feed_forward_norm.bias,
                "ff1_weight": ff1.weight.T,
                "ff1_bias": ff1.bias,
                "ff2_weight": ff2.weight.T,
                "ff2_bias": ff2.bias,
            }
            if "conv" in config.compression:  # [c, in, out]
                named["convolution"] = layer.compress.conv.weight.view(D, c, D).permute(1, 2, 0)
            if config.compression == "dilated_conv":  # [2, in, out] each, the older memory first
                named["dilated"] = [
                    conv.weight.view(D, 2, D).permute(1, 2, 0) for conv in layer.compress.dilated
                ]
            if layer.decompress is not None:  # [c, recovered, compressed]
                named["transposed_convolution"] = layer.decompress.conv.weight.view(c, D, D)
            layers.append(named)
        whole = {
            "layers": layers,
            "embedding": model.embedding.weight,
            "logits_weight": model.logits.weight.T,
            "logits_bias": model.logits.bias,
        }
        if config.norm_first:
            whole |= {"norm_weight": model.norm.weight, "norm_bias": model.norm.bias}
        return whole

    def layers(self, model: nn.Module, h: Tensor, state: Any) -> tuple[Tensor, Any, list[Tensor]]:
        S = state.c_mem[0].size(1) + state.mem[0].size(1) + h.size(1)
        positions = self.sinusoid(S, h.size(2))
        attention: list[Tensor] = []
        slots = []
        for layer, mem, c_mem in zip(model.layers, *state, strict=True):
            keep = layer.attention.register_forward_hook(
                lambda module, args, output: attention.append(output[1])
            )
            h, mem, c_mem, _ = layer(h, mem, c_mem, positions)
            keep.remove()
            slots.append(Slots(mem, c_mem))
        return h, self.replace(state, slots), attention

    def relative_shift(self, scores: Tensor) -> Tensor:
        return compressive.relative_shift(nn.functional.pad(scores, (0, 1)))

    def sinusoid(self, length: int, width: int) -> Tensor:
        return compressive.sinusoid(torch.arange(length - 1.0, -1, -1), width)
