"""Pictures: attention against the model's own maps, PCA against scikit-learn."""

import io

import jax
import numpy as np
from PIL import Image
from sklearn.decomposition import PCA

from ultradino_jax.health import panels
from ultradino_jax.models.vit import ViT
from ultradino_jax.weights.backbone import Backbone


def tiny_backbone():
    model = ViT(16, 2, 2, patch_size=8, image_size=32, layerscale=1.0)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 32, 32, 1)))["params"]
    return Backbone(model, params, 32, 1, (0.2,), (0.3,), name="tiny")


def test_attention_maps_are_the_softmax_of_the_last_block():
    backbone = tiny_backbone()
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 1), np.uint8)
    maps, tokens = panels.attention_maps(backbone, images)
    assert maps.shape == (3, 2, 4, 4) and tokens.shape == (3, 4, 4, 16)
    assert (maps > 0).all() and (maps.sum(axis=(2, 3)) < 1).all()
    x = (images / np.float32(255) - 0.2) / 0.3
    apply = backbone.model.apply
    out = apply({"params": backbone.params}, x, layers=[0], norm_layers=False)
    np.testing.assert_allclose(tokens.reshape(3, 16, 16), out.patch_tokens, atol=1e-5)
    # The last block's CLS query by hand, from the output of the block before.
    block = jax.tree.map(
        lambda p: np.asarray(p[-1], np.float64), backbone.params["blocks"]
    )
    y = np.asarray(out.layers[0], np.float64)
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
    y = y * block["norm1"]["scale"] + block["norm1"]["bias"]
    qkv = y @ block["attn"]["qkv"]["kernel"] + block["attn"]["qkv"]["bias"]
    q, k, _ = qkv.reshape(3, 21, 3, 2, 8).transpose(2, 0, 3, 1, 4)
    logits = np.einsum("bae,base->bas", q[:, :, 0], k) / np.sqrt(8)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(maps.reshape(3, 2, 16), weights[..., 5:], atol=1e-5)


def test_pca_colours_follow_scikit_learn():
    tokens = np.random.default_rng(1).normal(size=(2, 4, 4, 10)) * np.arange(1, 11)
    colours = panels.pca_colours(tokens)
    theirs = PCA(3).fit_transform(tokens.reshape(-1, 10))
    for c in range(3):
        r = np.corrcoef(colours.reshape(-1, 3)[:, c], theirs[:, c])[0, 1]
        assert abs(r) > 0.98


def test_sheets_and_crops():
    backbone = tiny_backbone()
    images = np.random.default_rng(2).integers(0, 256, (4, 32, 32, 1), np.uint8)
    page = panels.attention_panel(backbone, images, side=64)
    assert page.shape == (4 * 66 - 2, 3 * 66 - 2, 3) and page.dtype == np.uint8
    assert (page[:64, :64, 0] == images[0, :, :, 0].repeat(2, 0).repeat(2, 1)).all()
    masks = np.zeros((2, 2, 1, 16), bool)
    masks[1, 0, 0, 5] = True  # second group, first global crop, row 1 column 1
    batch = {
        "global_crops": np.full((2, 2, 1, 32, 32, 1), 90, np.uint8),
        "local_crops": np.full((2, 3, 1, 16, 16, 1), 50, np.uint8),
        "masks": masks,
    }
    page = panels.crops_panel(batch, 8, side=32)
    assert page.shape == (2 * 34 - 2, 5 * 34 - 2, 3)
    assert (page[34 + 8 : 34 + 16, 8:16] == [110, 30, 30]).all()
    assert (page[34 : 34 + 8, :32] == 90).all() and (page[:32, :32] == 90).all()
    decoded = np.asarray(Image.open(io.BytesIO(panels.png(page))))
    assert (decoded == page).all()
