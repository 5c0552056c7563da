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
# # 1. Quickstart: pretrain on the phantom, watch the run, score it
#
# DINOv2 on rendered ultrasound, no data needed. About five minutes on two CPU cores.

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
import json

from configs import pretrain_smoke
from ultradino_jax import train
from ultradino_jax.health.phantom_knn import phantom_knn
from ultradino_jax.run.images import phantom_source

SMOKE = bool(os.environ.get("ULTRADINO_SMOKE"))  # the tests run this in seconds
RUN = "runs/notebook"

# %% [markdown]
# The recipe is `configs/pretrain_vitb.py`; this is its smoke size. Running the cell
# again resumes the run.

# %%
config = pretrain_smoke.get_config("seconds" if SMOKE else "minutes")
config.knn.enabled = False  # see below
train(config, RUN)

# %% [markdown]
# Is it healthy? The loss terms should fall; the teacher's entropy should stay between 0
# (collapsed onto one prototype) and ln K (nothing learnt yet).

# %%
from matplotlib import pyplot as plt

with open(f"{RUN}/metrics.jsonl") as file:
    rows = [json.loads(line) for line in file]
steps = [row["step"] for row in rows]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
for name in ("dino_local", "dino_global", "ibot"):
    left.plot(steps, [row[name] for row in rows], label=name)
left.set(xlabel="step", title="loss terms")
left.legend()
right.plot(steps, [row["teacher_entropy"] for row in rows], label="teacher entropy")
right.axhline(rows[0]["ln_k"], ls="--", label="ln K")
right.set(xlabel="step", title="nats", ylim=0)
right.legend()
figure

# %% [markdown]
# Does it know planes? Neighbours vote in the features of the teacher, of the same
# network before training, and in raw pixels.

# %%
scores = phantom_knn(RUN, 4 if SMOKE else 120, phantom_source(config))
scores
