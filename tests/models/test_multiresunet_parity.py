"""MultiResUNet against a restatement in torch, layer for layer from its paper.

The order inside a block (ReLU, then batch norm) and of the concatenations is that of
the authors' Keras release.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from ultradino_jax.models.layers import batch_norm
from ultradino_jax.models.multiresunet import MultiResUNet, block_widths
from ultradino_jax.tree import map_with_name

torch = pytest.importorskip("torch")
nn, F = torch.nn, torch.nn.functional


def t(x):
    return torch.from_numpy(np.array(x))


class Torch:
    """The forward pass, reading our variables by their paths."""

    def __init__(self, variables):
        self.params, self.stats = variables["params"], variables["batch_stats"]
        self.running = []

    def at(self, tree, path):
        for part in path.split("/"):
            tree = tree.get(part, {})
        return tree

    def norm(self, x, path):
        p, s = self.at(self.params, path), self.at(self.stats, path)
        mean, var = t(s["mean"]).clone(), t(s["var"]).clone()
        scale = t(p["scale"]) if "scale" in p else torch.ones(x.shape[1], dtype=x.dtype)
        y = F.batch_norm(x, mean, var, scale, t(p["bias"]), True, 0.1, 1e-5)
        self.running.append((path, mean.numpy(), var.numpy()))
        return y

    def conv(self, x, path, relu=True):
        kernel = self.at(self.params, f"{path}/conv")["kernel"]
        weight = t(rearrange(kernel, "p q i o -> o i p q"))
        x = self.norm(F.conv2d(x, weight, padding="same"), f"{path}/norm")
        return F.relu(x) if relu else x

    def block(self, x, path):
        a = self.conv(x, f"{path}/conv3")
        b = self.conv(a, f"{path}/conv5")
        c = self.conv(b, f"{path}/conv7")
        out = self.norm(torch.cat([a, b, c], 1), f"{path}/norm1")
        shortcut = self.conv(x, f"{path}/shortcut", relu=False)
        return self.norm(F.relu(shortcut + out), f"{path}/norm2")

    def path(self, x, path, length):
        for i in range(length):
            shortcut = self.conv(x, f"{path}/shortcut{i}", relu=False)
            x = F.relu(shortcut + self.conv(x, f"{path}/conv{i}"))
            x = self.norm(x, f"{path}/norm{i}")
        return x

    def up(self, x, path):
        p = self.at(self.params, path)
        weight = t(rearrange(p["kernel"], "i p q o -> i o p q"))
        return F.conv_transpose2d(x, weight, t(p["bias"]), stride=2)

    def __call__(self, x):
        skips = []
        for level in range(4):
            x = self.block(x, f"down{level}")
            skips.append(self.path(x, f"path{level}", 4 - level))
            x = F.max_pool2d(x, 2)
        x = self.block(x, "down4")
        for level in (3, 2, 1, 0):
            x = torch.cat([self.up(x, f"upsample{level}"), skips[level]], 1)
            x = self.block(x, f"up{level}")
        p = self.params["classifier"]
        weight = t(rearrange(p["kernel"], "p q i o -> o i p q"))
        return F.conv2d(x, weight, t(p["bias"]))


def test_forward_and_running_statistics_equal_torchs():
    """In training, which shows every layer and statistic.

    In float64: batch norms of dying channels multiply float32's rounding by 300.
    """
    model = MultiResUNet(3, width=4)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((2, 32, 48, 1))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(images.shape))

    # Every kernel, gain, bias and statistic random, so that each one matters.
    def fill(path, x):
        values = (
            rng.standard_normal(x.shape) * (3 / max(x.size / x.shape[-1], 9)) ** 0.5
        )
        return 1 + 0.2 * np.abs(values) if path.endswith(("scale", "var")) else values

    variables = map_with_name(fill, shapes)
    with jax.enable_x64(True):
        apply = jax.jit(
            functools.partial(model.apply, mutable=["batch_stats"], train=True)
        )
        ours, new = apply(variables, images)
        ours, new = np.asarray(ours), jax.tree.map(np.asarray, new)
    theirs = Torch(variables)
    wanted = theirs(t(images.transpose(0, 3, 1, 2))).numpy().transpose(0, 2, 3, 1)
    assert ours.dtype == wanted.dtype == np.float64 and np.std(wanted) > 0.1
    np.testing.assert_allclose(ours, wanted, atol=1e-8 * np.std(wanted))
    assert len(theirs.running) == len(jax.tree.leaves(variables["batch_stats"])) // 2
    for path, mean, var in theirs.running:
        stats = theirs.at(new["batch_stats"], path)
        np.testing.assert_allclose(stats["mean"], mean, atol=1e-8, err_msg=path)
        np.testing.assert_allclose(stats["var"], var, rtol=1e-8, err_msg=path)


def test_multires_widths_follow_the_rule():
    """W = alpha U in shares of a sixth, a third and a half; figures of the paper."""
    assert [block_widths(32 * 2**k) for k in range(5)] == [
        (8, 17, 26), (17, 35, 53), (35, 71, 106), (71, 142, 213), (142, 284, 427),
    ]  # fmt: skip


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_keeps_torchs_books(train):
    rng = np.random.default_rng(0)
    x, mean, var = (rng.random(s).astype(np.float32) for s in ((6, 3), (3,), (3,)))
    books = t(mean), t(var)
    wanted = F.batch_norm(t(x), *books, training=train, momentum=0.1, eps=1e-6)
    ours = batch_norm(x, mean, var, train=train, eps=1e-6)
    for a, b in zip(ours, (wanted, *books), strict=True):
        np.testing.assert_allclose(a, b.numpy(), rtol=1e-5, atol=1e-6)
