"""Segmentation of pubic symphysis and fetal head in transperineal ultrasound.

    python eval.py --config=configs/jnu_ifm.py:p4 --checkpoint=runs/vitb \
        --workdir=runs/vitb_jnu --config.data.data_dir=DATA \
        --config.data.manual_dir=FOLDER_WITH_THE_ARCHIVE

The argument is as in configs/fass.py; the paper's is p4, the default: 4 patients with
at most 10 images each, 5 splits, half of all patients held out for the test. Frames
that lack a structure are left out. 'Patients' are examinations: the set does not
say which videos are of one woman.

Numbers of the paper (mean Dice): UltraDINO ViT-B 86.01, ViT-S 85.58, from scratch 79.92
and 79.59. Its split is not published.

Sources: [P] the paper; [U] the released UltraDINO configs and code.
"""

from ml_collections import ConfigDict

from configs import fass


def get_config(subset: str = "p4") -> ConfigDict:
    c = fass.get_config(subset)
    c.data.name = "jnu_ifm"
    c.data.test_fraction = 0.5  # [P]
    c.train.steps = 20_000  # [U]
    c.train.scratch_steps = 20_000  # [U]
    for row in ("unet", "multiresunet", "unetr"):
        c[row].steps = 20_000  # [J] as every other row
    return c
