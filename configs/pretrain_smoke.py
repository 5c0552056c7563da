"""Smoke run: a tiny ViT on the built-in phantom, minutes on two CPU cores.

    python main.py --config=configs/pretrain_smoke.py --workdir=runs/smoke

Ends with the kNN accuracy of the teacher, of the same network before training and of
raw pixels on phantom patients that were not trained on. It proves the machinery, not
the method: see the README for what it printed, where and when.

What differs from the recipe, and why: small shapes, for time; LayerScale 1 and no
layer-wise decay, since a run of minutes cannot wait for gains of 1e-5 to grow;
Sinkhorn-Knopp with sharp targets, since with centering so short a run stays at the
uniform solution (loss ln K); twice the learning rate; wider local crops, since 5 % of
64 px shows nothing; three scanners and mothers, so that the fetus is what varies.
"""

from ml_collections import ConfigDict

from configs import pretrain_vitb


def get_config(size: str = "minutes") -> ConfigDict:
    """'minutes', or 'seconds': a few steps of next to nothing, for tests."""
    if size not in ("minutes", "seconds"):
        raise ValueError(f"size {size!r}: choose minutes or seconds")
    c = pretrain_vitb.get_config()
    c.batch_size = 64
    c.groups = 1
    c.epochs = 13
    c.steps_per_epoch = 60
    c.model.variant = "tiny"
    c.model.layerscale = 1.0
    c.model.drop_path = 0.0
    c.model.dtype = "float32"
    c.model.remat = "none"
    c.head.hidden_dim = 512
    c.head.bottleneck_dim = 128
    c.head.num_prototypes = 128
    c.loss.centering = "sinkhorn_knopp"
    c.teacher.momentum = 0.98
    c.teacher.warmup_temp = 0.015
    c.teacher.temp = 0.02
    c.teacher.warmup_temp_epochs = 3.0
    c.optim.base_lr = 0.008
    c.optim.warmup_epochs = 1.0
    c.optim.layerwise_decay = 1.0
    c.optim.patch_embed_multiplier = 1.0
    c.crops.global_size = 64
    c.crops.local_size = 32
    c.crops.num_local = 4
    c.crops.global_scale = (0.5, 1.0)
    c.crops.local_scale = (0.2, 0.5)
    c.data.phantom_images = 3840  # rendered once, on one core: half the cost of a step
    c.data.phantom_size = (192, 256)
    c.data.phantom_settings = 3
    c.data.workers = 0
    c.data.threads = 1
    c.log_every = 20
    c.checkpoint_every = 200
    c.health.every = 100
    c.health.images = 256
    c.knn.enabled = True
    c.knn.patients = 120
    if size == "seconds":
        c.batch_size, c.groups = 8, 8
        c.epochs, c.steps_per_epoch = 2, 3
        c.model.patch_size = 8
        c.model.unroll = 1
        c.head.hidden_dim, c.head.bottleneck_dim = 32, 16
        c.head.num_prototypes = 64
        c.teacher.warmup_temp_epochs = 1.0
        c.crops.global_size, c.crops.local_size, c.crops.num_local = 32, 16, 2
        c.data.phantom_images, c.data.phantom_size = 24, (40, 48)
        c.log_every, c.checkpoint_every = 1, 2
        c.health.every = 0
        c.knn.enabled = False
    return c
