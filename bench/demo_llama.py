"""Llama in plain torch, for training the demo model: short, exact in names and layout.

The parameters carry Hugging Face's published names, so a checkpoint is a dump of the state dict.
No cache, no kernels: kvferry's own engine serves the result and shares no code with this file.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig:
    """The architecture, under the keys that config.json publishes."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5


class Attention(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.c, kv = c, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, kv, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, kv, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [batch, length, hidden]; cos and sin [length, head_dim]."""

        def rotate(h: Tensor) -> Tensor:  # [batch, heads, length, head_dim]
            first, second = h.chunk(2, dim=-1)
            return (h * cos + torch.cat((-second, first), dim=-1) * sin).to(h.dtype)

        def split(h: Tensor) -> Tensor:
            return h.view(*h.shape[:2], -1, self.c.head_dim).transpose(1, 2)

        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        group = self.c.num_attention_heads // self.c.num_key_value_heads
        k, v = rotate(k).repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = F.scaled_dot_product_attention(rotate(q), k, v, is_causal=True)
        projected: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return projected


class Mlp(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(c), Mlp(c)
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Body(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)


class Llama(nn.Module):
    """Llama with tied embeddings; its state dict has Hugging Face's names and layout."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.c, self.model = c, Body(c)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [batch, length] -> logits [batch, length, vocabulary]."""
        half = torch.arange(0, self.c.head_dim, 2) / self.c.head_dim
        angles = torch.outer(torch.arange(tokens.shape[1]), self.c.rope_theta**-half).repeat(1, 2)
        x, cos, sin = self.model.embed_tokens(tokens), angles.cos(), angles.sin()
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)

    @torch.inference_mode()
    def complete(self, tokenizer: Tokenizer, prompt: str, eos: str, limit: int = 120) -> str:
        """Greedy decoding without a cache, up to the eos token or `limit` tokens."""
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        start, eos_id = len(ids), tokenizer.token_to_id(eos)
        while len(ids) < start + limit and ids[-1] != eos_id:
            ids.append(int(self(torch.tensor([ids]))[0, -1].argmax()))
        return str(tokenizer.decode(ids[start:]))
