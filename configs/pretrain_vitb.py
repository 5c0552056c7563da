"""UltraDINO ViT-B/16: the paper's pretraining recipe.

    python main.py --config=configs/pretrain_vitb.py --workdir=runs/vitb \
        --config.data.root=FOLDER

Hardware of the paper: two H100 80 GB, batch 512 (256 per GPU). Expected result there
(UltraDINO, Table 1, after 2M private images): FETAL_PLANES_DB F1 94.54 fine-tuned,
95.06 linear probe; FASS Dice 79.51; JNU-IFM Dice 86.01.

Sources: [P] the paper; [U] the released UltraDINO configs and code; [D] DINOv2's
defaults, which [U] keeps; [J] this project.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0  # [D]
    c.batch_size = 512  # [P] section 2; images per step over all devices
    # A group is what a GPU is in the reference: masks, KoLeo and drop path work within
    # it. Raised to a multiple of the devices when there are more of them.
    c.groups = 2  # [P] two GPUs
    c.accum_steps = 1  # [U] micro-batches per step; a group is never cut
    c.epochs = 40  # [P] section 2
    c.steps_per_epoch = 3906  # [P] 2M images / 512; 0 means one pass over the source

    # Continue from these weights (a run, or a DINOv2, iBOT, UltraDINO or timm file):
    # architecture from the file, heads fresh. See continue_pretrain.py.
    c.init_from = ""  # [J]

    _networks(c)
    _objective(c)
    _optimiser(c)
    _images(c)
    _run(c)
    return c


def _networks(c: ConfigDict) -> None:
    c.model = ConfigDict()
    c.model.variant = "base"  # [P]
    c.model.patch_size = 16  # [P]
    c.model.num_registers = 4  # [U] vitb16_dinus_13m.yaml
    c.model.layerscale = 1e-5  # [D]
    c.model.drop_path = 0.3  # [D] uniform over the blocks, batch-subset form
    c.model.pos_offset = 0.1  # [D]
    c.model.pos_antialias = False  # [D]
    c.model.dtype = "bfloat16"  # [J] the reference runs in float16 with loss scaling
    # [J] 'none', 'matmuls' (no product with a weight is computed twice), 'norms' (only
    # normalised inputs are kept), or 'auto', the fastest that fits the device
    c.model.remat = "auto"
    # [J] blocks per iteration of the scan; 0 is all (on an H100 4 % faster, on a CPU a
    # tenth), but 1 with 'norms', which is there to save memory
    c.model.unroll = 0
    c.model.attention = "auto"  # [J] 'auto', 'xla', 'cudnn' or 'triton'

    c.head = ConfigDict()
    c.head.hidden_dim = 2048  # [D]
    c.head.bottleneck_dim = 256  # [D]
    c.head.num_prototypes = 65536  # [D]
    c.head.num_layers = 3  # [D]
    c.ibot = ConfigDict()
    c.ibot.separate_head = False  # [D] the iBOT loss uses the DINO head
    c.ibot.num_prototypes = 65536  # [D] read only with a separate head


def _objective(c: ConfigDict) -> None:
    c.loss = ConfigDict()
    c.loss.dino_weight = 1.0  # [D]
    c.loss.ibot_weight = 1.0  # [D]
    c.loss.koleo_weight = 0.1  # [D] cosine to
    c.loss.koleo_weight_end = placeholder(float)  # [J] None: constant
    c.loss.gram_weight = 0.0  # [J] of patch tokens, as in DINOv3; 0 leaves it out
    c.loss.student_temp = 0.1  # [D]
    c.loss.centering = "centering"  # [D] or 'sinkhorn_knopp'
    c.loss.center_momentum = 0.9  # [D]
    c.loss.sinkhorn_iterations = 3  # [D]
    c.loss.chunk_rows = 1024  # [J] rows of logits in memory at once, per group

    c.teacher = ConfigDict()
    c.teacher.momentum = 0.992  # [D] cosine to
    c.teacher.momentum_end = 1.0  # [D]
    c.teacher.warmup_temp = 0.04  # [D] linear to
    c.teacher.temp = 0.07  # [D]
    c.teacher.warmup_temp_epochs = 30.0  # [D] nominal epochs


def _optimiser(c: ConfigDict) -> None:
    c.optim = ConfigDict()
    c.optim.base_lr = 0.004  # [D] times sqrt(batch / reference_batch)
    c.optim.reference_batch = 1024  # [D]
    c.optim.min_lr = 1e-6  # [D]
    c.optim.warmup_epochs = 10.0  # [D]
    c.optim.weight_decay = 0.04  # [D] cosine to
    c.optim.weight_decay_end = 0.4  # [D]
    c.optim.freeze_last_layer_epochs = 1.0  # [D]
    c.optim.freeze_backbone_epochs = 0.0  # [J] for continued pretraining
    c.optim.layerwise_decay = 0.9  # [D]
    c.optim.patch_embed_multiplier = 0.2  # [D]
    c.optim.clip_norm = 3.0  # [D] per sub-module
    c.optim.b1 = 0.9  # [D]
    c.optim.b2 = 0.999  # [D]


def _images(c: ConfigDict) -> None:
    c.crops = ConfigDict()
    c.crops.style = "ultrasound"  # [U] augmentations.py; or 'imagenet' [D]
    c.crops.global_size = 224  # [D]
    c.crops.local_size = 96  # [D]
    c.crops.num_local = 8  # [D]
    c.crops.global_scale = (0.32, 1.0)  # [D] fraction of the image's area
    c.crops.local_scale = (0.05, 0.32)  # [D]
    c.crops.flip_prob = 0.5  # [U] vertical for 'ultrasound', horizontal for 'imagenet'

    c.masking = ConfigDict()
    c.masking.probability = 0.5  # [D] of the global crops of a group
    c.masking.ratio = (0.1, 0.5)  # [D]
    c.masking.style = "block"  # [D] or 'random' [U]

    c.data = ConfigDict()
    c.data.root = ""  # folder of images or prepared cache; '' is the built-in phantom
    c.data.list_file = ""  # [U] one relative path per line
    c.data.channels = 1  # [U]
    c.data.normalization = "fus"  # [U]; 'imagenet', or 'cache' for measured statistics
    c.data.phantom_images = 4096  # [J]
    c.data.phantom_size = (384, 512)  # [J] height, width in pixels
    c.data.phantom_settings = 0  # [J] scanners and mothers; 0 draws one per image
    c.data.phantom_seed = 0  # [J]
    c.data.workers = 8  # [J] processes; 0 reads in threads of this one
    c.data.threads = 4  # [J] batches under construction at once, per worker
    c.data.prefetch = 2  # [J] finished batches held, per worker
    # 'host' renders crops as the reference does; 'device' sends one picture per image,
    # shrunk to at most canvas x canvas pixels, and renders in the step: see
    # docs/performance.md.
    c.data.render = "host"  # [U]
    c.data.canvas = 384  # [J] read only with 'device'
    c.data.max_bad_fraction = 0.01  # [J] of the images may be unreadable


def _run(c: ConfigDict) -> None:
    c.mesh = ConfigDict()
    c.mesh.fsdp = 1  # [U] NO_SHARD; devices that share one copy of the state

    # [J] folder for compiled programs; 'auto' is in the user's cache folder, on GPUs
    c.compilation_cache = "auto"

    c.log_every = 10  # [D] steps
    c.checkpoint_every = 3906  # [J] steps; also exports the teacher's backbone
    c.keep_checkpoints = 3  # [D] the newest; besides them
    c.keep_every = 0  # [J] those of every so many steps (0: none)
    c.keep_best = True  # [J] and that of the highest kNN
    c.restart = False  # [J] begin again where none of the checkpoints is usable

    c.nan = ConfigDict()
    c.nan.policy = "stop"  # [J] or 'skip': do not apply the update of such a step
    c.nan.max_skips = 10  # [J] then the run stops all the same

    # Measured on the teacher beside the training: kNN, RankMe and the like, see
    # docs/health.md.
    c.health = ConfigDict()
    c.health.every = 3906  # [J] steps; 0 is never
    c.health.images = 512  # [J] training images looked at
    c.health.labels = ""  # csv or folder of classes for the kNN; '' is the phantom
    c.health.patients = 60  # [J] of the phantom, half of them known
    c.health.panels_every = 1  # [J] times measured per attention and PCA panel; 0 none

    c.knn = ConfigDict()
    c.knn.enabled = False  # [J] phantom kNN of teacher, random init and raw pixels
    c.knn.patients = 60  # [J] half of them give the labelled neighbours
    # Stop when the teacher's phantom kNN at a checkpoint is this much (in accuracy)
    # below that of init_from; 0 never stops.
    c.knn.guard = 0.0  # [J]
