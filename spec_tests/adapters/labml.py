"""The adapter of labml, https://nn.labml.ai/transformers/compressive. What it needs:

python -m pip install numpy
python -m pip install --no-deps labml-nn==0.4.137 labml==0.4.168 labml-helpers==0.4.89 gitpython \
    gitdb smmap pyyaml
"""

from importlib.metadata import version
from types import SimpleNamespace

from labml_nn.transformers.compressive import (
    AttentionReconstructionLoss,
    CompressiveTransformer,
    CompressiveTransformerLayer,
    Conv1dCompression,
)
from labml_nn.transformers.compressive.experiment import (
    AutoregressiveModel,
    CompressedMemory,
    Configs,
)
from labml_nn.transformers.feed_forward import FeedForward
from labml_nn.transformers.xl.relative_mha import RelativeMultiHeadAttention


class Adapter:
    declares = {
        "name": "labml",
        "version": version("labml-nn"),
        "layout": "time_first",
        "storage": "raw",
        "loss_over_layers": "sum",
        "compressions": ("conv",),
        "compression_losses": ("attention",),
        "norms": ("pre",),
    }

    def build(self, s):
        layer = CompressiveTransformerLayer(
            d_model=s.d_model,
            self_attn=RelativeMultiHeadAttention(s.n_heads, s.d_model, s.dropout),
            feed_forward=FeedForward(s.d_model, s.d_ff, s.dropout),
            dropout_prob=s.dropout,
            compress=Conv1dCompression(s.compression_rate, s.d_model),
        )
        transformer = CompressiveTransformer(layer, s.n_layers)
        model = AutoregressiveModel(s.vocab_size, s.d_model, transformer)
        model.rule = SimpleNamespace(model=model, **s._asdict())  # what its trainer keeps
        return model

    def start(self, model, batch_size):
        empty = model.src_embed.weight.new_zeros(0, batch_size, model.rule.d_model)
        return CompressedMemory([empty] * model.rule.n_layers, [empty] * model.rule.n_layers)

    def step(self, model, tokens, state):
        logits, inputs = model(tokens, state)
        state, old = Configs.merge_compress_memory(model.rule, state, inputs)
        loss = AttentionReconstructionLoss(model.transformer.layers)(inputs, old) if old else None
        return logits, state if state.mem else self.start(model, tokens.size(1)), loss

    def read(self, state):
        return list(zip(state.mem, state.c_mem, strict=True))

    def compression_parameters(self, model):
        return [list(layer.compress.parameters()) for layer in model.transformer.layers]

    def replace(self, state, slots):
        return CompressedMemory(*(list(part) for part in zip(*slots, strict=True)))

    def compress(self, model, layer, old, usage):
        return model.transformer.layers[layer].compress(old)

    def weights(self, model):
        def named(layer):
            a = layer.self_attn
            norm = layer.norm_self_attn
            matrices = {x: getattr(a, x).linear.weight.T for x in ("query", "key", "value")}
            biases = {"value_bias": a.value.linear.bias, "norm1_bias": norm.bias}
            return {**matrices, **biases, "norm1_weight": norm.weight}

        return {"layers": [named(layer) for layer in model.transformer.layers]}
