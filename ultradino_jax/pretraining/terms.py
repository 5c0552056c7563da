"""Which numbers of a training step are terms of the loss.

The names are those `objective.compute_losses` gives them, and it alone: a term is
called as its weight in config.loss. koleo_weight weighs 'koleo'; dino_weight weighs
'dino_local' and 'dino_global'. So the row of a run and the names of its weights tell
its terms, whatever objective the run was made with.
"""

from collections.abc import Iterable

SUFFIX = "_weight"


def terms_in(row: Iterable[str], weights: Iterable[str]) -> list[str]:
    """Keys of a row of metrics.jsonl that are terms of the loss, weight by weight.

    weights: names that end in '_weight', say the keys of config.loss (others are
    passed over). The terms add up to the row's 'total'.
    """
    row = list(row)
    names = [w.removesuffix(SUFFIX) for w in weights if w.endswith(SUFFIX)]
    return [
        key
        for name in names
        for key in row
        if key == name or (key.startswith(f"{name}_") and not key.endswith(SUFFIX))
    ]
