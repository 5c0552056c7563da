"""UltraDINO ViT-S/16: the paper's smaller model, all else as pretrain_vitb.

    python main.py --config=configs/pretrain_vits.py --workdir=runs/vits \
        --config.data.root=FOLDER

Expected in the paper (Table 1): FETAL_PLANES_DB F1 94.74 fine-tuned, 94.17 linear
probe; FASS Dice 79.14; JNU-IFM Dice 85.58.
"""

from ml_collections import ConfigDict

from configs import pretrain_vitb


def get_config() -> ConfigDict:
    c = pretrain_vitb.get_config()
    c.model.variant = "small"  # [P]
    return c
