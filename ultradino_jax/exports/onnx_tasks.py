"""Classifiers and UperNet segmenters as ONNX graphs, on the backbone's graph."""

import functools
import json
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from ultradino_jax.evaluators.classification.classifier import Classifier
from ultradino_jax.evaluators.segmentation.segmenter import Segmenter
from ultradino_jax.exports.onnx_backbone import Graph, vit_onnx
from ultradino_jax.models.layers import NORM_EPS
from ultradino_jax.models.upernet import POOL_SCALES, UperNet, pooling_matrix


def classifier_onnx(classifier: Classifier):
    """Classifier -> onnx.ModelProto, any batch size.

    Input as of `vit_onnx`; outputs 'logits' and 'probabilities' [batch,Y]. Class names
    are in the metadata, 'classes', as a JSON list. Raises what `vit_onnx` raises.
    """
    kernel, bias = classifier.linear
    depth, y = classifier.backbone.model.depth, len(classifier.classes)

    def head(graph: Graph, tensors: dict):
        index = graph.constant("head.cls.index", np.array(0, np.int64))
        parts = [
            graph.op("Gather", tensors["normed"](i), index, name=f"head.{i}", axis=1)
            for i in range(depth - classifier.layers, depth)
        ]
        if classifier.patch:
            mean = {"axes": [1], "keepdims": 0}
            parts.append(
                graph.op("ReduceMean", tensors["patch"], name="head.patch", **mean)
            )
        x = graph.op("Concat", *parts, name="head.features", axis=1)
        graph.linear(x, kernel.T, bias, name="logits")
        graph.op("Softmax", "logits", name="probabilities", axis=-1)
        return {"logits": ("batch", y), "probabilities": ("batch", y)}

    return vit_onnx(classifier.backbone, head, _classes(classifier.classes))


def segmenter_onnx(segmenter: Segmenter):
    """UperNet -> onnx.ModelProto, any batch size.

    Input as of `vit_onnx`; metadata 'resize' says how an image becomes the square:
    'stretch' or 'letterbox'. Outputs 'logits' [batch,Y,S,S] and 'mask' uint8
    [batch,S,S], the class of highest logit.
    Raises TypeError for another network, and what `vit_onnx` raises.
    """
    model = segmenter.model
    if not isinstance(model, UperNet):
        raise TypeError(f"{segmenter.backbone.name}: only UperNet is written as ONNX")
    variables = jax.tree.map(np.asarray, dict(segmenter.variables))
    backbone = segmenter.with_parameters()
    side, y = backbone.image_size, len(segmenter.classes)
    grid = side // backbone.model.patch_size

    def head(graph: Graph, tensors: dict):
        maps = []
        first = 1 + backbone.model.num_registers
        for i, block in enumerate(model.taps):
            tokens = tensors["normed"](range(backbone.model.depth)[block])
            x = graph.cut(tokens, first, name=f"tap{i}")
            x = graph.op("Transpose", x, name=f"tap{i}.columns", perm=[0, 2, 1])
            size = np.array([0, backbone.model.embed_dim, grid, grid], np.int64)
            shape = graph.constant("tap.shape", size)
            maps.append(graph.op("Reshape", x, shape, name=f"tap{i}.map"))
        net = _UperNet(graph, variables)
        logits = net.head(net.neck(maps), grid)
        rows = _bilinear(4 * grid, side)
        graph.op("Identity", net.mix(logits, rows, rows, "full"), name="logits")
        best = graph.op("ArgMax", "logits", name="best", axis=1, keepdims=0)
        uint8 = graph.onnx.TensorProto.UINT8
        graph.op("Cast", best, name="mask", to=uint8)
        graph.types["mask"] = uint8
        return {
            "logits": ("batch", y, side, side),
            "mask": ("batch", side, side),
        }

    metadata = _classes(segmenter.classes)
    metadata["resize"] = "letterbox" if segmenter.letterbox else "stretch"
    return vit_onnx(backbone, head, metadata)


def _classes(names) -> dict[str, str]:
    return {"classes": json.dumps(list(names), ensure_ascii=False)}


@functools.cache
def _bilinear(size: int, out: int) -> np.ndarray:
    """Weights [out,size] of `models.upernet.resize` along one axis."""
    if size == out:
        return np.eye(size, dtype=np.float32)
    return np.asarray(
        jax.image.resize(jnp.eye(size), (out, size), "bilinear", antialias=False)
    )


