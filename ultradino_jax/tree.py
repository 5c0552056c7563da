"""Paths of parameter trees."""

from collections.abc import Callable
from typing import Any

import jax


def path_name(path) -> str:
    """Key path -> 'backbone/blocks/attn/qkv/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def map_with_name(function: Callable[..., Any], tree, *rest):
    """tree.map whose function also gets each leaf's path: f(name, leaf, ...)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(path_name(path), *leaves), tree, *rest
    )


def flat_names(tree) -> dict[str, Any]:
    """{path: leaf} in traversal order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_name(path): leaf for path, leaf in leaves}
