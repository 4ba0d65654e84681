"""The Triton kernel without a device: interpreted, and compiled for sm_80 and sm_90."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton comes with torch on Linux only")

# Triton 3.6's interpreter does not work with NumPy 2.5, which says nothing about the kernel.
ON_A_DEVICE = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a device tests/test_gpu.py runs the kernel itself"
)
INTERPRETED = """
import torch
from mat import gram, gram_triton
for n, t, u, p, q in [(3, 5, 2, 7, 17), (18, 35, 1, 16, 5), (33, 1, 1, 16, 3)]:
    random = torch.Generator().manual_seed(n)
    # Strides as views have them.
    a = torch.randn(n, t, u + 1, p + 3, generator=random).bfloat16()[:, :, 1:, :p]
    b = torch.randn(n, t, q + 1, generator=random).bfloat16()[:, :, :q]
    expected = gram.unit_gram([(a.double(), b.double())], False, 2**30)
    error = float((gram_triton.gram(a, b) - expected).abs().max() / expected.max())
    assert error < 2**-14, f"{(n, t, u, p, q)}: relative error {error:.2e}"
print("interpreted")
"""


def run(code: str, **environment: str) -> str:
    """Triton decides at import whether it interprets: a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@ON_A_DEVICE
def test_interpreted_kernel_equals_float64_at_odd_sizes() -> None:
    """Products of gradients carry sixteen bits, far more than bf16's eight."""
    assert "interpreted" in run(INTERPRETED, TRITON_INTERPRET="1")


COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from mat import gram_triton
chosen = gram_triton.settings({samples})
options = {{name: chosen.pop(name) for name in ("num_warps", "num_stages")}}
constants = {{**chosen, "interpreted": False}}
names = gram_triton.kernel.arg_names
signature = {{name: "constexpr" if name in constants else "i32" for name in names}}
signature |= {{"a": "*bf16", "b": "*bf16", "out": "*fp32"}}
source = ASTSource(gram_triton.kernel, signature=signature, constexprs=constants)
built = compile(source, target=GPUTarget("cuda", {capability}, 32), options=options)
assert len(built.asm["cubin"]) and "mma" in built.asm["ptx"]
print(built.metadata.shared)
"""


@pytest.mark.parametrize("samples", [16, 32, 64])
@pytest.mark.parametrize("capability, kilobytes", [(80, 163), (90, 227)])
def test_kernel_compiles_ahead_of_time(
    capability: int, kilobytes: int, samples: int, tmp_path: Path
) -> None:
    """Products on tensor cores; on-chip memory as on an A100 and on an H100."""
    code = COMPILED.format(capability=capability, samples=samples)
    assert 0 < int(run(code, TRITON_CACHE_DIR=str(tmp_path))) <= kilobytes * 1024


FAR = """
import torch
from mat import gram, gram_triton
# A sparse file.
far = torch.from_file({path!r}, shared=True, size=2**31 + 4096, dtype=torch.bfloat16)
a = far.as_strided((3, 5, 2, 16), (2**30, 32, 16, 1)).copy_(torch.randn(3, 5, 2, 16))
b = torch.randn(3, 5, 7).bfloat16()
expected = gram.unit_gram([(a.double(), b.double())], False, 2**30)
assert float((gram_triton.gram(a, b) - expected).abs().max() / expected.max()) < 2**-14
print("reached")
"""


@ON_A_DEVICE
def test_samples_may_lie_further_apart_than_32_bits_reach(tmp_path: Path) -> None:
    """The third sample begins 2**31 numbers behind the first."""
    assert "reached" in run(FAR.format(path=str(tmp_path / "far")), TRITON_INTERPRET="1")


def test_it_is_not_meant_for_what_would_waste_it() -> None:
    """Too many samples for the chip, units narrower than a tile, other types, no device."""
    from mat import gram_triton

    device = torch.device("cuda")
    assert gram_triton.fits(64, 16, torch.bfloat16, device)
    assert not gram_triton.fits(65, 16, torch.bfloat16, device)
    assert not gram_triton.fits(64, 1, torch.bfloat16, device)
    assert not gram_triton.fits(64, 16, torch.float32, device)
    assert not gram_triton.fits(64, 16, torch.bfloat16, torch.device("cpu"))


def test_partial_sums_cover_every_tile_once() -> None:
    """Whatever the number of units: programs hold all tiles, and none is left empty."""
    from mat import gram_triton

    for tiles in (1, 7, 48, 600):
        for units in (1, 12, 700):
            each, programs = gram_triton.schedule(tiles, units)
            assert (programs - 1) * each < tiles <= programs * each
