"""Chunked prefill attention over the paged cache: bound by arithmetic."""

from __future__ import annotations

from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench.gpu.case import Case, Check, Operation, Timed
from bench.gpu.decode_attention import gathered
from bench.gpu.paged import Heads, random_cache, random_queries
from kernels.gpu.prefill_attention import TILINGS, Tiling, prefill_attention_triton
from kernels.prefill_attention import prefill_attention_torch

GQA_4 = Heads(32, 8, 128)


def check(heads: Heads, block_size: int, window: int) -> Check:
    def run(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        cache = random_cache([65, 1, 200, 170], heads, block_size, dtype, device)
        query_lens = [65, 1, 7, 100]
        meta = cache.metadata(query_lens)
        q = random_queries(sum(query_lens), heads, dtype, device)
        result = prefill_attention_triton(q, cache.kv, meta, scale=heads.scale, window=window)
        expected = prefill_attention_torch(
            q.float(), cache.kv.float(), meta, scale=heads.scale, window=window
        )
        return result, expected

    return Check(f"prefill attention, {heads}, blocks of {block_size}, window {window}", run)


def case(
    name: str,
    query_lens: list[int],
    contexts: list[int],
    goal: float | None,
    *,
    heads: Heads = GQA_4,
    block_size: int = 64,
    window: int = 0,
    tiling: Tiling | None = None,
    peers: bool = False,  # only for whole prompts of one length
) -> Case:
    def prepare() -> Timed:
        device = torch.device("cuda")
        cache = random_cache(contexts, heads, block_size, torch.bfloat16, device)
        meta = cache.metadata(query_lens)
        q = random_queries(sum(query_lens), heads, torch.bfloat16, device)
        tilings = {heads.dim: tiling} if tiling else {}

        def ours() -> Tensor:
            with patch.dict(TILINGS, tilings):
                return prefill_attention_triton(q, cache.kv, meta, scale=heads.scale, window=window)

        pairs = sum(
            seen_pairs(queries, context, window)
            for queries, context in zip(query_lens, contexts, strict=True)
        )

        def dense_peers() -> dict[str, Operation]:
            ordered = random_cache(
                contexts, heads, block_size, torch.bfloat16, device, in_order=True
            )
            ordered_meta = ordered.metadata(query_lens)
            k, v = gathered(cache)
            dense = q.view(len(contexts), -1, heads.num, heads.dim).transpose(1, 2).contiguous()
            mask = create_block_mask(causal, None, None, contexts[0], contexts[0], device="cuda")
            flex = torch.compile(flex_attention)

            def sdpa() -> Tensor:
                with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                    return F.scaled_dot_product_attention(
                        dense, k, v, is_causal=True, enable_gqa=True
                    )

            return {
                "blocks in order": lambda: prefill_attention_triton(
                    q, ordered.kv, ordered_meta, scale=heads.scale, window=window
                ),
                "cuDNN, gathered": sdpa,
                "FlexAttention, gathered": lambda: flex(
                    dense, k, v, block_mask=mask, enable_gqa=True
                ),
            }

        return Timed(ours, 4 * heads.num * heads.dim * pairs, dense_peers if peers else dict)

    return Case(f"prefill, {name}", "matmul", goal, prepare)


def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """FlexAttention's mask."""
    return query >= key


def seen_pairs(queries: int, context: int, window: int) -> int:
    """Of a query and a key that it sees, in a row."""
    seen = range(context - queries + 1, context + 1)
    return sum(min(keys, window) if window else keys for keys in seen)


CHECKS = [
    check(Heads(4, 1, 128), 64, 0),
    check(Heads(4, 1, 128), 64, 70),
    check(Heads(16, 1, 256), 16, 0),
    check(Heads(2, 2, 80), 16, 100),
    check(Heads(3, 1, 64), 128, 0),
]
WHOLE = ([8192] * 2, [8192] * 2)
CASES = [
    case("2 x 8 Ki tokens", *WHOLE, 0.55, peers=True),
    case("chunk of 2 Ki at 32 Ki", [2048], [32768], 0.55),
    case("chunk of 2 Ki at 32 Ki, blocks of 16", [2048], [32768], 0.55, block_size=16),
    case("ragged, 64 x 256 at 2 Ki", [256] * 64, [2048] * 64, None),
    case("2 x 8 Ki tokens, window 1024", *WHOLE, None, window=1024),
    case("2 x 8 Ki tokens, head_dim 64", *WHOLE, None, heads=Heads(32, 8, 64)),
    *(
        case(
            f"2 x 8 Ki tokens, tiles of {tiling.queries} x {tiling.keys}, {tiling.num_warps} "
            f"warps, {tiling.num_stages} stages",
            *WHOLE,
            None,
            tiling=tiling,
        )
        for tiling in (Tiling(128, 128, 8, 2), Tiling(128, 64, 8, 2), Tiling(64, 64, 4, 2))
    ),
]
