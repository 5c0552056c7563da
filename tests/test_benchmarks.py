"""The arithmetic that the benchmarks' figures rest on."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from tests.hlo import collectives
from ultradino_jax.sharding import make_mesh

# As XLA prints it: a loop of 12, an asynchronous gather, groups in both notations.
PROGRAM = """HloModule step

%body (p: (s32[], f32[10])) -> (s32[], f32[10]) {
  %p = (s32[], f32[10]{0}) parameter(0)
  %g = f32[10]{0} get-tuple-element(%p), index=1
  %r = f32[10]{0} all-reduce(%g), replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %t = (s32[], f32[10]{0}) tuple(%i, %r)
}

%cond (p: (s32[], f32[10])) -> pred[] {
  ROOT %c = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[10], y: bf16[4,2]) -> f32[10] {
  %x = f32[10]{0} parameter(0)
  %w = (s32[], f32[10]{0}) while(%s), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"12"}}
  %v = (s32[], f32[10]{0}) while(%s), condition=%cond, body=%body
  %a = (bf16[4,2]{1,0}, bf16[16,2]{1,0}) all-gather-start(%y), \
replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, metadata={op_name="jit(f)/take"}
  %b = bf16[16,2]{1,0} all-gather-done(%a)
  %k = (f32[3]{0}, f32[2]{0}) all-reduce(%x, %y), replica_groups={}, to_apply=%add
  %o = f32[10]{0} all-reduce(%x), replica_groups=[8,1]<=[8], to_apply=%add
  %s2 = f32[5]{0} reduce-scatter(%x), replica_groups={{0,1},{2,3},{4,5},{6,7}}
}
"""


def test_collectives_of_a_written_program():
    found = collectives(PROGRAM, 8)
    assert [(c.kind, c.size, c.devices, c.times, c.in_loop) for c in found] == [
        ("all-reduce", 40, 8, 12, True),
        ("all-reduce", 40, 8, None, True),
        ("all-gather", 64, 4, 1, False),
        ("all-reduce", 20, 8, 1, False),
        ("reduce-scatter", 20, 2, 1, False),
    ]
    assert found[2].source == "jit(f)/take"
    expected = [12 * 40 * 2 * 7 / 8, 40 * 2 * 7 / 8, 64 * 3 / 4, 20 * 2 * 7 / 8, 20]
    assert [c.wire_bytes for c in found] == pytest.approx(expected)


def test_collectives_of_a_compiled_scan():
    """Five matrix products over a contracted, sharded axis: five sums of [6,3]."""
    n = jax.device_count()
    if n < 2:
        pytest.skip("needs devices to talk to each other")
    mesh = make_mesh()

    def program(x, w):
        product = jax.lax.scan(lambda y, v: (jnp.tanh(x @ v) + y, None), x[:, :3], w)
        return product[0]

    def shape(dims, *spec):
        sharding = jax.sharding.NamedSharding(mesh, P(*spec))
        return jax.ShapeDtypeStruct(dims, jnp.float32, sharding=sharding)

    axes = ("data", "fsdp")
    arguments = shape((6, 8 * n), None, axes), shape((5, 8 * n, 3), None, axes)
    text = jax.jit(program, out_shardings=shape((6, 3)).sharding)
    text = text.lower(*arguments).compile().as_text()
    sums = [c for c in collectives(text, n) if c.size == 6 * 3 * 4 and c.in_loop]
    assert [(c.kind, c.times, c.devices) for c in sums] == [("all-reduce", 5, n)]


def test_torch_step_equals_the_reference(golden, sub):
    """Two steps of what our step is timed against: the same losses and gradients."""
    torch = pytest.importorskip("torch")
    from tests.torch_reference import Reference

    g = golden("train_step")
    state = {k: torch.tensor(v) for k, v in sub(g, "init/").items()}
    peer = Reference(state, heads=2, teacher_scale=0.9)
    for i in range(2):
        crops = {
            f"{name}_crops": torch.tensor(
                g[f"batch/collated_{name}_crops"][:: -1 if i else 1].copy()
            )
            for name in ("global", "local")
        }
        batch = crops | {
            "masks": torch.tensor(g["batch/collated_masks"]),
            "mask_indices": torch.tensor(g["batch/mask_indices_list"]),
            "mask_weights": torch.tensor(g["batch/masks_weight"]),
        }
        hyper = {k: float(v) for k, v in sub(g, f"hyper/step{i}/").items()}
        terms = peer.step(batch, hyper)
        loss = sub(g, f"centering/step{i}/loss/")
        assert terms == pytest.approx(
            {
                "dino_local": float(loss["dino_local_crops_loss"]),
                "dino_global": float(loss["dino_global_crops_loss"]),
                "koleo": 2 * float(loss["koleo_loss"]),  # displayed: half
                "ibot": 2 * float(loss["ibot_loss"]),
            },
            rel=1e-5,
        )
        norms = sub(g, f"centering/step{i}/grad_norm_before_clip/")
        expected = {k: float(v) for k, v in norms.items()}
        assert peer.norms == pytest.approx(expected, rel=1e-5)
