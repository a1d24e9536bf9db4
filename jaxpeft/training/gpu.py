"""NVIDIA GPUs that are not here: XLA compiles for them from a description; and the time of a compiled program, by a model.

The model: every kernel takes the longest of

    launch      LAUNCH, 3 microseconds
    memory      the bytes that it reads and writes, at BANDWIDTH of the chip's peak
    arithmetic  the FLOPs of its matrix product, at PRODUCTS of the bfloat16 peak, half of it in float32 (which is TF32
                there), or those of a fused attention, at ATTENTION of the peak

and kernels run one after the other. Elementwise arithmetic, communication, gaps between launches, and what the autotuner of a
real device would choose are not in it. The shares are assumptions and not fitted to a run of this program: copies reach 3.0
of 3.35 TB/s on an H100, and large products 0.8 of its peak.
"""

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any

LAUNCH = 3e-6  # s
BANDWIDTH, PRODUCTS, ATTENTION = 0.9, 0.66, 0.25  # of the chip's peaks


@dataclasses.dataclass(frozen=True)
class Description:
    """What XLA's GPU compiler asks a device for: public figures of the card, as the driver reports them."""

    name: str
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    units: int  # of float32 arithmetic in each
    bandwidth: int  # bytes/s
    cache: int  # bytes of L2
    clock: float  # GHz
    memory: int  # bytes
    shared_per_core: int  # bytes
    shared_per_block: int  # at most, bytes


GPUS = {
    name: Description(*said)
    for name, said in {
        "a100": ("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 2_039_040_000_000, 40 << 20, 1.41, 85_100_068_864, 167_936, 166_912),
        "h100": ("NVIDIA H100 80GB", (9, 0), 132, 128, 3_352_320_000_000, 50 << 20, 1.98, 84_942_979_072, 233_472, 232_448),
        "h200": ("NVIDIA H200", (9, 0), 132, 128, 4_800_000_000_000, 50 << 20, 1.98, 151_397_597_184, 233_472, 232_448),
        "b200": ("NVIDIA B200", (10, 0), 148, 128, 7_672_320_000_000, 132_644_864, 1.965, 191_514_411_008, 233_472, 232_448),
    }.items()
}  # fmt: skip


def devices(topology: str) -> list[Any]:
    """The devices of 'h100' or 'h100:8', one host. Raises ValueError for an unknown name, and where the compiler is missing."""
    name, _, n = topology.partition(":")
    if name not in GPUS or not (n or "1").isdigit() or int(n or 1) < 1:
        raise ValueError(f"topology is {topology!r}; GPUs are named {', '.join(GPUS)}, with a number as in h100:8")
    try:
        import jax_cuda13_plugin  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            f"topology {topology!r} needs the compiler for GPUs: pip install 'jaxpeft[preflight-cuda]' (4 GB)"
        ) from None
    from jax.experimental import topologies

    target = {"target_config": _proto(GPUS[name]), "topology": f"1x{int(n or 1)}x1"}
    try:
        return list(topologies.get_topology_desc(platform="cuda", topology_name=name, **target).devices)
    except Exception as error:  # of the plugin, of many types
        raise ValueError(f"topology {topology!r} cannot be loaded: {error}") from None


def _proto(gpu: Description) -> str:
    """The description as text of XLA's GpuTargetConfigProto; what is not a field of it here is equal on all these cards."""
    device = {
        "threads_per_block_limit": 1024, "threads_per_warp": 32, "threads_per_core_limit": 2048,
        "block_dim_limit_x": 2**31 - 1, "block_dim_limit_y": 65535, "block_dim_limit_z": 65535,
        "registers_per_core_limit": 65536, "registers_per_block_limit": 65536, "shared_memory_per_block": 49152,
        "shared_memory_per_core": gpu.shared_per_core, "shared_memory_per_block_optin": gpu.shared_per_block,
        "core_count": gpu.cores, "fpus_per_core": gpu.units, "memory_bandwidth": gpu.bandwidth,
        "l2_cache_size": gpu.cache, "clock_rate_ghz": gpu.clock, "device_memory_size": gpu.memory,
    }  # fmt: skip
    major, minor = gpu.capability
    fields = " ".join(f"{name}: {value}" for name, value in device.items())
    return (
        f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: {major} minor: {minor} }} }} "
        f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }} '
        f'runtime_version {{ major: 13 }} device_description_str: "{gpu.name}"'
    )


