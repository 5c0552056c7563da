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
# # 4. Segmentation from twenty images
#
# UperNet on a pretrained backbone, trained on 20 images of FASS (Mendeley
# 4gcpm9dsc3). Set `CHECKPOINT` and `DOWNLOAD` to yours; without them a smoke model and
# a phantom in the same layout are used. Own images and masks: docs/segmentation.md.

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

from configs import fass, pretrain_smoke
from ultradino_jax import evaluate, train, write_phantoms

SMOKE = bool(os.environ.get("ULTRADINO_SMOKE"))  # the tests run this in seconds
CHECKPOINT, DOWNLOAD = "runs/notebook", "runs/notebook_fass"

# %%
if not Path(CHECKPOINT).exists():
    train(pretrain_smoke.get_config("seconds" if SMOKE else "minutes"), CHECKPOINT)
if not Path(DOWNLOAD).exists():
    write_phantoms("fass", DOWNLOAD, patients=14, seed=0, size=128)
config = fass.get_config("n20")
config.data.manual_dir, config.data.data_dir = DOWNLOAD, "runs/notebook_data"

# %% [markdown]
# The paper's budget is 20,000 steps of 64 images at 224 pixels and five draws of 20
# images. This is a short run at 64 pixels; delete the cell for the real one.

# %%
config.seeds = (0,)
config.rows = ("teacher",) if SMOKE else ("teacher", "random init")
config.model.image_size, config.model.head_channels = 64, 8 if SMOKE else 32
config.train.steps, config.train.budget = 2 if SMOKE else 400, "equal"
config.train.warmup_steps = 1 if SMOKE else 20
config.train.batch_size = 8 if SMOKE else 16
config.train.learning_rate, config.train.validate_every = 1e-3, 100
config.train.drop_path = 0.1
config.replicates = 50 if SMOKE else 2000

# %%
results = evaluate(config, CHECKPOINT, "runs/notebook_segmentation")

# %% [markdown]
# Image, truth and prediction. `python -m ultradino_jax.segment` writes masks for a
# folder of new images.

# %%
from PIL import Image

Image.open("runs/notebook_segmentation/overlays.png")
