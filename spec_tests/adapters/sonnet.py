"""The adapter of the paper's first author's own code, in Sonnet 1 and TensorFlow. What it needs, in
Python 3.11 and an environment of its own:

python -m pip install torch hypothesis pytest "numpy<2" tensorflow-cpu==2.15.1
python -m pip install --no-deps dm-sonnet==1.36 contextlib2
"""

import collections
import collections.abc
import sys
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from tensorflow.compat import v1 as tf
from tensorflow.python.util import nest

from spec_tests.bridge import Bridge, tensor

# ------------------------------------------- what Sonnet 1 imports and has not been there for years


def stand_in(name, **members):
    module = ModuleType(name)
    vars(module).update(members)
    sys.modules[name] = module
    return module


PACKAGE = Path(find_spec("sonnet").submodule_search_locations[0])


def bare(name):
    """A package of Sonnet's without what its __init__ imports."""
    folder = PACKAGE.parent.joinpath(*name.split("."))
    return stand_in(name, __path__=[str(folder)])


for name in ("Callable", "Iterable", "Mapping", "Sequence"):
    setattr(collections, name, getattr(collections.abc, name))
stand_in("tensorflow.contrib", framework=SimpleNamespace(nest=nest))
stand_in("tensorflow.contrib.eager")
stand_in("tensorflow.contrib.eager.python", tfe=None)
bare("sonnet")
bare("sonnet.python.modules.nets")
getters = bare("sonnet.python.custom_getters")
stand_in("sonnet.protos", module_pb2=SimpleNamespace(SonnetModule=object))

from sonnet.python.custom_getters.context import Context  # noqa: E402
from sonnet.python.custom_getters.stop_gradient import stop_gradient  # noqa: E402

getters.Context = Context
getters.stop_gradient = stop_gradient

from sonnet.python.modules import basic  # noqa: E402
from sonnet.python.modules.nets import transformer  # noqa: E402

tf.logging.set_verbosity(tf.logging.ERROR)
tf.disable_v2_behavior()

# ----------------------------------------------------------------------------------- its functions

COMPRESSORS = {
    "conv": (transformer.ConvCompressor, {}),
    "mean_pool": (transformer.PoolCompressor, {"pooling": "AVG"}),
    "max_pool": (transformer.PoolCompressor, {"pooling": "MAX"}),
}


class Graph:
    """A graph in which the variables are placeholders, so that a step is a function of them."""

    def __init__(self):
        self.graph = tf.Graph()
        self.session = tf.Session(graph=self.graph)
        self.parameters = {}
        self.gradients = None

    def build(self, function):
        with self.graph.as_default(), tf.variable_scope("", custom_getter=self.get_variable):
            self.inputs, self.outputs = function()

    def get_variable(self, getter, name, shape, dtype=tf.float32, **_):
        if name not in self.parameters:
            with tf.control_dependencies(None):  # outside of the tf.cond that it may stand in
                self.parameters[name] = tf.placeholder(dtype, shape)
        return self.parameters[name]

    def fed(self, parameters, inputs):
        placeholders = [*self.parameters.values(), *self.inputs]
        return dict(zip(placeholders, [*parameters, *inputs], strict=True))

    def run(self, feed):
        return self.session.run(self.outputs, feed)

    def pull_back(self, feed, by_outputs):
        """The gradients by parameters and inputs but the tokens, which come first."""
        if self.gradients is None:
            with self.graph.as_default():
                self.by_outputs = [tf.placeholder(x.dtype) for x in self.outputs]
                wanted = [*self.parameters.values(), *self.inputs[1:]]
                found = tf.gradients(self.outputs, wanted, self.by_outputs)
                zeros = [tf.zeros_like(x) for x in wanted]
                self.gradients = [z if x is None else x for x, z in zip(found, zeros, strict=True)]
        feed = {**feed, **dict(zip(self.by_outputs, by_outputs, strict=True))}
        return self.session.run(self.gradients, feed)


@cache
def step_graph(s, T, training, slots):
    """The graph of a step of T tokens behind so many slots of memory and of compressed memory."""
    compressor, configuration = COMPRESSORS[s.compression]
    if s.compression == "conv":
        configuration = {"loss": {"attention": "mha", "autoencoding": "ae"}[s.compression_loss]}
    core = {
        "value_size": s.d_model // s.n_heads,
        "num_heads": s.n_heads,
        "num_layers": s.n_layers,
        "mlp_hidden_sizes": [s.d_ff],
        "dropout_rate": s.dropout,
        "layer_norm": "input" if s.norm_first else "output",
    }

    def step():
        tokens = tf.placeholder(tf.int64, [None, T])
        index = tf.placeholder(tf.float32, [None, 1])
        memories = [tf.placeholder(tf.float32, [None, N, s.d_model]) for N in slots]
        before = [
            transformer.CompressedMemoryState(mem, c_mem, index)
            for mem, c_mem in zip(memories[0::2], memories[1::2], strict=True)
        ]
        model = transformer.CompressiveTransformer(
            core, T, s.mem_len, s.c_mem_len, s.compression_rate, compressor, configuration
        )
        h, after = model(tf.one_hot(tokens, s.vocab_size), before, is_training=training)
        logits = basic.BatchApply(basic.Linear(s.vocab_size, name="logits"))(h)
        (loss,) = tf.get_collection("auxiliary_losses") or [tf.zeros([])]
        outputs = [logits, loss]
        for state in after:
            outputs += [state.episodic_memory, state.compressed_memory]
        return [tokens, *memories, index], [*outputs, after[0].index]

    graph = Graph()
    graph.build(step)
    return graph


