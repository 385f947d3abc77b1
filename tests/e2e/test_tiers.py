"""Workers whose pools are too small for what they are asked, with a disk below them.

Real processes; every answer is held against transformers, and the metrics show that the prefixes
came from the disk: tokens are counted as computed, and KV as moved, once only.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.checkpoints import CHECKPOINTS, reference_greedy, write_checkpoint
from tests.stack import Stack, eventually

pytestmark = pytest.mark.slow

B = 16  # tokens in a block
NEW = 8  # tokens generated
LENGTH = 20 * B + 3
BLOCKS = 48  # of a worker with a disk: two of these prompts
NUM_PROMPTS = 6
WORKER = ["--dtype", "float32", "--block-size", str(B), "--max-model-len", str(BLOCKS * B)]
TOLD = 1.0  # seconds in which workers have told their router what they hold


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(CHECKPOINTS["llama"], tmp_path_factory.mktemp("tiers") / "llama")


def prompts(count: int = NUM_PROMPTS) -> list[list[int]]:
    rng = random.Random("tiers")
    return [[rng.randrange(250) for _ in range(LENGTH)] for _ in range(count)]


def with_disk(directory: Path) -> list[str]:
    """Options of a worker."""
    disk = ["--kv-disk-dir", str(directory), "--kv-disk-size", "64MiB"]
    return ["--num-kv-blocks", str(BLOCKS), *disk]


def ask(stack: Stack, prompt: list[int], new: int = NEW) -> tuple[list[int], int]:
    """The answer's tokens and how many of the prompt's were cached."""
    body = {
        "model": "test",
        "prompt": prompt,
        "max_tokens": new,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    answer = stack.client.post("/v1/completions", json=body).raise_for_status().json()
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return answer["choices"][0]["token_ids"], cached


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_evicted_prefixes_come_back_and_outlive_the_worker(
    checkpoint: Path, tmp_path: Path, role: str
) -> None:
    """In a pool of their own, or beside decode where there is no prefill pool."""
    options = with_disk(tmp_path / "kv")
    asked = prompts()
    expected = [reference_greedy(checkpoint, prompt, NEW) for prompt in asked]
    full = LENGTH // B  # blocks of a prompt
    with Stack(
        checkpoint,
        worker=WORKER,
        prefill=[options] if role == "prefill" else [],
        decode=[["--num-kv-blocks", "400"] if role == "prefill" else options],
    ) as stack:

        def saved(blocks: int) -> bool:
            return stack.metrics(role)["kvferry_kv_tier_blocks{tier=disk}"] >= blocks

        for round_ in range(2):
            for number, (prompt, tokens) in enumerate(zip(asked, expected, strict=True)):
                assert ask(stack, prompt) == (tokens, full * B if round_ else 0)
                assert eventually(lambda: saved(full * (number + 1)), 20)  # noqa: B023
        metrics = stack.metrics(role)
        assert metrics["kvferry_kv_tier_restored_total"] >= full * (NUM_PROMPTS - 2)
        computed = metrics["kvferry_prompt_tokens_computed_total"]
        assert computed == NUM_PROMPTS * (LENGTH + LENGTH % B)
        stack.assert_idle()

        worker = stack.processes.pop(f"{role}-0")
        worker.kill()
        worker.wait()
        others = 1 if role == "prefill" else 0
        stack.wait_for_workers(others)
        stack.start_worker(role, f"{role}-0", options)
        stack.wait_for_workers(others + 1)
        assert stack.metrics(role)["kvferry_kv_tier_blocks{tier=disk}"] == full * NUM_PROMPTS
        for prompt, tokens in zip(asked, expected, strict=True):
            assert ask(stack, prompt) == (tokens, full * B)
        metrics = stack.metrics(role)
        assert metrics["kvferry_kv_tier_restored_total"] == full * NUM_PROMPTS
        assert metrics["kvferry_prompt_tokens_computed_total"] == NUM_PROMPTS * (LENGTH % B)
        stack.assert_idle()


def held_by(stack: Stack, role: str, blocks: int) -> bool:
    """Whether the disks below a pool come to hold so many blocks."""
    name = "kvferry_kv_tier_blocks{tier=disk}"
    return eventually(lambda: stack.metrics(role)[name] >= blocks, 20)


class Moves:
    """What decode received since the last look, and what its disk brought back, in blocks."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._before = self._now()

    def take(self) -> tuple[float, float]:
        before, self._before = self._before, self._now()
        received, restored = (now - then for now, then in zip(self._before, before, strict=True))
        return received, restored

    def _now(self) -> tuple[float, float]:
        metrics = self._stack.metrics("decode")
        received = metrics["kvferry_kv_transfer_bytes_total{direction=received}"]
        restored = metrics["kvferry_kv_tier_restored_total"]
        return received / metrics["kvferry_kv_block_bytes"], restored


