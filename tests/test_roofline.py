"""Bytes and operations of compiled programs against closed formulas."""

import jax
import jax.numpy as jnp
import pytest

from tests.roofline import BANDWIDTH, LAUNCH, PEAK, WIRE, WIRE_LATENCY, kernels


def compiled(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    return jax.jit(function).lower(*arguments).compile()


@pytest.mark.parametrize(
    ("function", "shapes", "elements", "operations", "movement"),
    [
        (
            lambda a, b: a @ b,
            [(64, 128), (128, 32)],
            64 * 128 + 128 * 32 + 64 * 32,
            {"tf32": 2 * 64 * 128 * 32},
            "",
        ),
        (
            lambda a, b: jnp.tanh(a * b) + 1,
            [(100, 30), (100, 30)],
            3 * 100 * 30,
            {"f32": 3 * 100 * 30},
            "",
        ),
        (lambda a: a.sum(0), [(30, 20)], 31 * 20, {"f32": 30 * 20}, ""),
        (lambda a: a.T.copy(), [(50, 20)], 2 * 50 * 20, {}, "transpose"),
        (lambda a: jnp.pad(a, ((0, 3), (0, 0))), [(50, 20)], 103 * 20, {}, "pad"),
    ],
    ids=["product", "elementwise", "reduction", "transpose", "pad"],
)
def test_one_kernel(function, shapes, elements, operations, movement):
    program = compiled(function, *shapes)
    (kernel,) = kernels(program.as_text())
    # Constants, such as what is padded with, are a few bytes more.
    assert kernel.bytes == pytest.approx(4 * elements, abs=8)
    assert kernel.operations == operations
    assert kernel.movement == movement
    assert kernel.bytes == program.cost_analysis()["bytes accessed"]


def test_a_scan_of_known_length():
    """Seven slices of [7,64,48] are read and as many results stacked, not 7 x 7."""

    def program(carry, xs):
        def body(carry, x):
            return carry @ x.T @ x, jnp.tanh(x)

        return jax.lax.scan(body, carry, xs)

    found = kernels(compiled(program, (32, 48), (7, 64, 48)).as_text())
    assert {k.times for k in found} == {1, 7}
    assert all(k.known for k in found)
    products = sum(k.times * k.operations.get("tf32", 0) for k in found)
    assert products == 7 * 2 * (2 * 32 * 64 * 48)
    tanh = sum(k.times * k.operations.get("f32", 0) for k in found if k.bytes > 64)
    assert tanh == 7 * 64 * 48
    # Each slice: read and written three times at most (slice, its transpose, tanh).
    in_loop = sum(k.times * k.bytes for k in found if k.times == 7)
    piece = 4 * 64 * 48
    assert 7 * 2 * piece < in_loop < 7 * 10 * piece
    outside = [k for k in found if k.times == 1 and k.bytes > 7 * piece]
    assert [k.movement for k in outside] == ["fill"]


def test_gathered_rows_are_read_alone():
    program = compiled(lambda a: a[jnp.array([3, 7])] * 2, (5000, 200))
    assert sum(k.bytes for k in kernels(program.as_text())) == pytest.approx(
        2 * 2 * 200 * 4, abs=64
    )


# What XLA's GPU compiler prints, without what is not read.
GPU = r"""HloModule step, is_scheduled=true

%fused_pad (p.0: bf16[1664,1151], p.1: bf16[4,1664,1152], p.2: s32[]) -> bf16[4,1664,1152] {
  %p.0 = bf16[1664,1151]{1,0} parameter(0)
  %p.1 = bf16[4,1664,1152]{2,1,0} parameter(1)
  %p.2 = s32[] parameter(2)
  %zero = bf16[] constant(0)
  %pad = bf16[1664,1152]{1,0} pad(%p.0, %zero), padding=0_0x0_1
  %b = bf16[1,1664,1152]{2,1,0} bitcast(%pad), metadata={op_name="jit(f)/stack"}
  ROOT %u = bf16[4,1664,1152]{2,1,0} dynamic-update-slice(%p.1, %b, %p.2, %p.2, %p.2)
}

%fused_part (a: f32[1000,8], b: f32[1000,8]) -> f32[10,8] {
  %a = f32[1000,8]{1,0} parameter(0)
  %b = f32[1000,8]{1,0} parameter(1)
  %sum = f32[1000,8]{1,0} add(%a, %b)
  ROOT %part = f32[10,8]{1,0} slice(%sum), slice={[5:15], [0:8]}
}

%body (s: (s32[], bf16[1664,384])) -> (s32[], bf16[1664,384]) {
  %s = (s32[], bf16[1664,384]{1,0}) parameter(0)
  %x = bf16[1664,384]{1,0} get-tuple-element(%s), index=1
  %lt = (bf16[1664,1152]{1,0}, s8[4194304]{0}) custom-call(%x, %w, %bias), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(f)/qkv/dot_general" scheduling_name="lt"}, backend_config={"operation_queue_id":"0","gemm_backend_config":{"alpha_real":1,"beta":0,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]},"precision_config":{"operand_precision":["DEFAULT","DEFAULT"],"algorithm":"ALG_UNSET"},"epilogue":"BIAS"}}
  %w = bf16[384,1152]{1,0} constant({...})
  %bias = bf16[1152]{0} constant({...})
  %batched = (f32[48,208,208]{2,1,0}, s8[4194304]{0}) custom-call(%q2, %k2), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["2"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]},"precision_config":{"operand_precision":["HIGHEST","HIGHEST"]}}}
  %q2 = f32[48,208,64]{2,1,0} get-tuple-element(%s), index=2, metadata={op_name="jit(f)/attn/logits"}
  %k2 = f32[48,208,64]{2,1,0} get-tuple-element(%s), index=3
}

%cond (s: (s32[], bf16[1664,384])) -> pred[] {
  ROOT %c = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (q: bf16[8,208,6,64], k: bf16[8,104,6,64]) -> bf16[8,208,6,64] {
  %q = bf16[8,208,6,64]{3,2,1,0} parameter(0)
  %k = bf16[8,104,6,64]{3,2,1,0} parameter(1)
  %n = s32[8]{0} parameter(2)
  %l = f32[8,6,208]{2,1,0} parameter(3)
  %r = bf16[1664,1151]{1,0} parameter(4)
  %t = bf16[4,1664,1152]{2,1,0} parameter(5)
  %i = s32[] parameter(6)
  %loop = (s32[], bf16[1664,384]{1,0}) while(%state), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"12"}}
  %fwd = (bf16[8,6,208,64]{3,1,2,0}, f32[8,6,208]{2,1,0}, u8[5]{0}) custom-call(%q, %k, %k, %n, %n), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config": {"algorithm": {"tuning_knobs": {"17": "1"}}, "fmha_scale": 0.125, "intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["8", "6", "208", "104"], "tuple_shapes": [], "layout": {"minor_to_major": ["3", "2", "1", "0"]}}, "bmm1_dot_dimension_numbers": {"lhs_contracting_dimensions": ["3"]}}}
  %bwd = (bf16[8,6,208,64]{3,1,2,0}, bf16[8,6,104,64]{3,1,2,0}, bf16[8,6,104,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k, %l, %q, /*index=5*/%q, %n, %n), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["8", "6", "208", "104"]}}}
  %tri = bf16[64,64]{1,0} custom-call(%q), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(f)/attention/pallas_call"}, backend_config={debug = false, ir = "ML\EFR(\")", name = "kernel", serialized_metadata = "{\22flops\22: \22123456\22}"}
  %conv = (f32[2,8,8,16]{3,2,1,0}, u8[64]{0}) custom-call(%image, %kernel), window={size=3x3 stride=2x2}, dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$convForward"
  %image = f32[2,17,17,8]{3,2,1,0} constant({...})
  %kernel = f32[3,3,8,16]{3,2,1,0} constant({...})
  %stack = bf16[4,1664,1152]{2,1,0} fusion(%r, %t, %i), kind=kLoop, calls=%fused_pad
  %long = f32[1000,8]{1,0} parameter(7)
  %part = f32[10,8]{1,0} fusion(%long, %long), kind=kLoop, calls=%fused_part
  %start = (f32[1000]{0}, f32[24]{0}) all-reduce-start(%g, %h), replica_groups=[1,2]<=[2], to_apply=%add
  %done = (f32[1000]{0}, f32[24]{0}) all-reduce-done(%start)
  %copied = (bf16[8,208,6,64]{3,2,1,0}, bf16[8,208,6,64]{3,2,1,0}, u32[]) copy-start(%q)
  %copy = bf16[8,208,6,64]{3,2,1,0} copy-done(%copied)
}
"""  # noqa: E501


def test_what_a_gpu_compiler_prints():
    found = {k.name: k for k in kernels(GPU, 2)}
    assert {name: k.times for name, k in found.items()} == dict.fromkeys(
        ["lt", "batched"], 12
    ) | dict.fromkeys(
        ["fwd", "bwd", "tri", "conv", "stack", "part", "start", "copied"], 1
    )
    q, k = 8 * 208 * 6 * 64, 8 * 104 * 6 * 64
    square = 8 * 6 * 208 * 104 * 64
    stack = 1664 * 1152 + 1664 * 1151
    work = {name: k.operations for name, k in found.items()}
    assert work == {
        "lt": {"bf16": 2 * 1664 * 384 * 1152},
        "batched": {"f32": 2 * 48 * 208 * 208 * 64},
        "fwd": {"cudnn": 2 * 2 * square},
        "bwd": {"cudnn": 5 * 2 * square},
        "tri": {"triton": 123456},
        "conv": {"tf32": 2 * (2 * 8 * 8 * 16) * (3 * 3 * 8)},
        "stack": {},
        "part": {"f32": 10 * 8},
        "start": {},
        "copied": {},
    }
    # Workspaces are left out: the last result of eight-bit type.
    assert {name: found[name].bytes for name in found if name != "start"} == {
        "lt": 2 * (1664 * 384 + 384 * 1152 + 1152 + 1664 * 1152),
        "batched": 4 * 48 * (2 * 208 * 64 + 208 * 208),
        "fwd": 2 * (q + 2 * k + q) + 2 * 4 * 8 + 4 * 8 * 6 * 208,
        "bwd": 2 * (3 * q + 2 * k + q + 2 * k) + 2 * 4 * 8 + 4 * 8 * 6 * 208,
        "tri": 2 * (q + 64 * 64),
        "conv": 4 * (2 * 17 * 17 * 8 + 3 * 3 * 8 * 16 + 2 * 8 * 8 * 16),
        "stack": 2 * stack + 4,
        "part": 4 * 3 * 10 * 8,
        "copied": 2 * 2 * q,
    }
    assert {name for name, k in found.items() if k.movement} == {"stack", "copied"}
    assert found["start"].seconds == 4 * 1024 / WIRE + WIRE_LATENCY
    moved = found["lt"].bytes / BANDWIDTH  # takes longer than its operations
    assert found["lt"].seconds == pytest.approx(12 * (moved + LAUNCH))
    worked = 2 * 48 * 208 * 208 * 64 / PEAK["f32"]  # takes longer than its bytes
    assert found["batched"].seconds == pytest.approx(12 * (worked + LAUNCH))
    assert found["batched"].source == "jit(f)/attn/logits"
    assert found["stack"].source == "jit(f)/stack"
