"""Builds the C++ beside it with the machine's compiler, once, and loads it.

The library is kept in a folder under a name that is the hash of everything it came from: source, compiler, flags and
the CPU it was built for. It is loaded only if its bytes are still those that were built. torch has loaded its OpenMP
runtime by then, and the library finds that one under the same name: one pool of threads.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

from nvlm_kernels import _backend

SOURCES = tuple(Path(__file__).with_name(name) for name in ("decode.cpp", "attention.cpp", "int8.cpp"))
HEADERS = sorted(Path(__file__).parent.glob("*.h"))
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
COMPILERS = ("g++", "clang++", "c++")

KIND_F32, KIND_BF16, KIND_INT8, KIND_INT4 = range(4)
GROUP, BLOCK = 32, 128  # int4 weights that share a scale, and that fill 64 bytes


class BuildError(OSError):
    """There is no compiler, or it failed."""


class Matrix(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("rows", c_int64),
        ("cols", c_int64),
        ("kind", c_int32),
        ("parts", c_int32),
    ]


class Layer(ctypes.Structure):
    _fields_ = [
        ("input_norm", c_void_p),
        ("post_norm", c_void_p),
        ("qkv", Matrix),
        ("o", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("cross", c_int32),
        ("before", c_int32),
        ("ffn", c_int32),
        ("cross_norm", c_void_p),
        ("ffn_norm", c_void_p),
        ("cross_q", Matrix),
        ("cross_o", Matrix),
        ("ffn_in", Matrix),
        ("ffn_up", Matrix),
        ("ffn_out", Matrix),
        ("gate", c_float),
        ("ffn_gate", c_float),
    ]


class Model(ctypes.Structure):
    _fields_ = [
        ("num_layers", c_int64),
        ("hidden", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("vocab", c_int64),
        ("eps", c_float),
        ("rope_scale", c_float),
        ("norm", c_void_p),
        ("inv_freq", c_void_p),
        ("embed", Matrix),
        ("head", Matrix),
        ("layers", POINTER(Layer)),
    ]


class Cache(ctypes.Structure):
    _fields_ = [
        ("k", c_void_p),
        ("v", c_void_p),
        ("stride_layer", c_int64),
        ("stride_row", c_int64),
        ("stride_slot", c_int64),
        ("kind", c_int32),
    ]


class Step(ctypes.Structure):
    _fields_ = [
        ("rows", c_int64),
        ("token", c_void_p),
        ("position", c_void_p),
        ("intervals", c_void_p),
        ("active", c_void_p),
        ("cache", Cache),
        ("cross", Cache),
        ("logits", c_void_p),
        ("scratch", c_void_p),
    ]


@dataclass(frozen=True)
class Native:
    """The loaded library. built: whether the compiler had to run for it."""

    dll: ctypes.CDLL
    path: Path
    built: bool

    @property
    def attention(self) -> int:
        """Of `native_attention` on this CPU: 0 there is none, 1 products in fp32, 2 in bf16 too."""
        return self.dll.nvlm_attention_level()

    def __deepcopy__(self, memo: dict) -> "Native":
        """A copy of a model has the same library."""
        return self


def default_folder() -> Path:
    """Where libraries are kept unless another folder is named: the user's cache."""
    return Path.home() / ".cache" / "nvlm-runtime"


def find_compiler() -> str | None:
    return next((path for name in COMPILERS if (path := shutil.which(name))), None)


def is_default() -> bool:
    """Whether a CPU decodes natively unless told otherwise: there is a compiler, and no other path was asked for."""
    return not _backend.INTERPRET and not _backend.EAGER and find_compiler() is not None


def library(folder: Path | None = None) -> Native:
    """The library from `folder`, built into it first where it is missing or not whole.

    Raises BuildError where no compiler is found or it fails.
    """
    folder = default_folder() if folder is None else Path(folder)
    compiler = find_compiler()
    if compiler is None:
        raise BuildError(
            f"native decoding needs a C++ compiler ({', '.join(COMPILERS)}) and found none: install one, or go without "
            "it (native=False, --no-compile)"
        )
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    parts = (*(source.read_bytes() for source in (*SOURCES, *HEADERS)), version, repr(FLAGS), _cpu())
    name = hashlib.sha256(b"\0".join(p if isinstance(p, bytes) else p.encode() for p in parts)).hexdigest()[:24]
    path = folder / f"native-{name}.so"
    built = not _is_whole(path)
    if built:
        _build(compiler, path)
    return Native(_declare(ctypes.CDLL(str(path))), path, built)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    wanted = [next((line for line in lines if line.startswith(key)), "") for key in ("model name", "flags", "Features")]
    return "\n".join([platform.machine(), *wanted])


def _digest(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _is_whole(path: Path) -> bool:
    if not path.is_file() or not _digest(path).is_file():
        return False
    return hashlib.sha256(path.read_bytes()).hexdigest() == _digest(path).read_text().strip()


def _build(compiler: str, path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        target = Path(folder) / path.name
        command = [compiler, *FLAGS, *map(str, SOURCES), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            names = ", ".join(source.name for source in SOURCES)
            raise BuildError(f"{compiler} could not build {names}: {done.stderr.strip()[-2000:]}")
        digest = Path(folder) / "digest"
        digest.write_text(hashlib.sha256(target.read_bytes()).hexdigest())
        os.replace(target, path)
        os.replace(digest, _digest(path))


def _declare(dll: ctypes.CDLL) -> ctypes.CDLL:
    dll.nvlm_scratch.argtypes, dll.nvlm_scratch.restype = [POINTER(Model), c_int64, c_int64], c_int64
    dll.nvlm_step.argtypes, dll.nvlm_step.restype = [POINTER(Model), POINTER(Step), c_int64], None
    dll.nvlm_linear.argtypes = [POINTER(Matrix), c_int64, c_void_p, c_int64, c_void_p, c_int64]
    dll.nvlm_linear.restype = None
    dll.nvlm_read.argtypes, dll.nvlm_read.restype = [c_void_p, c_int64, c_int64], c_float
    dll.nvlm_attention_level.argtypes, dll.nvlm_attention_level.restype = [], c_int32
    dll.nvlm_attention_room.argtypes, dll.nvlm_attention_room.restype = [c_void_p], c_int64
    dll.nvlm_attention.argtypes, dll.nvlm_attention.restype = [c_void_p, c_int64], None
    dll.nvlm_quantize_rows.argtypes = [c_void_p, c_int32, c_int64, c_int64, c_void_p, c_void_p, c_int64]
    dll.nvlm_scale_products.argtypes = [*[c_void_p] * 4, c_int64, c_int64, c_void_p, c_int32, c_int64]
    dll.nvlm_quantize_rows.restype = dll.nvlm_scale_products.restype = None
    return dll
