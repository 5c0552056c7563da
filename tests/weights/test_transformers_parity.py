"""Our forward pass against transformers' own, live, with random torch weights.

Needs the `interop` extra; skipped without it.
"""

import numpy as np
import pytest

from tests.weights.forward import channels_last, forward

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from ultradino_jax.weights.load import load_backbone  # noqa: E402

TINY = dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4)
SMALL = dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6)
BASE = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12)


def randomised(model, seed):
    """Weights of a size that makes every parameter matter in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if x.ndim >= 2 and "embeddings" not in name:
                spread = x.shape[1] ** -0.5
            else:
                spread = 0.3
            x.normal_(0.0, spread, generator=generator)
            if "lambda1" in name:
                x.abs_()
            if "norm" in name and name.endswith("weight"):
                x.add_(1.0)
    return model.eval()


def both(folder, model, sizes, channels):
    model.save_pretrained(folder)
    backbone = load_backbone(folder)
    rng = np.random.default_rng(5)
    for side in sizes:
        images = rng.normal(size=(2, channels, side, side)).astype(np.float32)
        with torch.no_grad():
            out = model(
                pixel_values=torch.from_numpy(images), output_hidden_states=True
            )
            hidden = torch.stack(out.hidden_states[-4:])
            theirs = model.layernorm(hidden).numpy()
        ours = forward(backbone, channels_last(images), layers=(-4, -3, -2, -1))
        first = 1 + backbone.model.num_registers
        last = out.last_hidden_state.numpy()
        yield f"CLS at {side}", ours.cls_token, last[:, 0]
        yield f"patches at {side}", ours.patch_tokens, last[:, first:]
        yield f"last 4 at {side}", ours.layers, theirs


RESIZED = dict(patch_size=14, image_size=518)
GREY = dict(patch_size=16, num_channels=1)


@pytest.mark.parametrize(
    "name, config, sizes",
    [
        ("reg4_grey", TINY | GREY, (224, 96)),
        ("reg4", TINY | RESIZED, (224,)),
        ("plain", TINY | RESIZED, (224,)),
        pytest.param("s_reg4_grey", SMALL | GREY, (224, 96), marks=pytest.mark.slow),
        pytest.param("b_reg4", BASE | RESIZED, (224,), marks=pytest.mark.slow),
        pytest.param("s_plain", SMALL | RESIZED, (224,), marks=pytest.mark.slow),
    ],
)
def test_random_torch_weights_give_transformers_features(tmp_path, name, config, sizes):
    if name.endswith("plain"):
        model = transformers.Dinov2Model(transformers.Dinov2Config(**config))
    else:
        model = transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**config)
        )
    model = randomised(model, seed=3)
    channels = config.get("num_channels", 3)
    for what, ours, theirs in both(tmp_path, model, sizes, channels):
        error = float(np.abs(ours - theirs).max())
        print(f"{name} {what}: max |difference| {error:.2e}")
        assert np.std(theirs) > 0.1
        assert error < 1e-4, (name, what, error)
