"""DINO, iBOT, KoLeo and Gram losses, centering and Sinkhorn-Knopp: pure functions.

Arrays are global: under jit on a sharded batch every sum is already the sum over
devices, so no collective is written here. All arithmetic is float32.
"""

import jax
import jax.numpy as jnp


def teacher_log_probs(teacher_logits, offsets, teacher_temp):
    """Logarithm of the targets: logits [..,K], offsets u [I,K] -> [..,K].

    The targets are softmax(z / tau_t - sum_i u_i). With one row u = c / tau_t, c the
    center, that is eq. 1 of Caron et al. 2021 with the centering of section 3.1; with
    the rows of `sinkhorn_offsets`, the targets of Sinkhorn-Knopp.
    """
    log_probs = teacher_logits.astype(jnp.float32) / teacher_temp
    # One after the other: z / tau_t and the sum may both be near 100, where float32 has
    # steps of 8e-6.
    for offset in offsets:
        log_probs = jax.nn.log_softmax(log_probs - offset, axis=-1)
    return log_probs


def update_center(center, batch_center, momentum: float = 0.9):
    """c <- m c + (1-m) b, both [K] (Caron et al. 2021, eq. 4)."""
    return momentum * center + (1 - momentum) * batch_center


def mean_logits(features, real, kernel, dtype):
    """Mean over groups of a group's mean logits: [W,..,E], real [W,..] -> [K].

    Logits are linear in the features, so the mean is taken of those: the logits of all
    rows would not fit.
    """
    features = features.astype(dtype).astype(jnp.float32)
    axes = tuple(range(1, real.ndim))
    count = jnp.maximum(real.sum(axis=axes), 1)
    means = (features * real[..., None]).sum(axis=axes) / count[:, None]
    kernel = kernel.astype(dtype).astype(jnp.float32)
    return jnp.matmul(means.mean(axis=0), kernel, precision="highest")


def sinkhorn_offsets(chunk_logits, chunks, weights, teacher_temp, num_iterations=3):
    """Offsets u [I,K] with which `teacher_log_probs` gives the Sinkhorn-Knopp targets.

    chunk_logits(chunk) -> [W,..,K]; chunks: a tree of [n,W,..]; weights [n,W,..]: 1 for
    real rows, 0 for padding, which takes no part.

    Sinkhorn-Knopp scales columns, then rows, of exp(z/tau), `num_iterations` times. In
    the log domain (the reference exponentiates z/tau, which overflows float32 beyond
    88) iteration i subtracts u_i [K], the logsumexp over rows, and then from each row
    its own logsumexp over K, which is what log_softmax does. So the u are all there is
    to keep, and an iteration is one pass over the chunks.
    Source: DINOv2 `sinkhorn_knopp_teacher` (the scale factors it applies in between
    cancel, its last division is by column).
    """
    first = jax.tree.map(lambda x: x[0], chunks)
    shape = jax.eval_shape(chunk_logits, first).shape
    nothing = jnp.full((shape[0], shape[-1]), -jnp.inf)
    offsets = []
    for _ in range(num_iterations):

        def body(partial, chunk, offsets=tuple(offsets)):
            rows, real = chunk
            z = teacher_log_probs(chunk_logits(rows), offsets, teacher_temp)
            z = jnp.where(real[..., None] > 0, z, -jnp.inf)
            z = jax.nn.logsumexp(z, axis=tuple(range(1, z.ndim - 1)))
            return jnp.logaddexp(partial, z), None

        partial, _ = jax.lax.scan(body, nothing, (chunks, weights))  # [W,K]
        offsets.append(jax.nn.logsumexp(partial, axis=0))
    return jnp.stack(offsets)


def cross_entropy(targets, student_logits, student_temp: float = 0.1):
    """-sum_k P_k log softmax(S/tau_s)_k over the last axis: [..,K] -> [..]."""
    z = student_logits.astype(jnp.float32) / student_temp
    return (
        jax.nn.logsumexp(z, axis=-1) * targets.sum(axis=-1)
        - _dot(targets, z)
    )  # fmt: skip


def dino_loss(targets, global_logits, local_logits, student_temp: float = 0.1):
    """DINO's cross-view loss, averaged over its G(G-1) + GL terms.

    targets: [W,G,b,K] in the order of the crops (not swapped); global_logits:
    [W,G,b,K]; local_logits: [W,L,b,K] or None. Returns (local, global) scalars.
    A student's crop is never compared with the teacher's view of the same crop.
    Source: DINOv2 `ssl_meta_arch.py`; the denominator counts max(GL,1) local terms.
    """
    num_global = global_logits.shape[1]
    num_local = 0 if local_logits is None else local_logits.shape[1]
    terms = num_global * (num_global - 1) + max(num_global * num_local, 1)
    # sum_g CE(P_g, S) = CE(sum_g P_g, S): one pass over the student's log-softmax.
    all_views = targets.sum(axis=1, keepdims=True)
    other_views = all_views - targets
    global_loss = cross_entropy(other_views, global_logits, student_temp)
    global_loss = global_loss.mean(axis=(0, 2)).sum() / terms
    if num_local == 0:
        return jnp.float32(0.0), global_loss
    local_loss = cross_entropy(all_views, local_logits, student_temp)
    return local_loss.mean(axis=(0, 2)).sum() / terms, global_loss


def ibot_loss(targets, student_logits, mask_weights, num_rows: int, **temp):
    """Masked-patch loss: [W,M,K] twice, mask_weights [W,M] -> scalar.

    (1/rows) sum_j w_j CE_j in each group, w_j = 1/(masked patches of that crop), then
    the mean over groups. `num_rows` counts all crops of a group, masked or not.
    Source: DINOv2 `iBOTPatchLoss.forward_masked`.
    """
    loss = cross_entropy(targets, student_logits, **temp)
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
    # Picked by a product: the gradient of x[neighbour] would add the rows of a shared
    # neighbour in an order that changes from run to run on a GPU.
    picked = jax.nn.one_hot(neighbour, x.shape[0], dtype=x.dtype)
    neighbours = jnp.matmul(picked, x, precision="highest")
    # torch's PairwiseDistance adds 1e-8 to each component of the difference.
    distance = jnp.linalg.norm(x - neighbours + 1e-8, axis=-1)
    return -jnp.log(distance + 1e-8).mean()


def gram_loss(student, teacher):
    """Distance of two Gram matrices of patch tokens: [..,N,D] twice -> scalar.

    Mean over crops of ||X X^T - Y Y^T||_F^2 / N^2, the rows of X and Y L2-normalised.
    Source: Simeoni et al. 2025 (DINOv3), section 4, and its `GramLoss`.
    """

    def gram(x):
        x = x.astype(jnp.float32)
        x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        return jnp.einsum("...id,...jd->...ij", x, x, precision="highest")

    return jnp.square(gram(student) - gram(teacher)).mean()


def entropy(probs):
    """Shannon entropy in nats over the last axis: [..,K] -> [..]."""
    return -jnp.sum(jax.scipy.special.xlogy(probs, probs), axis=-1)


def entropy_of_log(log_probs):
    """`entropy` of exp(log_probs): [..,K] -> [..]. No logarithm is taken."""
    return -_dot(jnp.exp(log_probs), log_probs)


def _dot(x, y):
    """Inner products over the last axis: [..,K] twice -> [..].

    Not (x * y).sum(-1): XLA's CPU library takes 8 times as long for a sum of products
    over arrays with leading axes of length 1.
    """
    return jnp.vecdot(x, y, precision="highest")
