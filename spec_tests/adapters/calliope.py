"""The adapter of https://github.com/steb6/Calliope at commit 949b3c6, an auto-encoder of music: its
encoder of one instrument, which takes a causal mask as well, and a head. It needs numpy and

export THIRDPARTY=/path/to  # of the folder that the checkout is in, as Calliope
"""

import os
import sys

import torch
from torch import nn

sys.path.append(os.environ["THIRDPARTY"] + "/Calliope")

from compressive_transformer import CompressiveEncoder  # noqa: E402

GRAPH = "memories keep their graph for all segments of a batch, and then begin anew"


class Model(nn.Module):
    def __init__(self, s):
        super().__init__()
        whole = CompressiveEncoder(
            d_model=s.d_model,
            heads=s.n_heads,
            ff_mul=2,
            attn_layer_dropout=s.dropout,
            reconstruction_attn_dropout=s.dropout,
            ff_dropout=s.dropout,
            layers=s.n_layers,
            vocab_size=s.vocab_size,
            seq_len=s.segment,
            mem_len=s.mem_len,
            cmem_len=s.c_mem_len,
            cmem_ratio=s.compression_rate,
            device="cpu",
        )
        self.settings = s
        self.encoder = whole.drums_encoder  # those of the other instruments are like it
        self.pos_emb = nn.Parameter(whole.pos_emb[0].detach())
        self.head = nn.Linear(s.d_model, s.vocab_size)

    def forward(self, tokens, mem, c_mem):
        B, T = tokens.shape[:2]
        mask = torch.ones(B, T, T, dtype=torch.bool, device=tokens.device).tril()
        h, mem, c_mem, loss, _ = self.encoder(tokens, mask, mem, c_mem, self.pos_emb)
        return self.head(h), (mem, c_mem), loss


class Adapter:
    declares = {
        "name": "Calliope",
        "version": "949b3c6",
        "start": "zeros",
        "overflow": "drop",
        "compressions": ("conv",),
        "compression_losses": ("attention",),
        "norms": ("pre",),
        "segments": "full",
        "mem_len": "segment",
        "c_mem_len": "block",
        "not_claimed": {
            "MEM-8": GRAPH,
            "test_LOSS_2_reaches_f_c_through_time_if_and_only_if_asked": GRAPH,
            "test_LOSS_2_leaves_the_language_model_loss_alone_in_every_step": GRAPH,
        },
    }

    def build(self, s):
        if s.segment < s.compression_rate:  # each segment is compressed by itself
            return NotImplemented
        return Model(s)

    def start(self, model, batch_size):
        s = model.settings
        like = model.pos_emb
        lengths = (s.mem_len, s.c_mem_len)
        return tuple(like.new_zeros(s.n_layers, batch_size, n, s.d_model) for n in lengths)

    def step(self, model, tokens, state):
        return model(tokens, *state)

    def read(self, state):
        return list(zip(*state, strict=True))

    def compression_parameters(self, model):
        layers = model.encoder.layers
        return [list(layer.mem_attn.fn.fn.compress_mem_fn.parameters()) for layer in layers]

    def replace(self, state, slots):
        return tuple(torch.stack(part) for part in zip(*slots, strict=True))

    def compress(self, model, layer, old, usage):
        return model.encoder.layers[layer].mem_attn.fn.fn.compress_mem_fn(old)

    def weights(self, model):
        def named(layer):
            query, key, value, _ = layer.mem_attn.fn.fn.multi_head_attention.linears
            return {"query": query.weight.T, "key": key.weight.T, "value": value.weight.T}

        return {"layers": [named(layer) for layer in model.encoder.layers]}
