"""Everything that needs a CUDA device, in one go, and a report of it.

    python -m benchmarks.gpu_check

With a device: the gpu-marked tests, the Triton checks, and every benchmark, each in a process of its own; what they
said goes to ``benchmarks/results/gpu-check.md``. Without one it says so, and runs the Triton kernel in the interpreter
and compiles it ahead of time.
"""

import platform
import subprocess
import sys
import time

import torch

from benchmarks.harness import RESULTS

BENCHMARKS = ("step", "switch", "vgg", "gates", "peers", "fidelity", "scaling", "compiled")
TRITON = [sys.executable, "-m", "pytest", "tests/test_gram_triton.py"]
STEPS = {
    "gpu-marked tests": [sys.executable, "-m", "pytest", "-m", "gpu", "-rs"],
    "Triton kernel compiled ahead of time": TRITON,  # interpreting it is left to machines without a device
    **{name: [sys.executable, "-m", f"benchmarks.{name}"] for name in BENCHMARKS},
}


def main() -> int:
    """Run the steps; the exit status is the number of those that failed."""
    if not torch.cuda.is_available():
        print("There is no CUDA device here: gpu-marked tests and timings are left out.", flush=True)
        return subprocess.run(TRITON).returncode
    parts = [
        "# What `make gpu-check` found\n",
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, Python "
        f"{platform.python_version()}, {time.strftime('%Y-%m-%d')}\n",
    ]
    failed = 0
    for name, command in STEPS.items():
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout, flush=True)
        failed += done.returncode != 0
        verdict = "passed" if done.returncode == 0 else f"FAILED ({done.returncode})"
        tail = "\n".join(done.stdout.splitlines()[-60:])
        parts.append(f"## {name}: {verdict}, {time.perf_counter() - start:.0f} s\n\n```\n{tail}\n```\n")
        (RESULTS / "gpu-check.md").write_text("\n".join(parts))
    return failed


if __name__ == "__main__":
    sys.exit(main())
