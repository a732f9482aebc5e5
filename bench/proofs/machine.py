"""Machine code without a GPU: an op's real launches, compiled for a named chip and read back.

`capture` runs an op with launches recorded instead of made. `compile_launch` hands a recorded launch to Triton's own
launcher in warm-up mode behind a stand-in driver, so signatures, alignment and constants are the ones a GPU would
get. `inspect` reads registers, spills, shared memory and the instruction mix.
Sources: nvdisasm and cuobjdump as triton ships them; occupancy from the vendors' published limits a multiprocessor.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from nvlm_kernels import _backend


@dataclass(frozen=True)
class Chip:
    """shared_limit: bytes a block may use; registers, shared, warps: what one multiprocessor holds."""

    name: str
    target: GPUTarget
    shared_limit: int
    shared: int
    registers: int
    warps: int
    max_blocks: int
    tensor_core: str  # the instruction a matrix product must become


CHIPS = {
    "sm_80": Chip("sm_80", GPUTarget("cuda", 80, 32), 163 * 1024, 164 * 1024, 65536, 64, 32, "HMMA"),
    "sm_90": Chip("sm_90", GPUTarget("cuda", 90, 32), 227 * 1024, 228 * 1024, 65536, 64, 32, "HGMMA|HMMA"),
    "sm_100": Chip("sm_100", GPUTarget("cuda", 100, 32), 227 * 1024, 228 * 1024, 65536, 64, 32, "UTC.?MMA|HMMA"),
    "gfx942": Chip("gfx942", GPUTarget("hip", "gfx942", 64), 64 * 1024, 64 * 1024, 4 * 512 * 64, 32, 32, "mfma"),
}


@dataclass(frozen=True)
class Launch:
    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


@contextmanager
def _recording(launches: list[Launch]) -> Iterator[None]:
    """Every op takes its Triton path, and a launch is appended instead of made."""
    run, interpret = JITFunction.run, _backend.INTERPRET

    def record(kernel, *args, grid, warmup, **options):
        launches.append(Launch(kernel, grid, args, options))

    JITFunction.run, _backend.INTERPRET = record, True
    try:
        yield
    finally:
        JITFunction.run, _backend.INTERPRET = run, interpret


def capture(fn: Callable[[], Any]) -> list[Launch]:
    """The kernel launches of fn() on CPU tensors; their outputs stay unwritten."""
    launches: list[Launch] = []
    with _recording(launches):
        fn()
    return launches


class _Driver:
    """Tells Triton which chip to compile for, and nothing else."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launch(launch: Launch, chip: Chip) -> Any:
    """The compiled kernel of a recorded launch for a chip."""
    before = driver._active  # the property would look for a GPU
    driver.set_active(_Driver(chip.target))
    try:
        launch.kernel.device_caches.clear()  # keyed by device number, and every chip is device 0 here
        return launch.kernel.run(*launch.args, grid=launch.grid, warmup=True, **launch.options)
    finally:
        launch.kernel.device_caches.clear()
        driver._active = before


@dataclass(frozen=True)
class Code:
    """spills: bytes of local memory a thread. has_dot: it holds a tl.dot, and so needs tensor_core, instructions of the
    matrix unit. tf32: a product rounds its fp32 operands, which none of ours may: Triton 3.7.1 does so on sm_100,
    "ieee" or not, where an operand's mask comes from an 8- or 16-bit load. widest_load: bytes of the widest global
    load. occupancy: resident warps over the most a multiprocessor holds.
    """

    kernel: str
    chip: str
    num_warps: int
    registers: int
    spills: int
    shared: int
    has_dot: bool
    tf32: bool
    tensor_core: int
    widest_load: int
    occupancy: float


def inspect(compiled: Any, chip: Chip) -> Code:
    if chip.target.backend == "hip":
        registers, spills, tensor_core, widest = _inspect_amd(compiled.asm["amdgcn"])
    else:
        registers, spills, tensor_core, widest = _inspect_nvidia(compiled.asm["cubin"], chip.tensor_core)
    shared, num_warps = compiled.metadata.shared, compiled.metadata.num_warps
    lanes = chip.target.warp_size
    per_block = max(registers, 1) * lanes * num_warps
    blocks = min(chip.max_blocks, chip.registers // per_block, chip.warps // num_warps)
    if shared:
        blocks = min(blocks, chip.shared // (shared + 1024 * (chip.target.backend == "cuda")))
    return Code(
        kernel=compiled.metadata.name,
        chip=chip.name,
        num_warps=num_warps,
        registers=registers,
        spills=spills,
        shared=shared,
        has_dot="tt.dot" in compiled.asm["ttir"],
        tf32="tf32" in compiled.asm.get("ptx", ""),
        tensor_core=tensor_core,
        widest_load=widest,
        occupancy=blocks * num_warps / chip.warps,
    )


@lru_cache(256)  # cases of one op launch the same kernels
def _inspect_nvidia(cubin: bytes, tensor_core: str) -> tuple[int, int, int, int]:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", file.name)
        sass = _output(tools / "nvdisasm", "--print-code", "--no-dataflow", file.name)
    found = re.search(r"REG:(\d+).*?STACK:(\d+).*?LOCAL:(\d+)", usage)
    if not found:
        raise RuntimeError(f"cuobjdump says nothing about registers: {usage!r}")
    registers, stack, local = map(int, found.groups())
    loads = re.findall(r"\b(?:LDG|LDGSTS)\.E(\S*)", sass)
    widths = [int(m.group(1)) // 8 if (m := re.search(r"\.(?:U|S)?(128|64|32|16|8)\b", load)) else 4 for load in loads]
    if re.search(r"\bUTMALDG|\bUBLKCP", sass):
        widths.append(16)
    return registers, max(stack, local), len(re.findall(rf"\b(?:{tensor_core})", sass)), max(widths, default=0)


def _inspect_amd(text: str) -> tuple[int, int, int, int]:
    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", text)
        if not found:
            raise RuntimeError(f"the AMD listing has no {key}")
        return int(found.group(1))

    spills = max(number("private_segment_fixed_size"), 4 * number("vgpr_spill_count"))
    loads = re.findall(r"\b(?:global_load|buffer_load)_(dwordx4|dwordx3|dwordx2|dword|ushort|short|ubyte)", text)
    widths = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "ubyte": 1}
    return (
        number("vgpr_count"),
        spills,
        len(re.findall(r"\bv_mfma", text)),
        max((widths[load] for load in loads), default=0),
    )


def _output(*command: Any) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout
