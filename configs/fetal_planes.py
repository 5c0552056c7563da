"""Classification of fetal planes, as in the right half of the paper's Table 1.

    python eval.py --config=configs/fetal_planes.py:linear --checkpoint=runs/vitb \
        --workdir=runs/vitb_linear --config.data.data_dir=DATA \
        --config.data.manual_dir=FOLDER_WITH_THE_ZIP

The argument is the kind of evaluation: linear (the default), finetune, knn, logreg or
fewshot. `--config.data.download=True` fetches the 2 GB from Zenodo instead; any csv or
folder per class works too (`--config.data.name=csv --config.data.path=FILE`).
ViT-S/16 from scratch needs no checkpoint: `:finetune --config.model.arch=small
--config.rows="('random init',)"`.

Numbers of the paper (macro F1 on 5,271 test images, mean of 3 seeds): UltraDINO ViT-B
95.06 linear and 94.54 fine-tuned, ViT-S 94.17 and 94.74; from scratch 84.79 (B) and
85.08 (S). Its validation patients are not published, so only the test set is the same;
`split_files` takes the three csv files of its repository.

Sources: [P] the paper; [U] the released UltraDINO configs and code; [D] DINOv2; [J]
this project.
"""

from ml_collections import ConfigDict


def get_config(mode: str = "linear") -> ConfigDict:
    c = ConfigDict()
    c.task = "classification"
    c.mode = mode

    c.data = dataset("fetal_planes")
    # Another set that only tests what was trained on the one above, e.g.
    # african_planes: all of its images, the classes both have.
    c.external = dataset("")
    # Test or validation images among the pretraining images stop the run.
    c.allow_overlap = False

    c.model = ConfigDict()
    # Size the checkpoint must have, '' for any; without one, the size built.
    c.model.arch = ""
    c.model.patch_size = 16  # [P] without a checkpoint only
    c.model.image_size = 0  # [U] 224; 0 is what the checkpoint carries
    c.model.channels = 0  # 0 is what the checkpoint carries
    # [U] False: bilinear, every third pixel of a 700-pixel image; True averages, as
    # the crops of pretraining do.
    c.model.antialias = False

    # What is evaluated side by side. Pixels are left out of fine-tuning, where random
    # init is the paper's 'from scratch'.
    c.rows = ("teacher", "random init", "raw pixels")
    c.random_init_seed = 0
    c.seeds = (0, 1, 2)  # [P] three; knn and logreg have nothing random
    c.batch_size = 64  # [J] of feature extraction
    c.replicates = 2000  # [J] of the patient bootstrap

    c.linear = ConfigDict()
    # 'paper' [U]: every step sees augmented, mixed images; 'cached' [D]: features are
    # extracted once, minutes instead of hours on a CPU.
    c.linear.recipe = "paper"
    c.linear.batch_size = 128  # [U]
    c.linear.epochs = 10  # [U]
    c.linear.warmup_epochs = 5  # [U] half of the run

    c.finetune = ConfigDict()
    # 'reference' [U]: one rate for all, weight decay 0.01, which is what ran;
    # 'intended': layer-wise rates, no decay, which is what its config says.
    c.finetune.layerwise = "reference"
    c.finetune.learning_rate = 1e-4  # [U]
    c.finetune.layerwise_decay = 0.65  # [U] read by 'intended' only
    c.finetune.batch_size = 128  # [U]
    c.finetune.epochs = 200  # [U]
    c.finetune.warmup_epochs = 5  # [U]
    c.finetune.checkpoint_every = 10  # [J] epochs

    c.knn = ConfigDict()
    c.knn.ks = (10, 20, 100, 200)  # [D] chosen on validation
    c.knn.temperature = 0.07  # [D]

    c.logreg = ConfigDict()
    c.logreg.log10_c = (-6.0, 5.0, 45)  # [D] from, to, how many
    c.logreg.max_iter = 1000  # [D]

    c.fewshot = ConfigDict()
    c.fewshot.shots = (1, 5, 10, 20)  # [J] per class; validation gets as many
    c.fewshot.unit = "images"  # or 'patients', each with all images of the class
    c.fewshot.seeds = (0, 1, 2, 3, 4)  # [P] five draws
    c.fewshot.methods = ("linear", "logreg", "knn")
    c.fewshot.linear_steps = 450  # [U] as many as on all labels
    return c


def dataset(name: str) -> ConfigDict:
    d = ConfigDict()
    d.name = name  # fetal_planes, african_planes, csv or folder
    d.path = ""  # of the csv (path,label[,patient][,split][,..]) or the folder
    d.data_dir = ""  # where fetal_planes and african_planes are prepared
    d.manual_dir = ""  # what you downloaded yourself: zip or unpacked
    d.download = False
    d.val_fraction = 0.2  # [P] of the training patients
    d.test_fraction = 0.2  # of the patients, where there is no test split
    d.split_seed = 0
    d.split_files = ()  # three csv files: train, val, test
    d.classes = ()  # label order of csv and folder; () is alphabetical
    d.mask_corner = False  # black out the scanner's preset text, which can name a class
    return d
