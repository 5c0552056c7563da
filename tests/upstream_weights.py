"""Random weights with the tensor names of each upstream release."""

import numpy as np

# The size this project calls tiny; positions are stored for a GRID x GRID image.
WIDTH, DEPTH, HEADS, GRID = 128, 4, 4, 6


def random_weights(
    name: str, channels: int, patch_size: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """{upstream tensor name: float32 array in torch's layout} of a family.

    name: begins with the family, up to the first '_': dinov2, ibot, mae, ...
    """
    family = name.partition("_")[0]
    d, f, c, p = WIDTH, 4 * WIDTH, channels, patch_size

    def normal(*shape):
        return rng.normal(0, 0.02, shape).astype(np.float32)

    def fan_in(out, *into):
        return rng.normal(0, np.prod(into) ** -0.5, (out, *into)).astype(np.float32)

    def ones(*shape):
        return np.ones(shape, np.float32)

    state = {"cls_token": normal(1, 1, d), "norm.weight": ones(d)}
    state |= {"norm.bias": normal(d), "patch_embed.proj.bias": normal(d)}
    state["patch_embed.proj.weight"] = fan_in(d, c, p, p)
    for i in range(DEPTH):
        block = {
            "attn.qkv.weight": fan_in(3 * d, d),
            "attn.proj.weight": fan_in(d, d),
            "attn.proj.bias": normal(d),
            "mlp.fc1.weight": fan_in(f, d),
            "mlp.fc1.bias": normal(f),
            "mlp.fc2.weight": fan_in(d, f),
            "mlp.fc2.bias": normal(d),
        }
        for norm in ("norm1", "norm2"):
            block |= {f"{norm}.weight": ones(d), f"{norm}.bias": normal(d)}
        if family == "usfm":
            block |= {"gamma_1": ones(d), "gamma_2": ones(d)}
            block |= {"attn.q_bias": normal(d), "attn.v_bias": normal(d)}
        else:
            block["attn.qkv.bias"] = normal(3 * d)
        if family in ("dinov2", "ultradino"):
            block |= {"ls1.gamma": ones(d), "ls2.gamma": ones(d)}
        state |= {f"blocks.{i}.{name}": x for name, x in block.items()}
    if family == "usfm":
        entries = (2 * GRID - 1) ** 2 + 3
        state["rel_pos_bias.relative_position_bias_table"] = normal(entries, HEADS)
    else:
        state["pos_embed"] = normal(1, 1 + GRID**2, d)
    if family in ("dinov2", "ultradino"):
        state |= {"mask_token": normal(1, d), "register_tokens": normal(1, 4, d)}
    if family == "ultradino":  # its checkpoint holds the teacher with a head
        state = {f"backbone.{name}": x for name, x in state.items()}
        state["dino_head.mlp.0.weight"] = normal(16, d)
    return state
