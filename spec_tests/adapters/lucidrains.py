"""The adapter of https://github.com/lucidrains/compressive-transformer-pytorch. What it needs:

python -m pip install --no-deps compressive-transformer-pytorch==0.4.0 mogrifier==0.0.5 einops
"""

from importlib.metadata import version

import torch
from compressive_transformer_pytorch.compressive_transformer_pytorch import (
    CompressiveTransformer,
    Memory,
)


class Adapter:
    declares = {
        "name": "lucidrains",
        "version": version("compressive-transformer-pytorch"),
        "overflow": "pad",
        "loss_in_eval": False,
        "compressions": ("conv",),
        "compression_losses": ("attention",),
        "norms": ("pre",),
        "segments": "full",
        "mem_len": "segment",
        "c_mem_len": "block",
    }

    def build(self, s):
        return CompressiveTransformer(
            num_tokens=s.vocab_size,
            dim=s.d_model,
            seq_len=s.segment,
            depth=s.n_layers,
            mem_len=s.mem_len,
            cmem_len=s.c_mem_len,
            cmem_ratio=s.compression_rate,
            heads=s.n_heads,
            gru_gated_residual=False,
            enhanced_recurrence=False,
        )

    def start(self, model, batch_size):
        like = model.token_emb.weight
        empty = like.new_zeros(model.depth, batch_size, 0, like.size(1))
        return Memory(empty, empty)

    def step(self, model, tokens, state):
        return model(tokens, state)

    def read(self, state):
        return list(zip(state.mem, state.compressed_mem, strict=True))

    def compression_parameters(self, model):
        return [list(layer.fn.fn.compress_mem_fn.parameters()) for layer in model.attn_layers]

    def replace(self, state, slots):
        return Memory(*(torch.stack(part) for part in zip(*slots, strict=True)))

    def compress(self, model, layer, old, usage):
        return model.attn_layers[layer].fn.fn.compress_mem_fn(old)

    def weights(self, model):
        def named(layer):
            attention = layer.fn.fn
            key, value = attention.to_kv.weight.chunk(2)
            return {"query": attention.to_q.weight.T, "key": key.T, "value": value.T}

        return {"layers": [named(layer) for layer in model.attn_layers]}
