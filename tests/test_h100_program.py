"""The program that XLA compiles for an H100 that is not here: skipped without the extra `preflight-cuda`."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxpeft.training import gpu

ROOT = Path(__file__).parents[1]
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jaxpeft[preflight-cuda]"
)


@needs_compiler
@pytest.mark.slow
def test_lora_of_blip_base_has_fused_attention_and_few_kernels(tmp_path):
    """LoRA on the text at batch 64, as the defaults for a GPU say."""
    command = [sys.executable, "benchmarks/h100_program.py", "--rows", "lora", "--out", str(tmp_path / "found.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert found["fused attention"] >= 2
    assert found["scores in float32"] == 0
    assert found["scatters over words"] == 0
    assert found["kernels"] <= 1300


PROGRAM = """
HloModule jit_f

%fused_slice (param_0: bf16[12,768,64], param_1: s32[]) -> bf16[1,768,64] {
  %param_0 = bf16[12,768,64]{2,1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  ROOT %slice = bf16[1,768,64]{2,1,0} dynamic-slice(%param_0, %param_1), dynamic_slice_sizes={1,768,64}
}

%fused_update (param_0.1: f32[12,100], param_1.1: f32[1,100], param_2: s32[]) -> f32[12,100] {
  %param_0.1 = f32[12,100]{1,0} parameter(0)
  %param_1.1 = f32[1,100]{1,0} parameter(1)
  %param_2 = s32[] parameter(2)
  ROOT %update = f32[12,100]{1,0} dynamic-update-slice(%param_0.1, %param_1.1, %param_2)
}

%body (arg: (s32[], bf16[12,768,64], f32[12,100], f32[1,100])) -> (s32[], bf16[12,768,64], f32[12,100], f32[1,100]) {
  %arg = (s32[], bf16[12,768,64]{2,1,0}, f32[12,100]{1,0}, f32[1,100]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %w = bf16[12,768,64]{2,1,0} get-tuple-element(%arg), index=1
  %old = f32[12,100]{1,0} get-tuple-element(%arg), index=2
  %new = f32[1,100]{1,0} get-tuple-element(%arg), index=3
  %slices = bf16[1,768,64]{2,1,0} fusion(%w, %i), kind=kLoop, calls=%fused_slice
  %updates = f32[12,100]{1,0} fusion(%old, %new, %i), kind=kLoop, calls=%fused_update
  ROOT %result = (s32[], bf16[12,768,64]{2,1,0}, f32[12,100]{1,0}, f32[1,100]{1,0}) tuple(%i, %w, %updates, %new)
}

ENTRY %main (a: bf16[32,768], w: bf16[768,64], s: (s32[], bf16[12,768,64], f32[12,100], f32[1,100])) -> bf16[32,64] {
  %a = bf16[32,768]{1,0} parameter(0)
  %w.1 = bf16[768,64]{1,0} parameter(1)
  %s = (s32[], bf16[12,768,64]{2,1,0}, f32[12,100]{1,0}, f32[1,100]{1,0}) parameter(2)
  %loop = (s32[], bf16[12,768,64]{2,1,0}, f32[12,100]{1,0}, /*index=3*/f32[1,100]{1,0}) while(%s), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"12"}}
  %q = bf16[4,584,12,64]{3,2,1,0} bitcast(%a)
  %flash = (bf16[4,584,12,64]{3,2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %y = (bf16[32,64]{1,0}, s8[4096]{0}) custom-call(%a, %w.1), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
}
"""  # noqa: E501


def test_kernels_are_counted_with_their_bytes_and_products():
    slices, updates, flash, product = gpu.kernels(PROGRAM)
    assert (slices.times, updates.times, flash.times, product.times) == (12, 12, 1, 1)
    assert slices.n_bytes == 2 * 2 * 768 * 64 + 4  # the slice read and written, and its index
    assert updates.n_bytes == 3 * 4 * 100 + 4  # the part that is read twice and written
    assert flash.flops == 4 * 4 * 12 * 584 * 584 * 64
    assert product.flops == 2 * 32 * 768 * 64
    assert product.n_bytes == 2 * (32 * 768 + 768 * 64 + 32 * 64)  # without the scratch memory


def test_the_time_is_the_longest_of_launch_memory_and_products():
    def kernel(n_bytes, flops, half=True, target=""):
        return gpu.Kernel("fusion", target, "", 1, n_bytes, flops, half)

    peak, bandwidth = 1e15, 1e12
    assert kernel(0, 0).seconds(peak, bandwidth) == gpu.LAUNCH
    assert kernel(0.9e12, 0).seconds(peak, bandwidth) == 1
    assert kernel(0, 0.66e15).seconds(peak, bandwidth) == 1
    assert kernel(0, 0.33e15, half=False).seconds(peak, bandwidth) == 1
    assert kernel(0, 0.25e15, target="__cudnn$fmhaSoftmax").seconds(peak, bandwidth) == 1
    assert gpu.seconds([kernel(0.9e12, 0), kernel(0, 0)], peak, bandwidth) == 1 + gpu.LAUNCH


def test_gpus_that_cannot_be_had_are_named():
    for bad in ("h1000", "h100:x", "h100:0"):
        with pytest.raises(ValueError, match="GPUs are named a100, h100, h200, b200"):
            gpu.devices(bad)
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        with pytest.raises(ValueError, match="preflight-cuda"):
            gpu.devices("h100:8")
