"""A ViT as an ONNX graph, written operator by operator from the parameters.

Written by hand rather than traced: the graph is small, standard operators of opset 17
only, the batch size stays free, and no tracer ties it to a JAX version.
"""

import functools
from collections.abc import Callable, Mapping

import numpy as np
from einops import rearrange

from ultradino_jax.errors import MissingPackage
from ultradino_jax.models.vit import ViT
from ultradino_jax.weights.backbone import Backbone
from ultradino_jax.weights.load import with_image_size
from ultradino_jax.weights.meta import vit_state

OPSET = 17
IR_VERSION = 8  # what readers of opset 17 know


def import_onnx():
    """The onnx module. Raises MissingPackage naming the extra that brings it."""
    try:
        import onnx
    except ImportError as error:
        raise MissingPackage(
            "ONNX export needs onnx: pip install -e '.[interop]'"
        ) from error
    return onnx


class Graph:
    """Nodes and constants under construction; operators return the output's name."""

    def __init__(self):
        self.onnx = import_onnx()
        self.nodes, self.constants = [], {}
        self.types: dict[str, int] = {}  # of outputs that are not float32

    def constant(self, name: str, value: np.ndarray | np.generic) -> str:
        """A named weight or shape."""
        self.constants[name] = np.asarray(value, order="C")
        return name

    def op(self, kind: str, *inputs: str, name: str, **attributes) -> str:
        """Add one operator with a single output called `name`."""
        node = self.onnx.helper.make_node(
            kind, list(inputs), [name], name=name, **attributes
        )
        self.nodes.append(node)
        return name

    def linear(self, x: str, weight: np.ndarray, bias: np.ndarray, *, name: str) -> str:
        """x W^T + b with torch's [out,in] weight."""
        kernel = self.constant(f"{name}.weight", weight.T)
        x = self.op("MatMul", x, kernel, name=f"{name}.matmul")
        return self.op("Add", x, self.constant(f"{name}.bias", bias), name=name)

    def norm(
        self, x: str, state: Mapping[str, np.ndarray], *, name: str, of: str = ""
    ) -> str:
        """LayerNorm over the last axis; `of` names its parameters, `name` if empty."""
        inputs = [
            self.constant(f"{of or name}.{k}", state[f"{of or name}.{k}"])
            for k in ("weight", "bias")
        ]
        return self.op(
            "LayerNormalization", x, *inputs, name=name, axis=-1, epsilon=1e-6
        )

    def gelu(self, x: str, *, name: str) -> str:
        """x (1 + erf(x / sqrt 2)) / 2; opset 17 has no Gelu."""
        root = self.constant(f"{name}.root", np.float32(2**-0.5))
        y = self.op("Mul", x, root, name=f"{name}.scaled")
        y = self.op("Erf", y, name=f"{name}.erf")
        one = self.constant(f"{name}.one", np.float32(1))
        y = self.op("Add", y, one, name=f"{name}.shifted")
        half = self.constant(f"{name}.half", np.float32(0.5))
        x = self.op("Mul", x, half, name=f"{name}.halved")
        return self.op("Mul", x, y, name=name)

    def cut(self, tokens: str, first: int, *, name: str) -> str:
        """[B,T,D] -> tokens from `first` on."""
        bounds = [
            self.constant(f"cut.{k}{v}", np.array([v], np.int64))
            for k, v in (("start", first), ("end", 2**31 - 1), ("axis", 1))
        ]
        return self.op("Slice", tokens, *bounds, name=name)

    def model(self, inputs, outputs, *, doc: str, metadata: Mapping[str, str]):
        """The finished ModelProto. inputs, outputs: {name: shape}, see `types`."""
        helper, float32 = self.onnx.helper, self.onnx.TensorProto.FLOAT

        def values(shapes):
            return [
                helper.make_tensor_value_info(
                    name, self.types.get(name, float32), shape
                )
                for name, shape in shapes.items()
            ]

        constants = [
            self.onnx.numpy_helper.from_array(value, name)
            for name, value in self.constants.items()
        ]
        graph = helper.make_graph(
            self.nodes, "backbone", values(inputs), values(outputs), constants
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="ultradino_jax",
            doc_string=doc,
        )
        helper.set_model_props(model, dict(metadata))
        self.onnx.checker.check_model(model)
        return model