def test_what_decode_has_on_its_disk_does_not_travel_again(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Nor what it generated itself; also after it was killed."""
    new = B  # tokens of an answer: one block more
    options = with_disk(tmp_path / "kv")
    chats = prompts(4)
    on_disk = [0] * len(chats)  # blocks
    with Stack(
        checkpoint, worker=WORKER, prefill=[["--num-kv-blocks", "400"]], decode=[options]
    ) as stack:
        for turn in range(3):
            if turn == 2:
                worker = stack.processes.pop("decode-0")
                worker.kill()
                worker.wait()
                stack.wait_for_workers(1)
                stack.start_worker("decode", "decode-0", options)
                stack.wait_for_workers(2)
            moves, nothing_old_moved = Moves(stack), False
            for number, chat in enumerate(chats):
                answer, _ = ask(stack, chat, new)
                assert answer == reference_greedy(checkpoint, chat, new)
                received, restored = moves.take()
                assert received == -(-len(chat) // B) - restored
                assert restored <= on_disk[number]
                nothing_old_moved |= restored == on_disk[number]
                on_disk[number] = (len(chat) + new - 1) // B  # the last token has no KV
                assert held_by(stack, "decode", sum(on_disk))
                chats[number] = [*chat, *answer, 1, 2, 3, 4, 5]
            # The first ones measure how fast the disk is: of theirs all but a few blocks may move.
            assert nothing_old_moved
            stack.assert_idle()


def test_a_prompt_goes_where_a_disk_has_it(checkpoint: Path, tmp_path: Path) -> None:
    """Two workers have evicted every prompt; each is looked for where it was computed."""
    asked = prompts(10)
    with Stack(
        checkpoint,
        worker=WORKER,
        prefill=[with_disk(tmp_path / name) for name in ("a", "b")],
        decode=[["--num-kv-blocks", "400"]],
    ) as stack:
        for number, prompt in enumerate(asked, 1):
            assert ask(stack, prompt)[1] == 0
            assert held_by(stack, "prefill", number * (LENGTH // B))
        for prompt in [*asked[1:], *asked[:1]]:  # another order than that of taking turns
            time.sleep(TOLD)
            assert ask(stack, prompt)[1] == LENGTH // B * B
        assert stack.metrics("prefill")["kvferry_kv_tier_restored_total"] == 10 * (LENGTH // B)
        stack.assert_idle()


def test_two_workers_do_not_share_a_directory(checkpoint: Path, tmp_path: Path) -> None:
    options = with_disk(tmp_path)
    with Stack(checkpoint, worker=WORKER, prefill=[], decode=[options]) as stack:
        stack.start_worker("decode", "decode-1", options)
        second = stack.processes.pop("decode-1")
        assert second.wait(60) == 1
        owner = stack.processes["decode-0"].pid
        assert f"is in use by process {owner}" in stack.log("decode-1")
        assert "Traceback" not in stack.log("decode-1")
        assert ask(stack, prompts()[0])[1] == 0
