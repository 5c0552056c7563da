# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 5. What it attends to, and taking it elsewhere
#
# Attention of the class token, principal components of the patch tokens, and an export
# that `transformers` loads. Set `CHECKPOINT` to a run or any backbone file.

# %%
# On Colab: put the address of the git repository here, the only line to change.
REPOSITORY = ""
EXTRAS = ""  # "[cuda]" on a GPU runtime

import os
import sys

if os.path.exists("../setup.py"):  # started in notebooks/
    os.chdir("..")
# !test -f setup.py || git clone -q "$REPOSITORY" ultradino_jax
if os.path.isdir("ultradino_jax/.git"):
    os.chdir("ultradino_jax")
# !{sys.executable} -m pip show -q ultradino_jax || {sys.executable} -m pip install -q -e ".$EXTRAS"

# %%
from pathlib import Path

import numpy as np

from configs import pretrain_smoke
from ultradino_jax import export_model, load_backbone, train
from ultradino_jax.data.phantom.render import render_phantom
from ultradino_jax.evaluators.features import Preprocess
from ultradino_jax.health.panels import attention_maps, pca_colours

SMOKE = bool(os.environ.get("ULTRADINO_SMOKE"))  # the tests run this in seconds
CHECKPOINT = "runs/notebook"

# %%
if not Path(CHECKPOINT).exists():
    train(pretrain_smoke.get_config("seconds" if SMOKE else "minutes"), CHECKPOINT)
# Finer than it was trained at: positions are interpolated.
backbone = load_backbone(CHECKPOINT, image_size=64 if SMOKE else 192)
preprocess = Preprocess.of(backbone, antialias=True)
phantoms = [render_phantom(i, size=(192, 256), settings=3) for i in range(3)]
pixels = np.stack([preprocess.resize(p.image[:, :, None]) for p in phantoms])
maps, tokens = attention_maps(backbone, pixels)
colours = pca_colours(tokens)
maps.shape, tokens.shape

# %% [markdown]
# `experiments/attention_maps.py` draws the same for a folder, with and without register
# tokens.

# %%
from matplotlib import pyplot as plt

heads = maps.shape[1]
figure, axes = plt.subplots(3, heads + 2, figsize=(1.6 * (heads + 2), 5))
for line, image, attention, colour in zip(axes, pixels, maps, colours, strict=True):
    for panel, picture in zip(line, [image[..., 0], *attention, colour], strict=True):
        panel.imshow(picture, cmap="gray" if picture is image[..., 0] else None)
        panel.set_axis_off()
figure

# %% [markdown]
# Export for Hugging Face; also `timm`, `meta`, `safetensors` and `onnx`. The files are
# loaded back and compared before the folder appears.

# %%
report = export_model(CHECKPOINT, "hf", "runs/notebook_hf")
report

# %%
# from transformers import AutoModel
# AutoModel.from_pretrained("runs/notebook_hf")
sorted(path.name for path in Path("runs/notebook_hf").iterdir())
