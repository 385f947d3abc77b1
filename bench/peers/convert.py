"""The model in the formats that some engines want, made once for a checkpoint."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import Literal

from bench.peers.compare import PeerError
from bench.peers.install import Site

EXPORT_GGUF = Path(__file__).parent / "scripts" / "export_gguf.py"
TIMEOUT = 600.0  # seconds

Format = Literal["openvino-fp16", "openvino-int8", "gguf-bf16", "gguf-q8_0"]


def converted(model: Path, form: Format, site: Site) -> Path:
    """Where the converted model lies: a folder for OpenVINO, a GGUF file."""
    place = hashlib.blake2b(str(model.resolve()).encode(), digest_size=4).hexdigest()
    return site.folder / "models" / f"{model.resolve().name}-{place}-{form}"


def convert(model: Path, form: Format, site: Site) -> None:
    """Convert the model unless that was done since it was written. Raises PeerError."""
    out = converted(model, form, site)
    if out.exists() and out.stat().st_mtime > (model / "config.json").stat().st_mtime:
        return
    unfinished = out.with_name("unfinished")
    for old in (out, unfinished):
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    kind = form.partition("-")[2]
    if form.startswith("openvino"):
        command = [site.python("openvino"), "-m", "optimum.commands.optimum_cli", "export"]
        command += ["openvino", "--model", str(model), "--task", "text-generation-with-past"]
        command += ["--weight-format", kind, str(unfinished)]
    else:
        command = [site.python("llama_cpp"), str(EXPORT_GGUF), str(model), str(unfinished), kind]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise PeerError(f"its conversion took longer than {TIMEOUT:.0f} s") from None
    except subprocess.CalledProcessError as error:
        raise PeerError(f"its conversion failed: {error.stderr.strip()[-300:]}") from None
    unfinished.rename(out)
