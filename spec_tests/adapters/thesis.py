"""The adapter of https://github.com/andactan/thesis at commit 923ff39: the module of its layers.py,
which its agents read observations with. It needs nothing but torch and

export THIRDPARTY=/path/to  # of the folder that the checkout is in, as thesis
"""

import os
import sys
from types import SimpleNamespace

import torch

sys.path.append(os.environ["THIRDPARTY"] + "/thesis/models")  # without the agents' rlpyt
sys.modules.setdefault("mogrifier", SimpleNamespace(Mogrifier=None))  # an option, not used here

from layers import CompressiveTransformer, Memory  # noqa: E402


class Adapter:
    declares = {
        "name": "thesis",
        "version": "923ff39",
        "overflow": "pad",
        "loss_in_eval": False,
        "compressions": ("conv",),
        "compression_losses": ("attention",),
        "norms": ("pre",),
        "segments": "full",
    }

    def build(self, s):
        return CompressiveTransformer(
            num_tokens=s.vocab_size,
            dim=s.d_model,
            sequence_len=s.segment,
            depth=s.n_layers,
            embedding_dim=s.d_model,
            memory_len=s.mem_len,
            cmem_len=s.c_mem_len,
            cmem_ratio=s.compression_rate,
            heads=s.n_heads,
            gru_gated_residual=False,
            attention_dropout=s.dropout,
            ff_dropout=s.dropout,
            dropout=s.dropout,
            reconstruction_attention_dropout=s.dropout,
        )

    def start(self, model, batch_size):
        return None

    def step(self, model, tokens, state):
        return model(tokens, state)

    def read(self, state):
        return list(zip(*state, strict=True)) if state else None

    def compression_parameters(self, model):
        layers = model.attention_layers
        return [list(layer.fn.fn.compress_memory_fn.parameters()) for layer in layers]

    def replace(self, state, slots):
        return Memory(*(torch.stack(part) for part in zip(*slots, strict=True)))

    def compress(self, model, layer, old, usage):
        return model.attention_layers[layer].fn.fn.compress_memory_fn(old)

    def weights(self, model):
        def named(attention):
            key, value = attention.to_kv.weight.chunk(2)
            return {"query": attention.to_q.weight.T, "key": key.T, "value": value.T}

        return {"layers": [named(layer.fn.fn) for layer in model.attention_layers]}
