"""The adapter of https://github.com/vilmarzti/long_context_transformers, at commit aefff9f. What it
needs is a checkout, `long_context_transformers` in the folder that THIRDPARTY names, and

python -m pip install --no-deps transformers==4.16.2
python -m pip install numpy pyyaml regex requests tqdm sacremoses tokenizers "huggingface-hub<0.20"
"""

import os
import sys
from types import SimpleNamespace

sys.path.append(os.environ["THIRDPARTY"] + "/long_context_transformers")
sys.modules["longcontext.utils.training"] = SimpleNamespace(train=None)  # it needs tensorboard

from longcontext.transformers.compressive_transformer import (  # noqa: E402
    CompressiveTransformerConfig,
    CompressiveTransformerWithLMHead,
)


class Adapter:
    declares = {
        "name": "long_context_transformers",
        "version": "aefff9f",
        "start": "zeros",
        "loss_over_layers": "sum",
        "compressions": ("conv",),
        "compression_losses": ("attention",),
        "norms": ("post",),
        "dtype": "float32",  # to which its attention casts masked scores
        "not_claimed": {
            "test_MOD_5_a_width_that_heads_do_not_divide": "d_head is a setting of its own",
        },
    }

    def build(self, s):
        config = CompressiveTransformerConfig(
            compression_rate=s.compression_rate,
            c_mem_length=s.c_mem_len,
            mem_len=s.mem_len,
            vocab_size=s.vocab_size,
            cutoffs=[],
            div_val=1,
            d_model=s.d_model,
            d_embed=s.d_model,
            n_head=s.n_heads,
            d_head=s.d_model // s.n_heads,
            d_inner=s.d_ff,
            n_layer=s.n_layers,
            dropout=s.dropout,
        )
        return CompressiveTransformerWithLMHead(config)

    def start(self, model, batch_size):
        inner = model.transformer
        mem = inner.init_memories(inner.mem_length, batch_size)  # None of length 0
        c_mem = inner.init_memories(inner.c_mem_length, batch_size)
        nothing = inner.init_memories(1, batch_size)
        return mem, c_mem, [slot[:0] for slot in nothing]

    def step(self, model, tokens, state):
        mem, c_mem, nothing = state
        out = model(tokens, mems=mem, c_mems=c_mem, return_dict=True)
        state = out.mems, out.c_mems, nothing
        return out.prediction_scores, state, out.attention_reconstruction_loss

    def read(self, state):
        mem, c_mem, nothing = state  # time first; of memory there may be one more than layers
        layers = zip(nothing, mem or nothing, c_mem or nothing, strict=False)
        return [(mem.transpose(0, 1), c_mem.transpose(0, 1)) for _, mem, c_mem in layers]

    def compression_parameters(self, model):
        return [list(layer.compression.parameters()) for layer in model.transformer.layers]

    def replace(self, state, slots):
        mem, c_mem = ([x.transpose(0, 1) for x in part] for part in zip(*slots, strict=True))
        return mem, c_mem, [x[:0] for x in mem]

    def compress(self, model, layer, old, usage):
        compression = model.transformer.layers[layer].compression
        return compression(old.transpose(0, 1)).transpose(0, 1)

    def weights(self, model):
        def named(layer):
            attention = layer.self_attn
            ff = layer.feed_forward
            ff1 = ff.CoreNet[0]
            ff2 = ff.CoreNet[3]
            query, key, value = attention.qkv_net.weight.T.chunk(3, dim=1)
            return {
                "query": query,
                "key": key,
                "value": value,
                "relative_key": attention.r_net.weight.T,
                "content_bias": attention.r_w_bias,
                "position_bias": attention.r_r_bias,
                "output": attention.o_net.weight.T,
                "norm1_weight": attention.layer_norm.weight,
                "norm1_bias": attention.layer_norm.bias,
                "norm2_weight": ff.layer_norm.weight,
                "norm2_bias": ff.layer_norm.bias,
                "ff1_weight": ff1.weight.T,
                "ff1_bias": ff1.bias,
                "ff2_weight": ff2.weight.T,
                "ff2_bias": ff2.bias,
                "convolution": layer.compression.conv.weight.permute(2, 1, 0),
                "convolution_bias": layer.compression.conv.bias,
            }

        embedding = model.transformer.word_emb
        (logits,) = model.crit.out_layers
        return {
            "layers": [named(layer) for layer in model.transformer.layers],
            "embedding": embedding.emb_layers[0].weight * embedding.emb_scale,
            "logits_weight": logits.weight.T,
            "logits_bias": logits.bias,
        }