@cache
def compression_graph(s, N):
    """The graph of f_c for N memories."""
    compressor, configuration = COMPRESSORS[s.compression]
    if s.compression == "conv":
        configuration = {"loss": "ae"}  # the one that needs no attention

    def compression():
        old = tf.placeholder(tf.float32, [None, N, s.d_model])
        f_c = compressor(
            compression_rate=s.compression_rate,
            compressed_memory_size=s.c_mem_len,
            episodic_memory_size=s.mem_len,
            **configuration,
        )
        nothing = SimpleNamespace(queries=tf.zeros([1, 1, 1, 1]))
        compressed, _ = f_c(old, attention_state=nothing, attention_module=None)
        return [old], [compressed]

    graph = Graph()
    graph.build(compression)
    return graph


# -------------------------------------------------------------------------------------- the adapter


class Model(Bridge):
    def __init__(self, s):
        slots = (s.mem_len, s.c_mem_len) * s.n_layers
        graph = step_graph(s._replace(segment=0), s.segment, True, slots)
        parameters = graph.parameters.items()
        super().__init__({name: torch.zeros(*x.shape.as_list()) for name, x in parameters})
        self.settings = s

    def call(self, tokens, parameters, memories):
        lengths = tuple(x.shape[1] for x in memories[:-1])
        s = self.settings._replace(segment=0)
        graph = step_graph(s, tokens.shape[1], self.training, lengths)
        feed = graph.fed(parameters, [tokens, *memories])
        return graph.run(feed), lambda by_outputs: graph.pull_back(feed, by_outputs)

    def named(self, prefix):
        """The parameters below a scope of Sonnet's, by the names that they have there."""
        found = self.named_parameters()
        return {name[len(prefix) :]: x for name, x in found if name.startswith(prefix)}

    def compressor(self, layer):
        number = f"_{layer}" if layer > 0 else ""
        return self.named(f"compressive_transformer/conv_compressor{number}/")


class Adapter:
    declares = {
        "name": "Sonnet",
        "version": version("dm-sonnet"),
        "start": "zeros",
        "positions": "separate",
        "overflow": "drop",
        "segments": "rate",  # a shorter one is compressed with what was compressed before it
        "mem_len": "segment",  # of a longer segment, its loss takes the last queries alone
        "loss_in_eval": False,
        "compressions": tuple(COMPRESSORS),
        "compression_losses": ("attention", "autoencoding"),
        "compiled": True,
        "dtype": "float32",
    }

    def build(self, settings):
        return Model(settings)

    def start(self, model, batch_size):
        s = model.settings
        mem = torch.zeros(batch_size, s.mem_len, s.d_model)
        c_mem = torch.zeros(batch_size, s.c_mem_len, s.d_model)
        return [*(mem, c_mem) * s.n_layers, torch.zeros(batch_size, 1)]  # at last the step

    def step(self, model, tokens, state):
        logits, loss, state = model(tokens, state)
        return logits, [x.detach() for x in state], loss  # a session hands on numbers

    def read(self, state):
        return list(zip(state[0:-1:2], state[1:-1:2], strict=True))

    def replace(self, state, slots):
        return [part for pair in slots for part in pair] + [state[-1]]

    def compression_parameters(self, model):
        return [model.compressor(i).values() for i in range(model.settings.n_layers)]

    def compress(self, model, layer, old, usage):
        graph = compression_graph(model.settings._replace(segment=0), old.size(1))
        (placeholder,) = graph.inputs
        feed = {placeholder: old}
        of_compression = model.compressor(layer)
        if "conv_1d/w" in of_compression:  # pooling has none
            weight = graph.parameters["conv_compressor/conv_1d/w"]
            feed[weight] = of_compression["conv_1d/w"].detach()
        (compressed,) = graph.run(feed)
        return tensor(compressed)

    def weights(self, model):
        layers = []
        for i in range(model.settings.n_layers):
            scope = f"compressive_transformer/transformer_tower/layer_{i}/"
            inside = model.named(scope)
            named = {
                x: inside[f"multihead_attention/{x}/linear/w"] for x in ("query", "key", "value")
            }
            of_compression = model.compressor(i)
            if "conv_1d/w" in of_compression:
                named["convolution"] = of_compression["conv_1d/w"]
            if "conv_1d_transpose/w" in of_compression:
                (transposed,) = of_compression["conv_1d_transpose/w"]  # of height 1
                named["transposed_convolution"] = transposed
            layers.append(named)
        return {"layers": layers}
