"""The adapter of https://github.com/Jun-tsune/CS282_Final_Project at commit 88c3a46: its backbone,
with an embedding and a head. It needs nothing but torch and

export THIRDPARTY=/path/to  # of the folder that the checkout is in, as CS282_Final_Project
"""

import os
import sys

import torch
from torch import nn

sys.path.append(os.environ["THIRDPARTY"] + "/CS282_Final_Project")

from src.models.compressive_transformer_backbone import (  # noqa: E402
    CompressTransformerBackBone,
    Memory,
)
from src.utils.utils import CompressModelConfig  # noqa: E402


class Model(nn.Module):
    def __init__(self, s):
        super().__init__()
        config = CompressModelConfig(
            n_positions=s.segment,
            n_embd=s.d_model,
            n_layer=s.n_layers,
            n_head=s.n_heads,
            resid_pdrop=s.dropout,
            embd_pdrop=s.dropout,
            attn_pdrop=s.dropout,
            recon_attn_dropout=s.dropout,
            mem_len=s.mem_len,
            cmem_ratio=s.compression_rate,
        )
        config.cmem_len = s.c_mem_len  # as an argument it would be ignored
        self.embedding = nn.Embedding(s.vocab_size, s.d_model)
        self.backbone = CompressTransformerBackBone(config)
        self.head = nn.Linear(s.d_model, s.vocab_size)

    def forward(self, tokens, memories):
        output, memories, loss = self.backbone(self.embedding(tokens), memories=memories)
        return self.head(output.last_hidden_state), memories, loss


class Adapter:
    declares = {
        "name": "CS282_Final_Project",
        "version": "88c3a46",
        "overflow": "pad",
        "loss_in_eval": False,
        "compressions": ("conv",),
        "compression_losses": ("attention",),
        "norms": ("pre",),
        "segments": "full",
        "not_claimed": {"ATT-4": "a position has an embedding of its own in its segment, too"},
    }

    def build(self, s):
        return Model(s)

    def start(self, model, batch_size):
        return None

    def step(self, model, tokens, state):
        return model(tokens, state)

    def read(self, state):
        return list(zip(*state, strict=True)) if state else None

    def compression_parameters(self, model):
        return [list(block.attn.compress.parameters()) for block in model.backbone.blocks]

    def replace(self, state, slots):
        return Memory(*(torch.stack(part) for part in zip(*slots, strict=True)))

    def compress(self, model, layer, old, usage):
        return model.backbone.blocks[layer].attn.compress(old)

    def weights(self, model):
        def named(attention):
            key, value = attention.to_kv.weight.chunk(2)
            return {"query": attention.to_q.weight.T, "key": key.T, "value": value.T}

        return {"layers": [named(block.attn) for block in model.backbone.blocks]}