class _UperNet:
    """Operators of models/upernet.py on maps [B,C,h,w], read from its variables.

    Pooling and resizing are products with fixed matrices: exact, and the batch size
    stays free, which Resize of opset 17 would tie to a computed shape.
    """

    def __init__(self, graph: Graph, variables: Mapping):
        self.graph = graph
        self.params = variables["params"]
        self.stats = variables.get("batch_stats", {})

    def mix(self, x: str, rows: np.ndarray, columns: np.ndarray, name: str) -> str:
        """rows [i,h] x [B,C,h,w] columns^T [w,j] -> [B,C,i,j]."""
        left = self.graph.constant(f"{name}.rows.weight", rows)
        right = self.graph.constant(f"{name}.columns.weight", columns.T)
        x = self.graph.op("MatMul", left, x, name=f"{name}.rows")
        return self.graph.op("MatMul", x, right, name=f"{name}.columns")

    def conv(self, x: str, params, name: str, norm=None, relu: bool = True) -> str:
        """Convolution of stride 1 and same size; norm: (params, statistics)."""
        kernel = rearrange(params["kernel"], "h w i o -> o i h w")
        side = kernel.shape[-1]
        names = [
            self.graph.constant(f"{name}.kernel", kernel),
            self.graph.constant(f"{name}.bias", params["bias"]),
        ]
        x = self.graph.op(
            "Conv", x, *names, name=name, kernel_shape=[side, side],
            pads=4 * [side // 2],
        )  # fmt: skip
        if norm is not None:
            x = self.norm(x, *norm, name=f"{name}.norm")
        return self.graph.op("Relu", x, name=f"{name}.relu") if relu else x

    def norm(self, x: str, params, stats, *, name: str) -> str:
        """Batch norm with its running statistics."""
        values = {**params, **stats}
        names = [
            self.graph.constant(f"{name}.{k}", values[k])
            for k in ("scale", "bias", "mean", "var")
        ]
        return self.graph.op(
            "BatchNormalization", x, *names, name=name, epsilon=NORM_EPS
        )

    def block(self, x: str, name: str) -> str:
        """ConvReLU of the head."""
        params = self.params["head"][name]
        norm = None
        if "norm" in params:
            norm = params["norm"], self.stats["head"][name]["norm"]
        return self.conv(x, params["conv"], f"head.{name}", norm)

    def upsample(self, x: str, name: str) -> str:
        """Transposed 2x2 convolution."""
        params = self.params["neck"][name]
        kernel = rearrange(params["kernel"], "i h w o -> i o h w")
        names = [
            self.graph.constant(f"neck.{name}.kernel", kernel),
            self.graph.constant(f"neck.{name}.bias", params["bias"]),
        ]
        return self.graph.op(
            "ConvTranspose", x, *names, name=f"neck.{name}", strides=[2, 2],
            kernel_shape=[2, 2],
        )  # fmt: skip

    def neck(self, taps: list[str]) -> list[str]:
        """Four maps of side h -> sides 4h, 2h, h and h/2."""
        x = self.upsample(taps[0], "up1a")
        norm = self.params["neck"]["norm"], self.stats["neck"]["norm"]
        x = self.norm(x, *norm, name="neck.norm")
        finest = self.upsample(self.graph.gelu(x, name="neck.gelu"), "up1b")
        coarsest = self.graph.op(
            "MaxPool", taps[3], name="neck.pool", kernel_shape=[2, 2], strides=[2, 2]
        )
        return [finest, self.upsample(taps[1], "up2"), taps[2], coarsest]

    def pyramid(self, x: str, side: int) -> str:
        """Pyramid pooling of a map of `side`."""
        maps = [x]
        for i, scale in enumerate(POOL_SCALES):
            cells = pooling_matrix(side, scale)
            pooled = self.block(self.mix(x, cells, cells, f"pool{i}"), f"pool_{i}")
            back = _bilinear(scale, side)
            maps.append(self.mix(pooled, back, back, f"pool{i}.back"))
        x = self.graph.op("Concat", *maps, name="pool.all", axis=1)
        return self.block(x, "bottleneck")

    def head(self, levels: list[str], grid: int) -> str:
        """Maps of sides 4h, 2h, h and h/2 (h = grid) -> logits [B,Y,4h,4h]."""
        sides = [4 * grid, 2 * grid, grid, grid // 2]
        maps = [self.block(x, f"lateral_{i}") for i, x in enumerate(levels[:3])]
        maps.append(self.pyramid(levels[3], sides[3]))
        for i in (2, 1, 0):
            grow = _bilinear(sides[i + 1], sides[i])
            below = self.mix(maps[i + 1], grow, grow, f"top_down{i}")
            maps[i] = self.graph.op("Add", maps[i], below, name=f"top_down{i}.sum")
        maps = [*(self.block(x, f"fpn_{i}") for i, x in enumerate(maps[:3])), maps[3]]
        for i in (1, 2, 3):
            grow = _bilinear(sides[i], sides[0])
            maps[i] = self.mix(maps[i], grow, grow, f"fused{i}")
        x = self.graph.op("Concat", *maps, name="fused", axis=1)
        x = self.block(x, "fusion")
        return self.conv(x, self.params["head"]["classifier"], "classifier", relu=False)
