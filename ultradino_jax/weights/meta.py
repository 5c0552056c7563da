"""State dicts in the naming of facebookresearch/dinov2 <-> parameter trees.

Only arrays and names are handled here, no files and no torch: a state dict is a
mapping from names such as 'blocks.0.attn.qkv.weight' to numpy arrays in torch's layout
(Linear [out,in], convolution [out,in,height,width]). The other libraries' namings are
translated to and from this one (naming.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from einops import rearrange

from ultradino_jax.errors import UserError
from ultradino_jax.tree import flat_names

StateDict = Mapping[str, np.ndarray]

# Block parameters: reference name -> (path below `blocks`, whether it is a matrix).
BLOCK_NAMES = {
    "norm1.weight": ("norm1/scale", False),
    "norm1.bias": ("norm1/bias", False),
    "attn.qkv.weight": ("attn/qkv/kernel", True),
    "attn.qkv.bias": ("attn/qkv/bias", False),
    "attn.proj.weight": ("attn/proj/kernel", True),
    "attn.proj.bias": ("attn/proj/bias", False),
    "ls1.gamma": ("ls1/gamma", False),
    "norm2.weight": ("norm2/scale", False),
    "norm2.bias": ("norm2/bias", False),
    "mlp.fc1.weight": ("mlp/fc1/kernel", True),
    "mlp.fc1.bias": ("mlp/fc1/bias", False),
    "mlp.fc2.weight": ("mlp/fc2/kernel", True),
    "mlp.fc2.bias": ("mlp/fc2/bias", False),
    "ls2.gamma": ("ls2/gamma", False),
}
TOKENS = ("cls_token", "mask_token", "pos_embed", "register_tokens")


@dataclass(frozen=True)
class Architecture:
    """What a state dict says about its ViT; the number of heads it does not say.

    grid: side of the square position grid in patches. hidden_dim: F.
    """

    embed_dim: int
    depth: int
    patch_size: int
    channels: int
    grid: int
    num_registers: int
    layerscale: bool
    hidden_dim: int

    @classmethod
    def of(
        cls, shapes: Mapping[str, tuple[int, ...]], *, depth: int = 0
    ) -> "Architecture":
        """Read it from {reference name: shape}.

        depth: blocks it has at least, whatever the names say. Raises UserError naming
        the tensors that are needed for that and missing.
        """
        anchors = (
            "cls_token",
            "pos_embed",
            "patch_embed.proj.weight",
            "blocks.0.mlp.fc1.weight",
        )
        if absent := [name for name in anchors if name not in shapes]:
            there = ", ".join(sorted(shapes)[:3]) or "none"
            raise UserError(f"missing: {', '.join(absent)}; there are {there} ..")
        kernel, positions = shapes["patch_embed.proj.weight"], shapes["pos_embed"]
        grid = round((positions[1] - 1) ** 0.5) if len(positions) == 3 else -1
        if grid**2 + 1 != positions[1]:
            raise UserError(
                f"pos_embed {list(positions)} is not a class token and a square grid"
            )
        if len(kernel) != 4 or kernel[2] != kernel[3]:
            raise UserError(f"patch kernel {list(kernel)} is not [D,C,P,P]")
        registers = shapes.get("register_tokens", (1, 0, 0))
        return cls(
            embed_dim=shapes["cls_token"][-1],
            depth=max(depth, block_count(shapes)),
            patch_size=kernel[2],
            channels=kernel[1],
            grid=grid,
            num_registers=registers[1],
            layerscale=any(name.endswith("ls1.gamma") for name in shapes),
            hidden_dim=shapes["blocks.0.mlp.fc1.weight"][0],
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{reference name: shape} of every tensor of such a ViT."""
        d, f = self.embed_dim, self.hidden_dim
        shapes: dict[str, tuple[int, ...]] = {
            "cls_token": (1, 1, d),
            "mask_token": (1, d),
            "pos_embed": (1, 1 + self.grid**2, d),
            "patch_embed.proj.weight": (d, self.channels, *2 * (self.patch_size,)),
            "patch_embed.proj.bias": (d,),
            "norm.weight": (d,),
            "norm.bias": (d,),
        }
        if self.num_registers:
            shapes["register_tokens"] = (1, self.num_registers, d)
        matrices = {
            "attn.qkv.weight": (3 * d, d),
            "attn.qkv.bias": (3 * d,),
            "attn.proj.weight": (d, d),
            "mlp.fc1.weight": (f, d),
            "mlp.fc1.bias": (f,),
            "mlp.fc2.weight": (d, f),
        }
        for i in range(self.depth):
            for name in BLOCK_NAMES:
                if self.layerscale or not name.startswith("ls"):
                    shapes[f"blocks.{i}.{name}"] = matrices.get(name, (d,))
        return shapes


def block_count(names) -> int:
    """1 + the highest block index among names like 'blocks.11.norm1.weight'."""
    return 1 + max(
        (int(name.split(".")[1]) for name in names if name.startswith("blocks.")),
        default=-1,
    )


