"""Blocks that travel in 8 bits: what arrives, and who agrees on it.

What every transfer promises is tested of them in ``test_conformance``.
"""

from __future__ import annotations

import pytest
import torch

from kernels.wire_quantization import Format, PackedLayout, dequantize_blocks, quantize_blocks
from kvtransfer.arena import Arena, packed_layout
from kvtransfer.events import BlocksSent, MessageRefused
from kvtransfer.inproc import InProcessNetwork
from protocol.errors import ConfigError
from protocol.geometry import Fingerprint, KVGeometry, WireQuantization
from tests.kvtransfer.peers import packed_layout_of, spawner, transfer

SMALL = 512  # bytes of a row


def fingerprint(kind: WireQuantization, block_size: int = 16) -> Fingerprint:
    geometry = KVGeometry(
        num_kv_heads=2, num_layers=3, block_size=block_size, head_dim=64, dtype="bfloat16"
    )
    return Fingerprint(weights_digest="", rope="", geometry=geometry, wire_quantization=kind)


def test_quantised_rows_arrive_as_their_round_trip() -> None:
    """Of numbers that 8 bits do not hold exactly; blocks side by side are packed too."""
    with spawner("inproc, int8") as spawn:
        sender, receiver = spawn(8, SMALL), spawn(8, SMALL)
        numbers = torch.randn(8, SMALL // 2, generator=torch.Generator().manual_seed(0))
        sender.rows.copy_(numbers.bfloat16().view(torch.uint8))
        layout = packed_layout_of(SMALL)
        packed = torch.empty(4, layout.row_bytes, dtype=torch.uint8)
        expected = torch.zeros(8, SMALL // 2, dtype=torch.bfloat16)
        digests = quantize_blocks(numbers.bfloat16(), [2, 3, 4, 5], layout, packed)
        dequantize_blocks(packed, [1, 2, 3, 4], layout, expected)
        receiver.thread.open_grant(1, [1, 2, 3, 4])
        sender.thread.send_blocks(receiver.address, 1, 0, [2, 3, 4, 5], [1, 2, 3, 4])
        assert list(receiver.received(1, 4).values()) == digests
        assert sender.expect(BlocksSent).digests == digests
        assert torch.equal(receiver.rows[1:5], expected[1:5].view(torch.uint8))


def test_mapped_memory_is_copied_as_it_is() -> None:
    with spawner("auto, int8") as spawn:
        sender, receiver = spawn(8, SMALL), spawn(8, SMALL)
        sender.rows.random_(generator=torch.Generator().manual_seed(0))
        transfer(sender, receiver, 1, [7, 1, 2], [0, 4, 3])
        assert sender.thread.snapshot().bytes_sent == 3 * SMALL
        assert receiver.thread.snapshot().bytes_received == 3 * SMALL


@pytest.mark.parametrize("quantized", ["sender", "receiver"])
def test_one_end_that_quantises(quantized: str) -> None:
    """The fingerprints keep such workers apart; if nothing did, no byte would be taken for KV."""
    network = InProcessNetwork()
    kinds = {"sender": "inproc", "receiver": "inproc"} | {quantized: "inproc, int8"}
    with spawner(kinds["sender"], network) as one, spawner(kinds["receiver"], network) as other:
        sender, receiver = one(8, SMALL), other(8, SMALL)
        before = receiver.rows.clone()
        receiver.thread.open_grant(7, [1, 2, 3])
        sender.thread.send_blocks(receiver.address, 7, 0, [1, 2, 3], [1, 2, 3])
        assert receiver.expect(MessageRefused) == MessageRefused(7, "wrong_length")
        assert torch.equal(receiver.rows, before)


@pytest.mark.parametrize(("kind", "keys"), [("int8", "int8"), ("fp8", "e4m3")])
def test_the_layout_that_a_fingerprint_asks_for(kind: WireQuantization, keys: Format) -> None:
    layout = PackedLayout(2 * 3 * 2, 16, 64, keys)
    assert packed_layout(fingerprint(kind)) == layout
    assert fingerprint(kind).wire_bytes == layout.row_bytes


def test_no_layout_without_quantisation() -> None:
    assert packed_layout(fingerprint("none")) is None


def test_blocks_that_cannot_be_quantised() -> None:
    with pytest.raises(ConfigError, match=r"int8: .* multiples of 8, got 12 and 64"):
        packed_layout(fingerprint("int8", block_size=12))


def test_a_layout_of_other_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="rows of 256 elements do not fit"):
        Arena(torch.zeros(4, 256, dtype=torch.bfloat16), packed_layout_of(2 * SMALL))
