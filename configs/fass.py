"""Segmentation of fetal abdominal structures, as in the paper's Table 1 and Figure 1.

    python eval.py --config=configs/fass.py:n20 --checkpoint=runs/vitb \
        --workdir=runs/vitb_fass_n20 --config.data.data_dir=DATA \
        --config.data.manual_dir=FOLDER_WITH_THE_ZIP

The argument is what is trained on: full (the default), n20 (20 images; any number),
10pct, 25pct or 50pct (of the training patients), p4 (4 patients). All seeds or splits
run in one call; the same call again goes on after an interruption. Any folder of images
and index masks works too (`--config.data.name=folder --config.data.path=DIR
--config.data.classes="('background','head')"`).

Rows that are trained from scratch need no checkpoint: `--config.rows="('unet',
'multiresunet', 'unetr')"`, or `"('random init',)"` with `--config.model.arch=small`
(docs/baselines.md).

Numbers of the paper (mean Dice on its test set; whether with background it does not
say): 20 images, 5 splits: UltraDINO ViT-B 74.24, ViT-S 73.29, from scratch 63.28 and
62.54; full: 79.51 and 79.14, from scratch 78.53 and 77.95. Its split is not published,
so figures are not comparable image by image.

Sources: [P] the paper; [U] the released UltraDINO configs and code; [N] the paper or
release of the network; [J] this project.
"""

from ml_collections import ConfigDict


def get_config(subset: str = "full") -> ConfigDict:
    c = ConfigDict()
    c.task = "segmentation"
    c.subset = subset
    few = subset[:1] in ("n", "p")

    c.data = dataset("fass")
    # Test or validation images among the pretraining images stop the run.
    c.allow_overlap = False

    c.model = ConfigDict()
    # Size the checkpoint must have, '' for any; without one, the size built.
    c.model.arch = ""
    c.model.patch_size = 16  # [P] without a checkpoint only
    c.model.image_size = 224  # [U]
    # 'stretch' [U] images to the square, or keep their aspect in a 'letterbox'.
    c.model.resize = "stretch"
    c.model.channels = 0  # 0 is what the checkpoint carries
    c.model.registers = "drop"  # [U] has none; 'keep' trains them on
    c.model.norm = "none"  # [U]; 'batch' puts a batch norm behind every convolution
    c.model.head_channels = 0  # [U] the backbone's width, which 0 stands for

    # [P] 'from scratch' is the second; also unet, multiresunet and unetr.
    c.rows = ("teacher", "random init")
    c.random_init_seed = 0
    c.seeds = (0, 1, 2, 3, 4) if few else (0, 1, 2)  # [P] five splits; three seeds
    c.replicates = 2000  # [J] of the patient bootstrap

    c.train = ConfigDict()
    c.train.steps = 20_000 if few else 45_000  # [U]
    # [U] from scratch gets 45,000 everywhere on this set; 'equal' gives all rows
    # `steps`.
    c.train.scratch_steps = 45_000
    c.train.budget = "paper"
    c.train.warmup_steps = 1500  # [U]
    c.train.batch_size = 64  # [U]
    c.train.learning_rate = 1e-4  # [U]
    c.train.drop_path = 0.4  # [U] linear from 0 at the first block
    # 'reference' [U]: sigmoid Dice beside a softmax cross entropy; or 'softmax_dice'.
    c.train.dice = "reference"
    # 'reference' [U]: every affine moves by +20 % right and down; or 'symmetric'.
    c.train.translation = "reference"
    c.train.validate_every = 450  # [U] steps
    c.train.checkpoint_every = 4  # [J] validations

    # Rows of supervised networks: batches, warm-up, loss and augmentation are those of
    # c.train, steps [J] those of every other row from scratch.
    c.unet = ConfigDict()
    c.unet.learning_rate = 1e-4  # [J] c.train's; its paper used SGD on single images
    c.unet.weight_decay = 0.01  # [J] c.train's
    c.unet.steps = 45_000
    c.unet.width = 64  # [N]
    c.unet.norm = "none"  # [N]; or 'batch'

    c.multiresunet = ConfigDict()
    c.multiresunet.learning_rate = 1e-3  # [N] Adam's default
    c.multiresunet.weight_decay = 0.0  # [N]
    c.multiresunet.steps = 45_000
    c.multiresunet.width = 32  # [N]

    c.unetr = ConfigDict()
    c.unetr.learning_rate = 1e-4  # [N]
    c.unetr.weight_decay = 1e-5  # [N] of its release
    c.unetr.steps = 45_000
    c.unetr.width = 16  # [N]
    c.unetr.embed_dim = 768  # [N] this and the next two: ViT-B
    c.unetr.depth = 12
    c.unetr.num_heads = 12
    return c


def dataset(name: str) -> ConfigDict:
    d = ConfigDict()
    d.name = name  # fass, jnu_ifm, psfhs or folder
    d.path = ""  # of the folder
    d.classes = ()  # of the folder's masks in index order, background first
    d.data_dir = ""  # where fass, jnu_ifm and psfhs are prepared
    d.manual_dir = ""  # what you downloaded yourself: zip or unpacked
    d.download = False
    d.test_fraction = 0.2  # [P] of the patients
    d.val_fraction = 0.2  # [P] of the other patients
    d.split_seed = 0  # of test and validation patients
    d.split_file = ""  # csv with id,split instead; {seed} is replaced
    d.max_images = 10  # [P] per patient of p4
    d.group_by = "examination"  # of jnu_ifm; 'day' is stricter
    return d
