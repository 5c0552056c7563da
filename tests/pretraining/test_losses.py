import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from ultradino_jax.pretraining import chunks, losses

CLOSE = {"rtol": 1e-5, "atol": 1e-7}


def test_centering_equals_reference(golden):
    g = golden("dino_loss")
    steps, _, k = g["teacher_logits"].shape
    center, temp = jnp.zeros(k), g["teacher_temp"]
    for step in range(steps):
        np.testing.assert_allclose(center, g["center_seen_by_step"][step, 0], **CLOSE)
        logits = jnp.asarray(g["teacher_logits"][step])
        probs = jnp.exp(losses.teacher_log_probs(logits, center[None] / temp, temp))
        np.testing.assert_allclose(probs, g["probs_centered"][step], **CLOSE)
        center = losses.update_center(center, logits.mean(0), g["center_momentum"])
    np.testing.assert_allclose(center, g["center_final"][0], **CLOSE)


def sinkhorn_probs(logits, weights, temp, count, **options):
    """Targets of logits [M,K] taken in so many chunks."""
    z, w = (chunks.in_chunks(x[None], len(x) // count) for x in (logits, weights))
    offsets = losses.sinkhorn_offsets(lambda x: x, z, w, temp, **options)
    return jnp.exp(losses.teacher_log_probs(logits, offsets, temp))


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("whole", [True, False])
def test_sinkhorn_equals_reference(golden, iterations, whole):
    g = golden("dino_loss")
    logits = jnp.asarray(g["teacher_logits"][0])
    real = jnp.ones(len(logits))
    count = 1 if whole else len(logits)
    ours = sinkhorn_probs(
        logits, real, g["teacher_temp"], count, num_iterations=iterations
    )
    # Some logits overflow exp() in float32 without the log domain.
    assert (g["teacher_logits"] / g["teacher_temp"]).max() > 88
    np.testing.assert_allclose(ours, g[f"sinkhorn{iterations}"], rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(ours.sum(axis=1), 1, rtol=1e-5)


def test_sinkhorn_ignores_padding(golden):
    g = golden("ibot_loss")
    n = int(g["n_masked"])
    logits = jnp.asarray(g["teacher_logits"])
    weights = jnp.arange(len(logits)) < n
    ours = sinkhorn_probs(logits, weights, g["teacher_temp"], count=1)
    np.testing.assert_allclose(ours[:n], g["sinkhorn3"], rtol=1e-5, atol=1e-9)


def test_dino_loss_equals_reference(golden):
    g = golden("dino_loss")
    # The reference's teacher rows are swapped by its caller: undo that.
    rows, k = g["student_global_logits"].shape
    by_view = (1, -1, rows // 2, k)  # two global crops
    probs = g["probs_centered"][0].reshape(by_view)[:, ::-1]
    local, across = losses.dino_loss(
        jnp.asarray(probs),
        jnp.asarray(g["student_global_logits"].reshape(by_view)),
        jnp.asarray(g["student_local_logits"].reshape(by_view)),
        g["student_temp"],
    )
    np.testing.assert_allclose(local, g["dino_local_crops_loss"], rtol=1e-5)
    np.testing.assert_allclose(across, g["dino_global_crops_loss"], rtol=1e-5)


def test_ibot_loss_and_center_equal_reference(golden):
    g = golden("ibot_loss")
    n, m = int(g["n_masked"]), int(g["upperbound"])
    temp = g["teacher_temp"]
    teacher = jnp.asarray(g["teacher_logits"])
    weights = np.zeros((1, m), np.float32)
    weights[0, :n] = g["masks_weight"]
    nothing = jnp.zeros(teacher.shape[1])
    probs = jnp.exp(losses.teacher_log_probs(teacher, nothing[None], temp))
    np.testing.assert_allclose(probs[:n], g["probs_step1"], **CLOSE)
    center = losses.update_center(nothing, teacher[:n].mean(0))
    np.testing.assert_allclose(center, g["center_after"][0, 0], **CLOSE)
    second = jnp.exp(losses.teacher_log_probs(teacher, center[None] / temp, temp))
    np.testing.assert_allclose(second[:n], g["probs_step2"], **CLOSE)
    rows = len(g["masks"])
    student = jnp.asarray(g["student_logits"])[None]
    loss = losses.ibot_loss(
        probs[None], student, jnp.asarray(weights), rows, student_temp=g["student_temp"]
    )
    np.testing.assert_allclose(loss, g["ibot_loss_as_added"], rtol=1e-5)


def test_koleo_and_its_gradient_equal_reference(golden):
    g = golden("koleo")
    loss, grad = jax.value_and_grad(losses.koleo_loss)(jnp.asarray(g["x"]))
    np.testing.assert_allclose(loss, g["loss"], rtol=1e-5)
    np.testing.assert_allclose(grad, g["grad"], rtol=1e-4, atol=1e-6)
    views = jnp.asarray(g["x_two_views"])
    views = views.reshape(2, len(views) // 2, -1)
    total = 0.1 * jax.vmap(losses.koleo_loss)(views).sum()
    np.testing.assert_allclose(total, g["weighted_sum_two_views"], rtol=1e-5)
    assert losses.koleo_loss(views[0, :1]) == 0


def test_gram_loss_equals_its_formula():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 3, 5, 4)).astype(np.float32)
    total = 0.0
    for a, b in zip(x.astype(float), y.astype(float), strict=True):
        for i in range(5):
            for j in range(5):
                cosines = (
                    z[i] @ z[j] / np.linalg.norm(z[i]) / np.linalg.norm(z[j])
                    for z in (a, b)
                )
                total += np.subtract(*cosines) ** 2
    np.testing.assert_allclose(losses.gram_loss(x, y), total / (3 * 25), rtol=1e-5)
    assert losses.gram_loss(x, 2 * x) < 1e-12


def test_cross_entropy_and_entropy_equal_scipy():
    rng = np.random.default_rng(0)
    s = rng.normal(size=(5, 7)).astype(np.float32)
    t = softmax(3 * rng.normal(size=(5, 7)), axis=-1)
    expected = -(t * log_softmax(s / 0.1, axis=-1)).sum(-1)
    np.testing.assert_allclose(losses.cross_entropy(t, s), expected, rtol=1e-5)
    expected = -(t * np.log(t)).sum(-1)
    np.testing.assert_allclose(losses.entropy(jnp.asarray(t)), expected, rtol=1e-5)
    np.testing.assert_allclose(losses.entropy_of_log(jnp.log(t)), expected, rtol=1e-5)
    assert losses.entropy(jnp.asarray([0.0, 1.0])) == 0
