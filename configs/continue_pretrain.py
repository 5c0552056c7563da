"""Continue pretraining from public or own weights on your images.

    python main.py --config=configs/continue_pretrain.py --workdir=runs/x \\
        --config.init_from=dinov2_vitb14_reg4_pretrain.pth --config.data.root=FOLDER

The architecture (size, patch, registers, LayerScale) is the file's; three-channel
patch kernels are summed for grey images and positions resized to the global crops.
Heads start fresh on a backbone that is frozen for one epoch, the learning rate is a
tenth of the recipe's, and a run whose teacher falls well below the starting weights in
phantom kNN is stopped. All values here are this project's choice: no paper states a
recipe for it.
"""

from ml_collections import ConfigDict

from configs import pretrain_vitb


def get_config() -> ConfigDict:
    c = pretrain_vitb.get_config()
    c.epochs = 10
    c.optim.base_lr = 0.0004
    c.optim.warmup_epochs = 2.0
    c.optim.freeze_backbone_epochs = 1.0
    c.teacher.warmup_temp_epochs = 3.0
    c.teacher.momentum = 0.996
    c.crops.global_size = 224
    c.crops.local_size = 98  # divisible by DINOv2's patch of 14; 96 for a patch of 16
    c.checkpoint_every = 1000
    c.health.every = 1000
    c.knn.enabled = True
    c.knn.guard = 0.05
    return c
