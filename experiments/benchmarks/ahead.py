"""The real train step compiled ahead of time, for devices that need not be there.

Nothing is allocated: state and batch are shapes with shardings. For CUDA no driver is
needed, only the plugin's wheels (402 MB) beside the jax they belong to:

    pip install --no-deps jax-cuda13-plugin==0.10.2 jax-cuda13-pjrt==0.10.2
"""

import dataclasses
import os

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies

from ultradino_jax.data.crops import NUM_GLOBAL
from ultradino_jax.data.masking import mask_buffer_length
from ultradino_jax.pretraining.step import init_state
from ultradino_jax.run.plan import Plan, make_plan
from ultradino_jax.run.program import compiled_step
from ultradino_jax.sharding import (
    abstract_with,
    batch_sharding,
    make_mesh,
    state_shardings,
)

# What XLA asks a driver for; the figures of an H100 SXM.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 14 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

CUDNN = 91400  # 9.14.0, as H100 says


def prepare_environment(platform: str, num_cpu: int = 1) -> None:
    """Set what has to be set before jax starts its backend.

    platform: 'cpu' (num_cpu devices are made up) or 'cuda'.
    """
    jax.config.update("jax_platforms", "cpu")
    if platform == "cpu":
        jax.config.update("jax_num_cpu_devices", num_cpu)
    else:  # Triton's autotuner wants the card itself
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_triton_gemm=false"
        # ... and fused attention the version of a cuDNN that need not be here.
        fused_attention_stablehlo.check_cudnn_version = lambda: CUDNN


def devices_of(platform: str, count: int) -> list:
    """`count` CPU devices or absent H100s.

    Raises RuntimeError when the CUDA plugin is not installed.
    """
    if platform == "cpu":
        return jax.devices()[:count]
    name = f"1x1x{count}"
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=name, topology=name, target_config=H100
    )
    return list(topology.devices)


def abstract_batch(plan: Plan) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch whose crops the host renders; see `data.pipeline`."""
    w, c, feed = plan.groups, plan.channels, plan.feed
    b = feed.batch_size // w
    size, local = plan.crops.global_size, plan.crops.local_size
    patches = (size // feed.patch_size) ** 2
    length = mask_buffer_length(
        NUM_GLOBAL * b, patches, feed.mask_probability, feed.mask_ratio
    )
    shapes = {
        "global_crops": ((NUM_GLOBAL, b, size, size, c), jnp.uint8),
        "local_crops": ((plan.crops.num_local, b, local, local, c), jnp.uint8),
        "masks": ((NUM_GLOBAL, b, patches), jnp.bool_),
        "mask_indices": ((length,), jnp.int32),
        "mask_weights": ((length,), jnp.float32),
    }
    return {k: jax.ShapeDtypeStruct((w, *s), d) for k, (s, d) in shapes.items()}


def lower_step(config, devices):
    """(lowered train step, plan, abstract state) for the config on these devices.

    The mesh is config.mesh's; groups are raised to the number of devices. What 'auto'
    attention takes on a GPU is taken unseen: Triton's kernel.
    """
    mesh = make_mesh(config.mesh.fsdp, devices)
    attention = config.model.attention
    config.model.attention = "xla"  # the plan looks at the devices that are here
    plan = make_plan(config, mesh.size)
    if attention == "auto":
        attention = "xla" if devices[0].platform == "cpu" else "triton"
    backbone = plan.modules.backbone.clone(attention=attention)
    modules = dataclasses.replace(plan.modules, backbone=backbone)
    plan = dataclasses.replace(plan, modules=modules)

    def init():
        key = jax.random.key(0)
        return init_state(plan.modules, plan.optimizer, key, config.data.channels)

    state = jax.eval_shape(init)
    state = abstract_with(state_shardings(state, mesh), state)
    batch = abstract_batch(plan)
    batch = abstract_with(jax.tree.map(lambda x: batch_sharding(mesh), batch), batch)
    return compiled_step(plan, mesh, state).lower(state, batch), plan, state
