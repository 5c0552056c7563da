"""DINO, iBOT and KoLeo losses, centering and Sinkhorn-Knopp: pure functions.

Arrays are global: under jit on a sharded batch every sum is already the sum over
devices, so no collective is written here. All arithmetic is float32.
"""

import jax
import jax.numpy as jnp


def center_probs(teacher_logits, center, teacher_temp):
    """Targets softmax((z - c) / tau_t): logits [..,K], center [K] -> [..,K].

    Caron et al. 2021, eq. 1 with the centering of section 3.1.
    """
    z = teacher_logits.astype(jnp.float32)
    return jax.nn.softmax((z - center) / teacher_temp, axis=-1)


def update_center(center, batch_center, momentum: float = 0.9):
    """c <- m c + (1-m) b, both [K] (Caron et al. 2021, eq. 4)."""
    return momentum * center + (1 - momentum) * batch_center


def sinkhorn_knopp(teacher_logits, teacher_temp, *, weights=None, num_iterations=3):
    """Targets by Sinkhorn-Knopp: logits [M,K] -> rows that sum to 1, [M,K].

    `weights` [M] marks real rows with 1 and padding with 0; padding takes no part and
    comes back as zeros. The iteration runs in the log domain: the reference
    exponentiates z/tau directly, which overflows float32 beyond z/tau = 88.
    Source: DINOv2 `sinkhorn_knopp_teacher` (the scale factors it applies in between
    cancel, its last division is by column).
    """
    log_q = teacher_logits.astype(jnp.float32) / teacher_temp
    if weights is not None:
        log_q = jnp.where(weights[:, None] > 0, log_q, -jnp.inf)
    for _ in range(num_iterations):
        log_q = log_q - jax.nn.logsumexp(log_q, axis=0, keepdims=True)
        row = jax.nn.logsumexp(log_q, axis=1, keepdims=True)
        log_q = log_q - jnp.where(jnp.isfinite(row), row, 0.0)
    return jnp.exp(log_q)


def cross_entropy(teacher_probs, student_logits, student_temp: float = 0.1):
    """-sum_k P_k log softmax(S/tau_s)_k over the last axis: [..,K] -> [..]."""
    log_p = jax.nn.log_softmax(student_logits.astype(jnp.float32) / student_temp)
    return -jnp.sum(teacher_probs * log_p, axis=-1)


def dino_loss(teacher_probs, global_logits, local_logits, student_temp: float = 0.1):
    """DINO's cross-view loss, averaged over its G(G-1) + GL terms.

    teacher_probs: [W,G,b,K] in the order of the crops (not swapped); global_logits:
    [W,G,b,K]; local_logits: [W,L,b,K] or None. Returns (local, global) scalars.
    A student's crop is never compared with the teacher's view of the same crop.
    Source: DINOv2 `ssl_meta_arch.py`; the denominator counts max(GL,1) local terms.
    """
    num_global = global_logits.shape[1]
    num_local = 0 if local_logits is None else local_logits.shape[1]
    terms = num_global * (num_global - 1) + max(num_global * num_local, 1)
    # sum_g CE(P_g, S) = CE(sum_g P_g, S): one pass over the student's log-softmax.
    all_views = teacher_probs.sum(axis=1, keepdims=True)
    other_views = all_views - teacher_probs
    global_loss = cross_entropy(other_views, global_logits, student_temp)
    global_loss = global_loss.mean(axis=(0, 2)).sum() / terms
    if num_local == 0:
        return jnp.float32(0.0), global_loss
    local_loss = cross_entropy(all_views, local_logits, student_temp)
    return local_loss.mean(axis=(0, 2)).sum() / terms, global_loss


def ibot_loss(teacher_probs, student_logits, mask_weights, num_rows: int, **temp):
    """Masked-patch loss: [W,M,K] twice, mask_weights [W,M] -> scalar.

    (1/rows) sum_j w_j CE_j in each group, w_j = 1/(masked patches of that crop), then
    the mean over groups. `num_rows` counts all crops of a group, masked or not.
    Source: DINOv2 `iBOTPatchLoss.forward_masked`.
    """
    loss = cross_entropy(teacher_probs, student_logits, **temp)
    return (loss * mask_weights).sum(axis=1).mean() / num_rows


def koleo_loss(x):
    """Kozachenko-Leonenko spreading loss of features [b,D] -> scalar.

    -mean_i ln(||x_i - x_nn(i)|| + 1e-8) on L2-normalised rows; the neighbour is the
    row of highest cosine and takes gradient too. A group of one row has no neighbour
    and scores 0. Source: Sablayrolles et al. 2019 and DINOv2 `KoLeoLoss`.
    """
    if x.shape[0] < 2:
        return jnp.float32(0.0)
    x = x.astype(jnp.float32)
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-8)
    dots = jnp.einsum("id,jd->ij", x, x, precision="highest")
    dots = jnp.where(jnp.eye(x.shape[0], dtype=bool), -1.0, dots)
    neighbour = jnp.argmax(jax.lax.stop_gradient(dots), axis=1)
    # torch's PairwiseDistance adds 1e-8 to each component of the difference.
    distance = jnp.linalg.norm(x - x[neighbour] + 1e-8, axis=-1)
    return -jnp.log(distance + 1e-8).mean()


def entropy(probs):
    """Shannon entropy in nats over the last axis: [..,K] -> [..]."""
    return -jnp.sum(jax.scipy.special.xlogy(probs, probs), axis=-1)
