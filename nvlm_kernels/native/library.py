"""Builds the C++ files of this folder once, with the machine's compiler, and loads the result.

The library's file name is the hash of everything it depends on: sources, compiler, flags and CPU. A second file holds
the hash of the library's bytes; a damaged library is built again. torch has already loaded its OpenMP runtime, and the
library links to the same one, so both share one pool of threads.
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
GROUP, BLOCK = 32, 128  # int4 weights per scale, and int4 weights in 64 bytes


class BuildError(OSError):
    """No C++ compiler was found, or it failed."""


# The structures below mirror model.h, field by field. Pointers are addresses of memory that the caller keeps alive.


class NativeMatrix(ctypes.Structure):
    """Weights of one linear layer, as torch stores them: [rows, cols].

    Attributes:
        data: Address of the weights, [rows, cols] of `kind`.
        scale: Address of the scales: int8 fp32 [rows], int4 bf16 [rows, cols / GROUP]; else null.
        bias: Address of the bias, fp32 [rows], or null.
        rows: Number of output features.
        cols: Number of input features.
        kind: KIND_F32, KIND_BF16, KIND_INT8 or KIND_INT4.
        parts: Number of 16-bit integers per activation, 1 or 2; used for int8 and int4 only.
    """

    _fields_ = [
        ("data", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("rows", c_int64),
        ("cols", c_int64),
        ("kind", c_int32),
        ("parts", c_int32),
    ]


class NativeLayer(ctypes.Structure):
    """One decoder layer and the gated cross-attention layer beside it, if any.

    Attributes:
        input_norm, post_norm, cross_norm, ffn_norm: Addresses of norm weights, fp32 [hidden].
        qkv, o, gate_up, down: Linear layers of self-attention and of the feed-forward part.
        cross: Index of the gated cross-attention layer in the image cache, or -1.
        before: 1 if the gated layer runs before self-attention, 0 if it runs after it.
        ffn: Feed-forward part of the gated layer: 0 none, 1 SwiGLU, 2 GELU.
        cross_q, cross_o, ffn_in, ffn_up, ffn_out: Linear layers of the gated layer.
        gate, ffn_gate: tanh of the gate parameters.
    """

    _fields_ = [
        ("input_norm", c_void_p),
        ("post_norm", c_void_p),
        ("qkv", NativeMatrix),
        ("o", NativeMatrix),
        ("gate_up", NativeMatrix),
        ("down", NativeMatrix),
        ("cross", c_int32),
        ("before", c_int32),
        ("ffn", c_int32),
        ("cross_norm", c_void_p),
        ("ffn_norm", c_void_p),
        ("cross_q", NativeMatrix),
        ("cross_o", NativeMatrix),
        ("ffn_in", NativeMatrix),
        ("ffn_up", NativeMatrix),
        ("ffn_out", NativeMatrix),
        ("gate", c_float),
        ("ffn_gate", c_float),
    ]


class NativeModel(ctypes.Structure):
    """A decoder.

    Attributes:
        num_layers, hidden, heads, kv_heads, head_dim, vocab: Sizes.
        eps: Epsilon of all RMS norms.
        rope_scale: Factor on the cosines and sines of the rotary embedding.
        norm: Address of the final norm's weight, fp32 [hidden].
        inv_freq: Address of the rotary frequencies, fp32 [head_dim / 2].
        embed, head: Token embedding and output head.
        layers: Array of `num_layers` layers.
    """

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
        ("embed", NativeMatrix),
        ("head", NativeMatrix),
        ("layers", POINTER(NativeLayer)),
    ]


class NativeCache(ctypes.Structure):
    """Keys and values [layers, B, S, Hkv, D]; the last two axes are dense.

    Attributes:
        k, v: Addresses.
        stride_layer, stride_row, stride_position: Strides in elements. A row is one request of the batch.
        kind: KIND_F32 or KIND_BF16.
    """

    _fields_ = [
        ("k", c_void_p),
        ("v", c_void_p),
        ("stride_layer", c_int64),
        ("stride_row", c_int64),
        ("stride_position", c_int64),
        ("kind", c_int32),
    ]


class NativeStep(ctypes.Structure):
    """Inputs and outputs of one decode step.

    Attributes:
        rows: B, number of requests; the caches have the same.
        token, position: Addresses of int64 [B].
        intervals: Address of int64 [B, 2], the image keys that each row sees, or null if no row sees an image.
        active: Address of bool [B].
        cache, cross: Caches of self-attention and of the image keys.
        logits: Address of the output, fp32 [B, vocab].
        scratch: Address of `nvlm_scratch` floats of working memory.
    """

    _fields_ = [
        ("rows", c_int64),
        ("token", c_void_p),
        ("position", c_void_p),
        ("intervals", c_void_p),
        ("active", c_void_p),
        ("cache", NativeCache),
        ("cross", NativeCache),
        ("logits", c_void_p),
        ("scratch", c_void_p),
    ]


@dataclass(frozen=True)
class NativeLibrary:
    """The loaded library.

    Attributes:
        dll: Its C functions.
        path: The shared library's file.
        built: Whether the compiler ran for this load.
    """

    dll: ctypes.CDLL
    path: Path
    built: bool

    @property
    def attention_level(self) -> int:
        """What `native_attention` can do on this CPU: 0 nothing, 1 products in fp32, 2 products in bf16 too."""
        return self.dll.nvlm_attention_level()

    def __deepcopy__(self, memo: dict) -> "NativeLibrary":
        """Returns the same library: a copied model shares it."""
        return self


def default_folder() -> Path:
    """The folder that keeps built libraries unless the caller names another: the user's cache."""
    return Path.home() / ".cache" / "nvlm-runtime"


