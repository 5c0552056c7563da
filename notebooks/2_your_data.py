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
# # 2. Your data: prepare, look, pretrain
#
# `prepare` reads a folder of PNG, JPEG, TIFF, DICOM (single and multi-frame), video and
# archives, cuts out the ultrasound region, drops duplicates and writes pixels only.
# Nothing leaves this machine. Here the folder is made of phantoms; set `INPUT` to
# yours.

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

from configs import pretrain_smoke
from ultradino_jax import prepare_cache, train, write_phantoms

SMOKE = bool(os.environ.get("ULTRADINO_SMOKE"))  # the tests run this in seconds
INPUT, CACHE, RUN = "runs/notebook_images", "runs/notebook_cache", "runs/notebook_own"

# %%
if not Path(INPUT).exists():
    write_phantoms("folder", INPUT, patients=2 if SMOKE else 20, seed=1, size=128)
manifest = prepare_cache(
    INPUT, CACHE, short_side=96, workers=0 if SMOKE else None, progress=False
)
manifest["records"], manifest["counts"]

# %% [markdown]
# Look before you train: names, text or calipers that should not be there show here.
# report.html beside it says what was dropped and why.

# %%
from PIL import Image

Image.open(f"{CACHE}/contact_sheet.png")

# %% [markdown]
# Train on it. For a real run take `configs/pretrain_vitb.py` or `pretrain_vits.py`;
# `normalization="cache"` uses the measured mean and standard deviation.

# %%
config = pretrain_smoke.get_config("seconds" if SMOKE else "minutes")
config.data.root = CACHE
if not SMOKE:
    config.data.normalization = "cache"
config.knn.enabled = False  # it is for phantoms
train(config, RUN)
