"""Small torch statements of iBOT's, DINOv2's and USFM's ViTs, from their formulas.

Written apart from the package, function by function on a state dict, to be compared
with it. Everything is float64, so that the difference is the package's own rounding.
"""

import math

import torch
import torch.nn.functional as F


def _norm(x, state, name):
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return F.layer_norm(x, weight.shape, weight, bias, 1e-6)


def _attention(x, state, name, heads, bias=None):
    b, t, d = x.shape
    if f"{name}.qkv.bias" in state:
        qkv_bias = state[f"{name}.qkv.bias"]
    else:
        q, v = state[f"{name}.q_bias"], state[f"{name}.v_bias"]
        qkv_bias = torch.cat([q, torch.zeros_like(q), v])
    qkv = F.linear(x, state[f"{name}.qkv.weight"], qkv_bias)
    q, k, v = qkv.view(b, t, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(-1, -2) / math.sqrt(d // heads)
    if bias is not None:
        logits = logits + bias
    x = (logits.softmax(-1) @ v).transpose(1, 2).reshape(b, t, d)
    return F.linear(x, state[f"{name}.proj.weight"], state[f"{name}.proj.bias"])


def _block(x, state, i, heads, bias=None):
    def gain(which):
        for name in (f"ls{which}.gamma", f"gamma_{which}"):
            if f"blocks.{i}.{name}" in state:
                return state[f"blocks.{i}.{name}"]
        return 1.0

    name = f"blocks.{i}"
    y = _attention(_norm(x, state, f"{name}.norm1"), state, f"{name}.attn", heads, bias)
    x = x + gain(1) * y
    y = _norm(x, state, f"{name}.norm2")
    y = F.linear(y, state[f"{name}.mlp.fc1.weight"], state[f"{name}.mlp.fc1.bias"])
    y = F.linear(
        F.gelu(y), state[f"{name}.mlp.fc2.weight"], state[f"{name}.mlp.fc2.bias"]
    )
    return x + gain(2) * y


def _embed(images, state):
    kernel = state["patch_embed.proj.weight"]
    x = F.conv2d(
        images, kernel, state["patch_embed.proj.bias"], stride=kernel.shape[-1]
    )
    return x.flatten(2).transpose(1, 2), x.shape[2:]


def _positions(state, grid, offset, antialias):
    pos = state["pos_embed"]
    side = math.isqrt(pos.shape[1] - 1)
    patches = pos[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if tuple(grid) != (side, side):
        if offset:
            how = {"scale_factor": [(n + offset) / side for n in grid]}
        else:
            how = {"size": tuple(grid)}
        patches = F.interpolate(patches, mode="bicubic", antialias=antialias, **how)
    return torch.cat([pos[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


def vit(images, state, heads, *, offset=0.1, antialias=False):
    """iBOT or DINOv2: (CLS, patches, last 4 blocks [4,B,T,D]), final-normed."""
    state = {k: v.double() for k, v in state.items()}
    x, grid = _embed(images.double(), state)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1)
    x = x + _positions(state, grid, offset, antialias)
    registers = state.get("register_tokens")
    count = 0
    if registers is not None:
        count = registers.shape[1]
        registers = registers.expand(len(x), -1, -1)
        x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)
    taps, i = [], 0
    while f"blocks.{i}.norm1.weight" in state:
        x = _block(x, state, i, heads)
        taps.append(_norm(x, state, "norm"))
        i += 1
    return taps[-1][:, 0], taps[-1][:, 1 + count :], torch.stack(taps[-4:])


def usfm(images, state):
    """USFM: (mean patch token, patches, last 4 blocks), no final norm."""
    state = {k: v.double() for k, v in state.items()}
    table = state["rel_pos_bias.relative_position_bias_table"]
    x, (h, w) = _embed(images.double(), state)
    rows = torch.arange(h).repeat_interleave(w)
    cols = torch.arange(w).repeat(h)
    dy = rows[:, None] - rows[None, :] + h - 1
    dx = cols[:, None] - cols[None, :] + w - 1
    bias = torch.zeros(table.shape[1], 1 + h * w, 1 + h * w, dtype=torch.float64)
    bias[:, 1:, 1:] = table[dy * (2 * w - 1) + dx].permute(2, 0, 1)
    bias[:, 0, 1:] = table[-3][:, None]
    bias[:, 1:, 0] = table[-2][:, None]
    bias[:, 0, 0] = table[-1]
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1)
    taps, i = [], 0
    while f"blocks.{i}.norm1.weight" in state:
        x = _block(x, state, i, table.shape[1], bias)
        taps.append(x)
        i += 1
    return x[:, 1:].mean(1), x[:, 1:], torch.stack(taps[-4:])