def find_compiler() -> str | None:
    """Path of the first C++ compiler found of COMPILERS, or None."""
    return next((path for name in COMPILERS if (path := shutil.which(name))), None)


def is_available() -> bool:
    """Whether a CPU can run natively: a compiler exists, and no environment variable selects another path."""
    return not _backend.INTERPRET and not _backend.EAGER and find_compiler() is not None


def load_library(folder: Path | None = None) -> NativeLibrary:
    """Loads the library, and builds it first if it is missing or damaged.

    Args:
        folder: Folder that keeps the built library. Default: `default_folder()`.

    Returns:
        The loaded library.

    Raises:
        BuildError: No compiler was found, or it failed.
    """
    folder = default_folder() if folder is None else Path(folder)
    compiler = find_compiler()
    if compiler is None:
        raise BuildError(
            f"native decoding needs a C++ compiler ({', '.join(COMPILERS)}) and found none: install one, or go without "
            "it (native=False, --no-native)"
        )
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    parts = [source.read_bytes() for source in (*SOURCES, *HEADERS)]
    parts += [text.encode() for text in (version, repr(FLAGS), _cpu())]
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]
    path = folder / f"native-{name}.so"
    built = not _is_whole(path)
    if built:
        _build(compiler, path)
    return NativeLibrary(_declare(ctypes.CDLL(str(path))), path, built)


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
    dll.nvlm_scratch.argtypes, dll.nvlm_scratch.restype = [POINTER(NativeModel), c_int64, c_int64], c_int64
    dll.nvlm_step.argtypes, dll.nvlm_step.restype = [POINTER(NativeModel), POINTER(NativeStep), c_int64], None
    dll.nvlm_linear.argtypes = [POINTER(NativeMatrix), c_int64, c_void_p, c_int64, c_void_p, c_int64]
    dll.nvlm_linear.restype = None
    dll.nvlm_read.argtypes, dll.nvlm_read.restype = [c_void_p, c_int64, c_int64], c_float
    dll.nvlm_attention_level.argtypes, dll.nvlm_attention_level.restype = [], c_int32
    dll.nvlm_attention_room.argtypes, dll.nvlm_attention_room.restype = [c_void_p], c_int64
    dll.nvlm_attention.argtypes, dll.nvlm_attention.restype = [c_void_p, c_int64], None
    dll.nvlm_quantize_rows.argtypes = [c_void_p, c_int32, c_int64, c_int64, c_void_p, c_void_p, c_int64]
    dll.nvlm_scale_products.argtypes = [*[c_void_p] * 4, c_int64, c_int64, c_void_p, c_int32, c_int64]
    dll.nvlm_quantize_rows.restype = dll.nvlm_scale_products.restype = None
    return dll
