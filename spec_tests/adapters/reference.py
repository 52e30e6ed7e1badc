"""The adapter of `compressive.py`."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import compressive


class Adapter:
    declares = {"name": "compressive.py", "bptt": True, "compress_nothing": True}

    def __init__(self, module: ModuleType = compressive) -> None:
        self.module = module

    def build(self, settings: Any) -> nn.Module:
        config = settings._asdict()
        del config["segment"]  # no length is built in
        return self.module.CompressiveTransformer(self.module.Config(**config))

    def start(self, model: nn.Module, batch_size: int) -> Any:
        return model.initial_memory(batch_size)

    def step(self, model: nn.Module, tokens: Tensor, state: Any) -> tuple[Tensor, Any, Tensor]:
        output = model(tokens, state)
        return output.logits, output.memory, output.compression_loss

    def read(self, state: Any) -> list[tuple[Tensor, Tensor]]:
        return list(zip(state.mem, state.c_mem, strict=True))

    def replace(self, state: Any, slots: Sequence[tuple[Tensor, Tensor]]) -> Any:
        return self.module.Memory(*(tuple(part) for part in zip(*slots, strict=True)))

    def compression_parameters(self, model: nn.Module) -> list[list[nn.Parameter]]:
        listed = {id(p) for p in model.parameter_groups()[1]}
        return [[p for p in layer.parameters() if id(p) in listed] for layer in model.layers]

    def compress(self, model: nn.Module, layer: int, old: Tensor, usage: Tensor) -> Tensor:
        f_c = model.layers[layer].compress
        return f_c(old, usage) if model.config.compression == "most_used" else f_c(old)

    def weights(self, model: nn.Module) -> dict[str, Any]:
        config = model.config
        D = config.d_model
        c = config.compression_rate
        layers = []
        for layer in model.layers:
            attention = layer.attention
            ff1, _, ff2 = layer.feed_forward
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
                named["transposed_convolution"] = layer.decompress.weight.view(c, D, D)
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

    # ------------------------------------------- for the first author's numbers (test_golden.py)

    def loss(self, model: nn.Module, layer: int, h: Tensor, old: Tensor) -> Tensor:
        layer = model.layers[layer]
        if model.config.compression_loss == "autoencoding":
            return self.module.autoencoding_loss(layer.decompress, old, layer.compress(old))
        attention = layer.attention
        return self.module.attention_reconstruction_loss(attention, h, old, layer.compress(old))

    def layers(self, model: nn.Module, h: Tensor, state: Any) -> tuple[Tensor, Any, list[Tensor]]:
        S = state.c_mem[0].size(1) + state.mem[0].size(1) + h.size(1)
        positions = self.module.sinusoid(torch.arange(S - 1.0, -1, -1), h.size(2))
        attention: list[Tensor] = []
        slots = []
        for layer, mem, c_mem in zip(model.layers, *state, strict=True):
            inputs = (h, mem, c_mem, positions)
            attention.append(layer(*inputs, need_weights=True).attention_weights)
            output = layer(*inputs, need_loss=False)  # a call of its own: weights cost the shortcut
            h = output.h
            slots.append((output.mem, output.c_mem))
        return h, self.replace(state, slots), attention

    def relative_shift(self, scores: Tensor) -> Tensor:
        return self.module.relative_shift(nn.functional.pad(scores, (0, 1)))

    def sinusoid(self, length: int, width: int) -> Tensor:
        return self.module.sinusoid(torch.arange(length - 1.0, -1, -1), width)