def _attention(graph: Graph, x: str, state, name: str, heads: int) -> str:
    d = state[f"{name}.proj.bias"].shape[0]
    qkv = graph.linear(
        x, state[f"{name}.qkv.weight"], state[f"{name}.qkv.bias"], name=f"{name}.qkv"
    )
    shape = graph.constant(
        f"{name}.heads", np.array([0, 0, 3, heads, d // heads], np.int64)
    )
    qkv = graph.op("Reshape", qkv, shape, name=f"{name}.split")
    parts = []
    for i, which in enumerate("qkv"):
        index = graph.constant(f"{name}.{which}.index", np.array(i, np.int64))
        part = graph.op("Gather", qkv, index, name=f"{name}.{which}", axis=2)
        # [B,T,A,E]; the keys come transposed.
        order = [0, 2, 3, 1] if which == "k" else [0, 2, 1, 3]
        parts.append(
            graph.op("Transpose", part, name=f"{name}.{which}.heads", perm=order)
        )
    q, k, v = parts
    scale = graph.constant(f"{name}.scale", np.float32((d // heads) ** -0.5))
    q = graph.op("Mul", q, scale, name=f"{name}.q.scaled")
    logits = graph.op("MatMul", q, k, name=f"{name}.logits")
    weights = graph.op("Softmax", logits, name=f"{name}.weights", axis=-1)
    x = graph.op("MatMul", weights, v, name=f"{name}.mixed")
    x = graph.op("Transpose", x, name=f"{name}.mixed.tokens", perm=[0, 2, 1, 3])
    shape = graph.constant(f"{name}.merge", np.array([0, 0, d], np.int64))
    x = graph.op("Reshape", x, shape, name=f"{name}.merged")
    return graph.linear(
        x, state[f"{name}.proj.weight"], state[f"{name}.proj.bias"], name=name
    )


def _block(graph: Graph, x: str, state, i: int, heads: int) -> str:
    name = f"blocks.{i}"

    def residual(x, y, which):
        gain = state.get(f"{name}.ls{which}.gamma")
        if gain is not None:
            gain = graph.constant(f"{name}.ls{which}.gamma", gain)
            y = graph.op("Mul", y, gain, name=f"{name}.ls{which}")
        return graph.op("Add", x, y, name=f"{name}.residual{which}")

    y = graph.norm(x, state, name=f"{name}.norm1")
    x = residual(x, _attention(graph, y, state, f"{name}.attn", heads), 1)
    y = graph.norm(x, state, name=f"{name}.norm2")
    for fc in ("fc1", "fc2"):
        weight, bias = (state[f"{name}.mlp.{fc}.{k}"] for k in ("weight", "bias"))
        y = graph.linear(y, weight, bias, name=f"{name}.mlp.{fc}")
        if fc == "fc1":
            y = graph.gelu(y, name=f"{name}.mlp.gelu")
    return residual(x, y, 2)


def _tokens(graph: Graph, state, image_size: int) -> str:
    """'pixel_values' [batch,C,S,S] -> [batch,T,D] = [CLS, registers, patches]."""
    kernel = state["patch_embed.proj.weight"]
    d, p = kernel.shape[0], kernel.shape[-1]
    weights = [
        graph.constant(f"patch_embed.proj.{k}", state[f"patch_embed.proj.{k}"])
        for k in ("weight", "bias")
    ]
    x = graph.op(
        "Conv", "pixel_values", *weights, name="patch_embed", strides=[p, p],
        kernel_shape=[p, p],
    )  # fmt: skip
    count = (image_size // p) ** 2
    shape = graph.constant("patch_embed.flat", np.array([0, d, count], np.int64))
    x = graph.op("Reshape", x, shape, name="patch_embed.columns")
    x = graph.op("Transpose", x, name="patch_embed.patches", perm=[0, 2, 1])
    position = graph.constant("pos_embed.patches", state["pos_embed"][:, 1:])
    x = graph.op("Add", x, position, name="patch_embed.positioned")
    prefix = state["cls_token"] + state["pos_embed"][:, :1]
    if "register_tokens" in state:
        prefix = np.concatenate([prefix, state["register_tokens"]], axis=1)
    shape = graph.op("Shape", x, name="shape")
    zero = graph.constant("zero", np.array([0], np.int64))
    batch = graph.op("Gather", shape, zero, name="batch", axis=0)
    rest = graph.constant("prefix.shape", np.array(prefix.shape[1:], np.int64))
    shape = graph.op("Concat", batch, rest, name="prefix.full_shape", axis=0)
    prefix = graph.constant("prefix", prefix)
    prefix = graph.op("Expand", prefix, shape, name="prefix.expanded")
    return graph.op("Concat", prefix, x, name="tokens", axis=1)


def vit_onnx(
    backbone: Backbone,
    extend: Callable[[Graph, dict], Mapping[str, tuple]] | None = None,
    metadata: Mapping[str, str] | None = None,
):
    """Backbone -> onnx.ModelProto for images of its `image_size`, any batch size.

    Input 'pixel_values' [batch,C,S,S], normalised with the mean and std kept in the
    model's metadata. Outputs 'cls' [batch,D] and 'patch' [batch,N,D], final-normed.

    extend: adds a head. It is called with the graph and {'cls', 'patch': names of those
    outputs, 'blocks': names of the residual stream [batch,T,D] after every block,
    'normed': function of a block's index to the name of its final-normed tokens} and
    returns {output name: shape}, which are then the outputs instead. metadata: strings
    to keep beside mean and std.

    Raises MissingPackage without onnx, TypeError for a model that is not a ViT.
    """
    if not isinstance(backbone.model, ViT):
        raise TypeError(f"{backbone.name}: only a ViT can be written as ONNX")
    backbone = with_image_size(backbone, backbone.image_size)
    model, side = backbone.model, backbone.image_size
    graph = Graph()
    state = vit_state(backbone.params, patch_size=model.patch_size)
    x = _tokens(graph, state, side)
    blocks = []
    for i in range(model.depth):
        x = _block(graph, x, state, i, model.num_heads)
        blocks.append(x)
    x = graph.norm(x, state, name="norm")
    first = 1 + model.num_registers
    index = graph.constant("cls.index", np.array(0, np.int64))
    cls = graph.op("Gather", x, index, name="cls", axis=1)
    patch = graph.cut(x, first, name="patch")
    d, count = model.embed_dim, (side // model.patch_size) ** 2
    outputs = {"cls": ("batch", d), "patch": ("batch", count, d)}
    if extend is not None:

        @functools.cache
        def normed(i: int) -> str:
            return graph.norm(blocks[i], state, name=f"norm.{i}", of="norm")

        tensors = {"cls": cls, "patch": patch, "blocks": blocks, "normed": normed}
        outputs = extend(graph, tensors)
    return graph.model(
        {"pixel_values": ("batch", backbone.channels, side, side)},
        outputs,
        doc=f"{backbone.name}: (pixels / 255 - mean) / std in, features out",
        metadata={
            "name": backbone.name,
            "mean": " ".join(map(str, backbone.mean)),
            "std": " ".join(map(str, backbone.std)),
            **(metadata or {}),
        },
    )


def to_channels_first(images):
    """[B,H,W,C] -> contiguous float32 [B,C,H,W], the layout of torch and ONNX."""
    images = np.asarray(images, np.float32)
    return np.ascontiguousarray(rearrange(images, "b h w c -> b c h w"))
