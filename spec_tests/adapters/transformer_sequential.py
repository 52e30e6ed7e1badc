"""The adapter of https://github.com/facebookresearch/transformer-sequential, at commit 9650fc9: its
compressive.py, of mean pooling, in which each query has a window of its own. What it needs is torch
and a checkout, `transformer-sequential` in the folder that the variable THIRDPARTY names.
"""

import os
import sys
from argparse import Namespace
from copy import copy

import torch

sys.path.append(os.environ["THIRDPARTY"] + "/transformer-sequential")

from models.compressive import CompressiveTransformer  # noqa: E402

WINDOW = "each query has a window of its own, and sees no older slot"
AT_ONCE = "slots are read in the step that makes them, by the queries whose window has passed them"


class Adapter:
    declares = {
        "name": "transformer-sequential",
        "version": "9650fc9",
        "start": "zeros",
        "storage": "raw",
        "positions": "separate",
        "overflow": "divisible",
        "compressions": ("mean_pool",),
        "compression_losses": ("none",),
        "mem_len": "segment",  # of a longer one no window holds all
        "not_claimed": {
            "ATT-3": WINDOW,
            "MEM-6": AT_ONCE,
            "MEM-9": f"{WINDOW}; {AT_ONCE}",
            "test_ATT_2_every_slot_reaches_every_logit": WINDOW,
            "test_MOD_5_a_width_that_heads_do_not_divide": "head_dim is a setting of its own",
        },
    }

    def build(self, s):
        return CompressiveTransformer(
            Namespace(
                vocab_sz=s.vocab_size,
                hid_sz=s.d_model,
                nheads=s.n_heads,
                head_dim=s.d_model // s.n_heads,
                nlayers=s.n_layers,
                inner_hid_sz=s.d_ff,
                attn_lim=s.mem_len,
                compress_size=s.c_mem_len * s.compression_rate,
                compress_rate=s.compression_rate,
                pre_norm=s.norm_first,
                dropout=s.dropout,
            )
        )

    def start(self, model, batch_size):
        model.args.device = model.in_emb.weight.device
        return model.init_hid_cache(batch_size)

    def step(self, model, tokens, state):
        logits, state, loss = model(tokens, state)
        return logits, [x.detach() for x in state], loss  # detached by its trainer

    def read(self, state):
        layers = len(state) // 2
        return list(zip(state[:layers], state[layers:], strict=True))

    def compression_parameters(self, model):
        return [[] for _ in model.layers]

    def replace(self, state, slots):
        return [mem for mem, _ in slots] + [c_mem for _, c_mem in slots]

    def compress(self, model, layer, old, usage):
        """A step with this block in memory, whose layers keep the slots that they are given."""
        given = []

        def no_layer(h, h_memory, c_memory):
            given.append(c_memory)
            return h, 0

        model = copy(model)
        model.get_layer = lambda _: no_layer
        tokens = torch.zeros(old.shape[:2], dtype=torch.int64, device=old.device)
        model(tokens, [old] * len(model.layers) + [old[:, :0]] * len(model.layers))
        return given[layer]
