"""gpu.py on the CPU, in shapes of the smoke config, whose program other tests share."""

import gzip
import json

import jax
import pytest
from jax.profiler import ProfileData

from experiments.benchmarks import gpu, gpu_cell, gpu_checks
from experiments.benchmarks.gpu_profile import kernel_table
from experiments.benchmarks.gpu_worker import kept
from tests.golden_step import GOLDEN, MODULES

CELL = "smoke batch=8 groups=8 profile pipeline repeat"
WORKERS = {"gpu_cell": gpu_cell.measure, "gpu_checks": gpu_checks.check}


@pytest.fixture
def started(monkeypatch):
    """What was started; workers run in this process, whose compiler is warm."""
    specs = []

    def process(module, spec, environment, seconds):
        specs.append(spec)
        about = {"device": "cpu", "jax": jax.__version__, "date": "today"}
        return about | kept(WORKERS[module], spec)

    monkeypatch.setattr(gpu, "process", process)
    return specs


def test_rows_are_kept_and_what_is_there_is_not_run_again(tmp_path, started):
    path = tmp_path / "gpu.json"
    cells = f" {CELL};smoke model.width=3; ;{CELL.replace(' ', '  ')}"
    arguments = [f"--json={path}", f"--cells={cells}", "--gpus=1", "--tiny"]
    arguments += ["--parts", "attention", "steps", "--cache="]
    gpu.main(arguments)
    assert [spec.get("cell") for spec in started] == [
        None,
        CELL,
        "smoke model.width=3",
    ]
    rows = json.loads(path.read_text())["rows"]
    assert list(rows) == ["attention", f"step {CELL}", "step smoke model.width=3"]

    step = rows[f"step {CELL}"]
    assert 0 < step["ms_min"] <= step["ms"] <= step["ms_max"]
    assert step["images_per_second"] == pytest.approx(8e3 / step["ms"])
    assert step["finite"] and step["losses"]["total"] > 0
    assert step["mfu"] is None  # of a CPU, whose peak nobody knows
    assert step["predicted_gb"]["total"] > 0
    assert 0 <= step["fed"]["data_wait"] < 1
    assert step["repeat"]["equal"] and len(step["repeat"]["digests"]["whole"]) == 64
    kernels = step["profile"]["kernels"]
    assert any("attn/qkv/dot_general" in row["op_name"] for row in kernels)
    assert all(row["ms"] > 0 for row in kernels)
    [hlo] = tmp_path.glob("*.hlo.gz")
    assert gzip.decompress(hlo.read_bytes()).startswith(b"HloModule")

    found = rows["attention"]["rows"]
    assert max(found["xla, 41 tokens"].values()) < 5e-3  # of bfloat16
    assert "error" in found["cudnn, 41 tokens"]
    assert "width" in rows["step smoke model.width=3"]["error"]

    page = path.with_suffix(".md").read_text()
    assert f"| smoke | {CELL.removeprefix('smoke ')} | {step['ms']:.1f} (" in page
    assert "waiting for data" in page and "the same bits" in page
    assert "| smoke | model.width=3 | KeyError" in page

    started.clear()
    gpu.main(arguments)  # what failed is tried again, the rest is there
    assert [spec.get("cell") for spec in started] == ["smoke model.width=3"]
    started.clear()
    gpu.main([*arguments, "--minutes=0", f"--cells={CELL}; smoke batch=16"])
    assert not started
    rows = json.loads(path.read_text())["rows"]
    assert rows["step smoke batch=16"] == {"not_run": "no time left"}
    assert rows[f"step {CELL}"] == step


def test_a_process_that_fails_or_hangs_is_a_row():
    failed = gpu.process("gpu_cell", {"cell": "vitc"}, {}, 60)
    assert failed["error"].startswith("ValueError: model 'vitc' of a cell is none of")
    assert failed["jax"] == jax.__version__
    stopped = gpu.process("gpu_cell", {"cell": "smoke"}, {}, 0.1)
    assert stopped["error"] == "stopped after 0 s"
    lost = gpu.process("no_module", {}, {}, 60)
    assert "No module named experiments.benchmarks.no_module" in lost["error"]


def test_the_golden_step_in_float32_is_the_reference_s():
    row = gpu_checks.golden_row(dict(GOLDEN), MODULES, "highest")
    assert row["gradient, backbone"] < 1e-5 and row["gradient, dino_head"] < 1e-5
    for i in range(2):
        assert all(abs(x) < 1e-5 for x in row[f"losses of step {i}"].values())


# As a GPU's profiler writes it: one kernel named by the instruction, one whose
# instruction is a reference, one of a library; a host thread; a line that sums up.
TRACE = """
planes {
  name: "/device:GPU:0"
  lines { name: "Stream #13(Compute)"
    events { metadata_id: 1 duration_ps: 3000000 stats { metadata_id: 1 str_value: "loop_fusion.3" } }
    events { metadata_id: 1 duration_ps: 5000000 stats { metadata_id: 1 str_value: "loop_fusion.3" } }
    events { metadata_id: 2 duration_ps: 4000000 stats { metadata_id: 1 ref_value: 2 } }
    events { metadata_id: 3 duration_ps: 1000000 } }
  lines { name: "XLA Modules" events { metadata_id: 4 duration_ps: 90000000 } }
  event_metadata { key: 1 value { id: 1 name: "loop_fusion_3" } }
  event_metadata { key: 2 value { id: 2 name: "nvjet_hsh" } }
  event_metadata { key: 3 value { id: 3 name: "input_reduce_fusion" } }
  event_metadata { key: 4 value { id: 4 name: "jit_step" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
  stat_metadata { key: 2 value { id: 2 name: "custom-call.7" } }
}
planes {
  name: "/host:CPU"
  lines { name: "python" events { metadata_id: 1 duration_ps: 70000000 } }
  event_metadata { key: 1 value { id: 1 name: "PjitFunction" } }
}
"""  # noqa: E501
PROGRAM = """
%f { ROOT %a = f32[] add(%x, %y), metadata={op_name="inside"} }
ENTRY %main {
  %loop_fusion.3 = f32[8]{0} fusion(%p), kind=kLoop, metadata={op_name="jit(f)/mul"}
  %custom-call.7 = (bf16[8,8]{1,0}, s8[4]{0}) custom-call(%p), metadata={op_name="dot"}
  ROOT %input-reduce-fusion = f32[] fusion(%p), metadata={op_name="jit(f)/sum"}
}
"""


def test_kernels_of_a_gpu_s_trace(tmp_path):
    serialised = ProfileData.text_proto_to_serialized_xspace(TRACE)
    (tmp_path / "host.xplane.pb").write_bytes(serialised)
    table = kernel_table(tmp_path, PROGRAM, steps=2)
    rows = [(k["kernel"], k["op_name"], k["count"], k["ms"]) for k in table["kernels"]]
    assert rows == [
        ("loop_fusion_3", "jit(f)/mul", 1.0, 0.004),
        ("nvjet_hsh", "dot", 0.5, 0.002),
        ("input_reduce_fusion", "jit(f)/sum", 0.5, 0.0005),
    ]
    assert table["ms"] == pytest.approx(0.0065)
    assert table["kernels_per_step"] == 2.0
    assert [row["op_name"] for row in table["operations"]] == [
        "jit(f)/mul",
        "dot",
        "jit(f)/sum",
    ]
