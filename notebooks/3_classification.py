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
# # 3. Linear probe and fine-tuning on FETAL_PLANES_DB
#
# Set `CHECKPOINT` to a run, an export or a DINOv2, iBOT, USFM or UltraDINO file, and
# `DOWNLOAD` to the folder with FETAL_PLANES_ZENODO.zip (Zenodo 3904280, CC BY 4.0).
# Without them a smoke model and a phantom in the same layout are used.

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

from configs import fetal_planes, pretrain_smoke
from ultradino_jax import evaluate, train, write_phantoms

SMOKE = bool(os.environ.get("ULTRADINO_SMOKE"))  # the tests run this in seconds
CHECKPOINT, DOWNLOAD = "runs/notebook", "runs/notebook_planes"

# %%
if not Path(CHECKPOINT).exists():
    train(pretrain_smoke.get_config("seconds" if SMOKE else "minutes"), CHECKPOINT)
if not Path(DOWNLOAD).exists():
    patients, pixels = (8, 64) if SMOKE else (40, 128)
    write_phantoms("fetal_planes", DOWNLOAD, patients=patients, seed=1, size=pixels)


def config_of(mode):
    config = fetal_planes.get_config(mode)
    config.data.manual_dir, config.data.data_dir = DOWNLOAD, "runs/notebook_data"
    config.seeds = (0,)
    if SMOKE:
        config.rows = ("teacher",)
        config.linear.epochs = config.finetune.epochs = 2
        config.linear.warmup_epochs = config.finetune.warmup_epochs = 1
        config.finetune.batch_size = config.linear.batch_size = 16
        config.replicates = 50
    return config

# %% [markdown]
# Linear probe: 52 classifiers trained together on frozen features, the best by
# validation. `cached` extracts the features once; `paper` sees augmented images.

# %%
config = config_of("linear")
config.linear.recipe = "cached"
linear = evaluate(config, CHECKPOINT, "runs/notebook_linear")

# %% [markdown]
# Fine-tuning moves all weights. 200 epochs in the paper; a few show how it goes.

# %%
config = config_of("finetune")
config.finetune.epochs = 2 if SMOKE else 20
config.finetune.warmup_epochs = 1
tuned = evaluate(config, CHECKPOINT, "runs/notebook_finetune")

# %%
from PIL import Image

Image.open("runs/notebook_finetune/confusion.png")