# ---------------------------------------------------------------- a compiled program


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of a program."""

    op: str  # of HLO: 'fusion', 'custom-call', ...
    target: str  # of a custom call: '__cublas$lt$matmul', '__cudnn$fmhaSoftmax', ...
    result: str  # the type of the result: 'bf16[64,584,768]', or a tuple
    times: int  # how often it runs
    n_bytes: float  # that it reads and writes
    flops: float  # of its matrix product or attention
    half: bool  # whether these are in bfloat16
    name: str = ""  # of the instruction, of which XLA makes the kernel's name: 'loop_multiply_fusion.3'
    scope: str = ""  # where the code stands that it comes from: 'jit(step)/jvp(Blip)/.../vision/patch/dot_general'

    def seconds(self, flops: float, bandwidth: float) -> float:
        """By the model above, on a chip of these peaks, once."""
        share = ATTENTION if "fmha" in self.target else PRODUCTS if self.half else PRODUCTS / 2
        return max(LAUNCH, self.n_bytes / (BANDWIDTH * bandwidth), self.flops / (share * flops))


def seconds(kernels: Iterable[Kernel], flops: float, bandwidth: float) -> float:
    """The predicted time of a program on a chip of these peaks."""
    return sum(one.times * one.seconds(flops, bandwidth) for one in kernels)


NO_KERNEL = frozenset(
    ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "while", "call")
)
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\((?:[^()]|\([^()]*\))*\)|\S+) ([\w\-]+)\((.*?)\)(.*)$")


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    kind: str  # the type of the result
    op: str
    operands: list[str]
    rest: str

    def said(self, pattern: str) -> str:
        found = re.search(pattern, self.rest)
        return found[1] if found else ""


def _shapes(kind: str) -> list[tuple[str, list[int]]]:
    return [(dtype, [int(n) for n in sizes.split(",") if n]) for dtype, sizes in ARRAY.findall(kind)]


def _n_bytes(kind: str) -> int:
    def n_bits(dtype: str) -> int:  # as the name says: bf16, s32; 'pred' is a byte
        named = re.search(r"\d+", dtype)
        return int(named[0]) if named else 8

    return sum(n_bits(dtype) * math.prod(sizes) // 8 for dtype, sizes in _shapes(kind))


def _parsed(program: str) -> tuple[dict[str, list[_Instruction]], str]:
    """(computations by name, the name of the entry) of the text of an optimised program."""
    found, entry, current = {}, "", []
    for line in re.sub(r"/\*.*?\*/", "", program).splitlines():
        if head := re.match(r"^(ENTRY )?%?([\w.\-]+) .*\{$", line):
            current = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif hit := INSTRUCTION.match(line):
            name, kind, op, operands, rest = hit.groups()
            names = [one.split("%")[-1].split(" ")[-1] for one in operands.split(", ")]
            current.append(_Instruction(name, kind, op, names, rest))
    return found, entry


def kernels(program: str) -> list[Kernel]:
    """The kernels of an optimised GPU program (`compiled.as_text()`), loops by the number of their passes."""
    computations, entry = _parsed(program)
    found: list[Kernel] = []

    def visit(name: str, times: int) -> None:
        kinds = {one.name: one.kind for one in computations[name]}
        for one in computations[name]:
            if one.op == "while":
                passes = int(one.said(r'known_trip_count":\s*\{"n":\s*"(\d+)"') or 1)
                visit(one.said(r"body=%?([\w.\-]+)"), times * passes)
            elif one.op == "call":
                visit(one.said(r"to_apply=%?([\w.\-]+)"), times)
            elif one.op not in NO_KERNEL and not one.op.endswith("-done"):
                target = one.said(r'custom_call_target="([^"]*)"')
                flops = _flops(one, target, kinds)
                operands = [kinds.get(name, "") for name in one.operands]
                half = not operands or not operands[0].startswith("f32")
                fused = computations.get(one.said(r"calls=%?([\w.\-]+)"), [])
                n_bytes = (
                    _moved(one, operands, fused)
                    if one.op == "fusion"
                    else sum(map(_n_bytes, operands))
                    + _n_bytes(
                        re.sub(r", s8\[\d+\]", "", one.kind)  # scratch memory
                    )
                )
                scope = one.said(r'op_name="([^"]*)"')
                found.append(Kernel(one.op, target, one.kind, times, n_bytes, flops, half, one.name, scope))

    visit(entry, 1)
    return found


def _flops(one: _Instruction, target: str, kinds: dict[str, str]) -> float:
    if "matmul" in target or "gemm" in target:
        axis = int(one.said(r'lhs_contracting_dimensions":\s*\["(\d+)"') or -1)
        result, left = _shapes(one.kind)[0][1], _shapes(kinds[one.operands[0]])[0][1]
        return 2.0 * math.prod(result) * left[axis]
    if "fmha" in target:
        (n_rows, n_queries, n_heads, size), (_, n_keys, *_) = (_shapes(kinds[name])[0][1] for name in one.operands[:2])
        return (10.0 if "Backward" in target else 4.0) * n_rows * n_heads * n_queries * n_keys * size
    return 0.0


def _moved(one: _Instruction, operands: list[str], fused: list[_Instruction]) -> float:
    """Bytes of a fusion: of an operand that is only sliced, the slices; of a result that is an operand with a part replaced,
    the part, because it is in place."""
    kinds, total = {x.name: x.kind for x in fused}, float(_n_bytes(one.kind))
    source: dict[str, str] = {}  # the parameter behind a name

    def of(x: _Instruction, i: int) -> str:
        return source.get(x.operands[i], "")

    for x in fused:
        if x.op == "parameter":
            source[x.name] = x.name
        elif x.op == "bitcast" and of(x, 0):
            source[x.name] = of(x, 0)
    for x in fused:
        if x.op != "parameter":
            continue
        users = [y for y in fused if y.op != "bitcast" and x.name in (source.get(name) for name in y.operands)]
        replaced = [y for y in users if y.op == "dynamic-update-slice" and of(y, 0) == x.name]
        if users and all(y.op in ("slice", "dynamic-slice") and of(y, 0) == x.name for y in users):
            total += sum(_n_bytes(y.kind) for y in users)
        elif replaced:
            total += sum(_n_bytes(kinds[y.operands[1]]) for y in replaced) * 2 - _n_bytes(x.kind)
        else:
            total += _n_bytes(operands[int(x.operands[0])])
    return max(total, 0.0)
