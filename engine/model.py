"""The transformer, one for all families, over the paged KV arena.

Computes one step's tokens of any mix of sequences: writes their keys and values into the arena
and returns logits where a token is to be sampled. Holds no state but weights and rope tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.profiling import profiled, span
from engine.rope import rope_table
from engine.weights import LayerWeights, ModelWeights
from kernels.attention_metadata import AttentionMetadata
from kernels.cpu import library
from kernels.cpu.decoder_layers import DecoderLayers, is_packed
from kernels.decode_attention import decode_attention
from kernels.linear import Weight, embedding, linear
from kernels.prefill_attention import prefill_attention
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rotate_and_write import rotate_and_write
from kernels.silu_mul import silu_mul


@dataclass(frozen=True, slots=True)
class StepInput:
    """One step's tokens: those of rows with a single new token first, then all others."""

    token_ids: Tensor  # int64 [tokens]
    positions: Tensor  # int64 [tokens]
    slots: Tensor  # int64 [tokens]: block * block_size + offset, where the token's KV goes
    sampled: Tensor  # int64 [sampled]: indices of the tokens that need logits
    num_decode: int  # rows with a single new token
    decode: AttentionMetadata | None  # of those rows; None when there are none
    prefill: AttentionMetadata | None  # of the other rows; None when there are none


class Model:
    """``forward`` runs on the device that holds the weights."""

    def __init__(
        self, config: ModelConfig, weights: ModelWeights[Weight], max_model_len: int
    ) -> None:
        self.config = config
        self.max_model_len = max_model_len
        self._weights = weights
        self._scale = config.head_dim**-0.5
        cos, sin = rope_table(config.rope, config.head_dim, max_model_len)
        self._cos = cos.to(weights.norm.device)  # [max_model_len, head_dim / 2]
        self._sin = sin.to(weights.norm.device)
        self._native = self._native_layers()

    def forward(self, step: StepInput, kv: Tensor) -> Tensor:
        """Logits of the sampled tokens, float32 [sampled, vocab]; ``kv`` as in ``hidden``."""
        return self.logits(self.hidden(step, kv))

    def logits(self, hidden: Tensor) -> Tensor:
        """Of final hidden states [tokens, hidden]: float32 [tokens, vocab]."""
        if len(hidden) == 0:  # chunks in the middle of their prompts
            return hidden.new_empty((0, self.config.vocab_size), dtype=torch.float32)
        return linear(hidden, self._weights.head).float()

    def hidden(self, step: StepInput, kv: Tensor) -> Tensor:
        """The final hidden states of the sampled tokens, [sampled, hidden].

        ``kv`` is the arena, [blocks, kv heads, layers, 2, block_size, head_dim]; the step's slots
        are written.
        """
        cos, sin = self._cos[step.positions], self._sin[step.positions]
        residual = embedding(step.token_ids, self._weights.embed)  # [tokens, hidden]
        # Who profiles a step wants to see its parts.
        native = None if step.prefill is not None or profiled() else self._native
        if native is not None and step.decode is not None:
            branch = native(residual, cos, sin, step.slots, kv, step.decode)
        else:
            branch, residual = self._layers(residual, cos, sin, step, kv)
        if len(step.sampled) == 0:
            return residual[:0]
        eps = self.config.rms_norm_eps
        x, _ = add_rms_norm(branch[step.sampled], residual[step.sampled], self._weights.norm, eps)
        return x

    def _native_layers(self) -> DecoderLayers | None:
        """What computes decode steps on a CPU; None where layers are computed part by part."""
        config, layers = self.config, self._weights.layers
        if config.head_dim > library.MAX_HEAD_DIM or not all(map(is_packed, layers)):
            return None
        native = library.load()
        if native is None:
            return None
        return DecoderLayers(
            native, layers, config.windows, eps=config.rms_norm_eps, scale=self._scale
        )

    def _layers(
        self,
        residual: Tensor,  # [tokens, hidden]
        cos: Tensor,  # [tokens, head_dim / 2]
        sin: Tensor,
        step: StepInput,
        kv: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """What the last layer adds to the residual, and that, [tokens, hidden] each."""
        eps = self.config.rms_norm_eps
        branch: Tensor | None = None  # what the last block adds to the residual
        for index, layer in enumerate(self._weights.layers):
            if branch is None:
                x = rms_norm(residual, layer.attention_norm, eps)
            else:
                x, residual = add_rms_norm(branch, residual, layer.attention_norm, eps)
            x = self._attention(x, layer, cos, sin, step, kv[:, :, index], index)
            x, residual = add_rms_norm(x, residual, layer.mlp_norm, eps)
            branch = linear(silu_mul(linear(x, layer.gate_up)), layer.down)
        assert branch is not None
        return branch, residual

    def _attention(
        self,
        x: Tensor,  # [tokens, hidden]
        layer: LayerWeights[Weight],
        cos: Tensor,  # [tokens, head_dim / 2]
        sin: Tensor,
        step: StepInput,
        kv_layer: Tensor,  # [blocks, kv heads, 2, block_size, head_dim]
        index: int,
    ) -> Tensor:
        config = self.config
        qkv = linear(x, layer.qkv, layer.qkv_bias)
        q = rotate_and_write(
            qkv, layer.q_norm, layer.k_norm, config.rms_norm_eps, cos, sin, kv_layer, step.slots
        )  # [tokens, heads, head_dim]

        # Every row's KV is written: a row reads its own blocks, new tokens included.
        window, parts = config.windows[index], []
        with span("attention"):
            if step.decode is not None:
                queries = q[: step.num_decode]
                parts.append(
                    decode_attention(
                        queries, kv_layer, step.decode, scale=self._scale, window=window
                    )
                )
            if step.prefill is not None:
                queries = q[step.num_decode :]
                parts.append(
                    prefill_attention(
                        queries, kv_layer, step.prefill, scale=self._scale, window=window
                    )
                )
        attended = parts[0] if len(parts) == 1 else torch.cat(parts)
        return linear(attended.flatten(1), layer.output)
