"""The seconds config with a network of next to nothing, on the cache beside it."""

from ml_collections import ConfigDict

from configs import pretrain_smoke


def get_config() -> ConfigDict:
    c = pretrain_smoke.get_config("seconds")
    c.epochs, c.steps_per_epoch = 2, 2
    c.model.embed_dim, c.model.depth, c.model.num_heads = 16, 2, 2
    c.head.hidden_dim, c.head.bottleneck_dim, c.head.num_prototypes = 16, 8, 32
    c.data.root = "cache"
    c.data.normalization = "cache"
    return c