def check_placement(state: StateDict, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a state dict whose names or shapes are not exactly the expected ones.

    Raises UserError with the list of missing and the list of unexpected tensors, and
    the wrong shapes: loading a part and training on is the worst outcome.
    """

    def listed(names):
        return ", ".join(sorted(names)) or "none"

    missing, unexpected = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing or unexpected:
        raise UserError(
            f"{len(expected) - len(missing)} of {len(expected)} tensors found; "
            f"missing: {listed(missing)}; unexpected: {listed(unexpected)}"
        )
    wrong = [
        f"{name} is {list(np.shape(state[name]))}, needs {list(shape)}"
        for name, shape in expected.items()
        if np.shape(state[name]) != shape
    ]
    if wrong:
        raise UserError(f"wrong shapes: {'; '.join(wrong)}")


def nest(flat: Mapping[str, np.ndarray]) -> dict:
    """{'a/b/c': x} -> {'a': {'b': {'c': x}}}."""
    tree: dict = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return tree


def vit_params(state: StateDict) -> dict:
    """Backbone state dict -> ViT parameters, every tensor placed.

    Raises UserError listing missing and unexpected tensors or wrong shapes.
    """
    shapes = {name: np.shape(x) for name, x in state.items()}
    architecture = Architecture.of(shapes)
    check_placement(state, architecture.shapes())
    flat = {name: state[name] for name in TOKENS if name in state}
    flat["patch_embed/kernel"] = rearrange(
        state["patch_embed.proj.weight"], "d c p q -> (p q c) d"
    )
    flat["patch_embed/bias"] = state["patch_embed.proj.bias"]
    flat["norm/scale"], flat["norm/bias"] = state["norm.weight"], state["norm.bias"]
    for name, (path, is_matrix) in BLOCK_NAMES.items():
        if f"blocks.0.{name}" in state:
            stack = [state[f"blocks.{i}.{name}"] for i in range(architecture.depth)]
            flat[f"blocks/{path}"] = stack_blocks(stack, is_matrix)
    return nest(flat)


def stack_blocks(tensors, is_matrix: bool) -> np.ndarray:
    """One parameter of every block -> [depth, ..]; matrices become [depth, in, out]."""
    stack = np.stack(tensors)
    return stack.swapaxes(1, 2) if is_matrix else stack


def vit_state(params, *, patch_size: int) -> dict[str, np.ndarray]:
    """ViT parameters -> backbone state dict: the inverse of `vit_params`, bit for bit.

    patch_size: P, which the flattened patch kernel [P*P*C, D] does not tell from C.
    """
    flat = {name: np.asarray(x) for name, x in flat_names(params).items()}
    state = {name: flat[name] for name in TOKENS if name in flat}
    p = patch_size
    state["patch_embed.proj.weight"] = rearrange(
        flat["patch_embed/kernel"], "(p q c) d -> d c p q", p=p, q=p
    )
    state["patch_embed.proj.bias"] = flat["patch_embed/bias"]
    depth = flat["blocks/norm1/scale"].shape[0]
    for i in range(depth):
        for name, (path, is_matrix) in BLOCK_NAMES.items():
            if f"blocks/{path}" in flat:
                x = flat[f"blocks/{path}"][i]
                state[f"blocks.{i}.{name}"] = x.T if is_matrix else x
    state["norm.weight"], state["norm.bias"] = flat["norm/scale"], flat["norm/bias"]
    return {name: np.ascontiguousarray(x) for name, x in state.items()}


def dino_head_params(state: StateDict) -> dict:
    """Head state dict ('mlp.0.weight', .., 'last_layer.weight_v') -> parameters."""
    flat = {}
    for name, value in state.items():
        match name.split("."):
            case ["mlp", i, "weight"]:
                flat[f"mlp_{int(i) // 2}/kernel"] = value.T
            case ["mlp", i, "bias"]:
                flat[f"mlp_{int(i) // 2}/bias"] = value
            case ["last_layer", "weight_g"]:
                flat["last_layer/g"] = value[:, 0]
            case ["last_layer", "weight_v"]:
                flat["last_layer/v"] = value.T
            case _:
                raise UserError(f"no place in a DINO head for {name}")
    return nest(flat)


def dino_head_state(params) -> dict[str, np.ndarray]:
    """Parameters -> head state dict: the inverse of `dino_head_params`."""
    state = {}
    for path, value in flat_names(params).items():
        value = np.asarray(value)
        match path.split("/"):
            case ["last_layer", "g"]:
                state["last_layer.weight_g"] = value[:, None]
            case ["last_layer", "v"]:
                state["last_layer.weight_v"] = value.T
            case [mlp, "kernel"]:
                state[f"mlp.{2 * int(mlp.removeprefix('mlp_'))}.weight"] = value.T
            case [mlp, "bias"]:
                state[f"mlp.{2 * int(mlp.removeprefix('mlp_'))}.bias"] = value
    return {name: np.ascontiguousarray(x) for name, x in state.items()}
