"""Loading: what is derived from the checkpoint, and every refusal."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine import memory
from engine.batch import Batch, BatchRow
from engine.engine import Engine, EngineConfig
from engine.sequence import Sequence
from protocol.errors import ConfigError
from protocol.sampling import SamplingParams

ROOT = Path(__file__).parents[2]


def load(path: Path, **options: object) -> Engine:
    defaults = {"device": "cpu", "num_blocks": 128}
    return Engine.load(EngineConfig(str(path), **{**defaults, **options}))  # type: ignore[arg-type]


def test_what_an_engine_says_of_itself(checkpoint: Callable[[str], Path]) -> None:
    engine = load(checkpoint("llama"))
    assert engine.geometry.row_shape == (2, 2, 2, 16, 64)
    assert engine.geometry.dtype == "float32"  # the checkpoint's
    assert engine.num_blocks == 128
    assert engine.max_model_len == 2048
    assert engine.rows.shape == (128, 2 * 2 * 2 * 16 * 64)
    assert engine.rows.nbytes == 128 * engine.geometry.row_bytes
    assert not engine.rows.any()
    assert engine.model_config.vocab_size == 262


def test_the_rows_are_where_the_model_writes(checkpoint: Callable[[str], Path]) -> None:
    engine = load(checkpoint("llama"))
    sequence = Sequence("request", [1, 2, 3], 3, SamplingParams(max_tokens=1))
    sequence.block_table = [77]
    assert len(engine.run(Batch((BatchRow(sequence, 0, 3),))).token_ids) == 1
    assert engine.rows.any(dim=1).nonzero().tolist() == [[77]]
    block = engine.rows[77].view(engine.geometry.row_shape)
    assert block[:, :, :, :3].all(dim=-1).all()
    assert not block[:, :, :, 3:].any()


def test_a_chunk_inside_a_prompt_gives_no_token(checkpoint: Callable[[str], Path]) -> None:
    engine = load(checkpoint("llama"))
    sequence = Sequence("request", [1, 2, 3], 3, SamplingParams(max_tokens=1))
    sequence.block_table = [0]
    assert engine.run(Batch((BatchRow(sequence, 0, 2),))).token_ids == []


def test_copies_share_a_fingerprint_and_other_models_do_not(
    checkpoint: Callable[[str], Path],
) -> None:
    engine = load(checkpoint("llama"))
    same = load(checkpoint("llama"), num_blocks=200, max_model_len=500)
    assert engine.fingerprint == same.fingerprint
    assert engine.salt == same.salt
    for options, field in (
        ({"block_size": 32}, "geometry.block_size"),
        ({"dtype": "bfloat16"}, "weights_digest"),
        ({"load_format": "dummy"}, "weights_digest"),
        ({"wire_quantization": "int8"}, "wire_quantization"),
    ):
        other = load(checkpoint("llama"), **options)
        difference = engine.fingerprint.difference(other.fingerprint)
        assert difference is not None
        assert difference.startswith(field)
        assert engine.salt != other.salt
    assert load(checkpoint("mistral")).salt != engine.salt


def test_dummy_weights_need_only_a_config(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text((checkpoint("qwen3") / "config.json").read_text())
    engines = [load(tmp_path, load_format="dummy", seed=seed) for seed in (3, 3, 4)]
    digests = [engine.fingerprint.weights_digest for engine in engines]
    assert digests[0] == digests[1] != digests[2]
    sequence = Sequence("request", [1, 2, 3], 3, SamplingParams(max_tokens=1, temperature=0.0))
    sequence.block_table = [0]
    batch = Batch((BatchRow(sequence, 0, 3),))
    assert engines[0].run(batch) == engines[1].run(batch)


def test_kv_memory_decides_the_number_of_blocks(checkpoint: Callable[[str], Path]) -> None:
    engine = load(checkpoint("llama"), num_blocks=None, kv_cache_memory=8 / 1024)
    assert engine.num_blocks == (8 << 20) // engine.geometry.row_bytes


def test_kv_memory_is_bounded_by_free_memory(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_free_host_memory", lambda: 10 << 20)
    engine = load(checkpoint("llama"), num_blocks=None, kv_cache_memory=50.0)
    assert engine.num_blocks == (9 << 20) // engine.geometry.row_bytes


def test_too_little_kv_for_one_sequence_says_both_numbers(
    checkpoint: Callable[[str], Path],
) -> None:
    message = r"2048 tokens needs 128 KV blocks \(4\.00 MiB\).*memory for 127 .*at most 2032"
    with pytest.raises(ConfigError, match=message):
        load(checkpoint("llama"), num_blocks=127)
    assert load(checkpoint("llama"), num_blocks=127, max_model_len=2032).num_blocks == 127


def test_a_longer_context_than_the_model_s_is_refused(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"max_model_len 2049.*2048"):
        load(checkpoint("llama"), max_model_len=2049)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_cuda_without_a_gpu_is_refused(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="no usable CUDA GPU"):
        load(checkpoint("llama"), device="cuda")
    assert load(checkpoint("llama"), device="auto").rows.device.type == "cpu"


def test_an_arena_that_cannot_be_allocated_is_refused(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"cannot allocate .* GiB of KV"):
        load(checkpoint("llama"), num_blocks=1 << 44)


def test_number_of_threads(checkpoint: Callable[[str], Path]) -> None:
    load(checkpoint("llama"), num_threads=2)
    assert torch.get_num_threads() == 2
    load(checkpoint("llama"), num_threads=1)
    assert torch.get_num_threads() == 1


def test_config_and_checkpoint_never_reach_torch() -> None:
    code = "import sys, engine.config, engine.checkpoint; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment, timeout=120)


@pytest.mark.parametrize(
    ("dtype", "able", "warns"),
    [
        ("bfloat16", {"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, True),
        ("bfloat16", {"avx512_bf16": False, "amx_bf16": True}, False),
        ("float16", {"avx512_bf16": True, "avx512_fp16": False}, True),
        ("float32", {}, False),
    ],
)
def test_a_type_without_instructions_is_pointed_out(
    checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    dtype: str,
    able: dict[str, bool],
    warns: bool,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    load(checkpoint("llama"), dtype=dtype)
    assert any("float32 may be faster" in message for message in caplog.messages) == warns
