"""What routers know of the workers' caches: the messages, what they lose, and what follows."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest

from engine import cache_feed
from engine.block_pool import BlockPool
from engine.cache_feed import CacheFeed
from engine.sequence import Sequence
from protocol.hashing import HASH_BYTES, block_key
from protocol.messages import (
    CacheChanges,
    FirstToken,
    PrefillRequest,
    SendCache,
    Tokens,
    TokenUpdate,
)
from protocol.sampling import SamplingParams
from router.cached_blocks import CachedBlocks, PromptPrefix
from router.generation import GenerationRequest
from tests.router_scene import Scene, registration

FINGERPRINT = registration("p0").fingerprint
BLOCK = FINGERPRINT.geometry.block_size
ONE, FEW = SamplingParams(max_tokens=1), SamplingParams(max_tokens=9)


def compute(pool: BlockPool, tokens: list[int], cache_salt: str = "") -> int:
    """Let the pool cache a prompt; tokens that it had."""
    prompt = Sequence("r", tokens, len(tokens), ONE, cache_salt=cache_salt)
    assert pool.reserve(prompt, prompt.num_cacheable)
    prompt.num_computed = len(tokens)
    pool.publish(prompt, 0)
    pool.release_sequence(prompt)
    return prompt.num_cached


def messages(feed: CacheFeed) -> Iterator[CacheChanges]:
    while (message := feed.take()) is not None:
        yield message


def findable(pool: BlockPool) -> set[int]:
    return set(map(block_key, pool.findable()))


@pytest.mark.parametrize("seed", range(5))
def test_lost_messages_are_noticed_and_made_good(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_feed, "MAX_CHANGES", 5)
    random, pool = Random(seed), BlockPool(12, BLOCK)
    feed, known = CacheFeed(pool), CachedBlocks()
    num_asked = 0
    for _ in range(400):
        compute(pool, [random.randrange(3) for _ in range(random.randrange(1, 30))])
        message = feed.take()
        if message is not None and random.random() < 0.9 and not known.apply(message):
            num_asked += 1
            feed.restart()
    assert num_asked > 5
    if not all(known.apply(message) for message in messages(feed)):
        feed.restart()
    assert all(known.apply(message) for message in messages(feed))
    assert known.keys == findable(pool)


def test_a_router_that_comes_late_gets_everything_and_one_that_is_away_costs_no_memory() -> None:
    random, pool = Random(0), BlockPool(8, BLOCK)
    feed = CacheFeed(pool)
    for _ in range(100):
        compute(pool, [random.randrange(1000) for _ in range(20)])
        assert len(feed._findable) <= 2 * pool.num_blocks
    feed.restart()
    [snapshot] = messages(feed)
    assert (snapshot.number, snapshot.evicted) == (0, b"")
    known = CachedBlocks()
    assert known.apply(snapshot)
    assert known.keys == findable(pool)
    assert feed.take() is None


def test_a_block_that_comes_and_goes_between_two_messages_is_not_stored() -> None:
    feed = CacheFeed(BlockPool(4, BLOCK))
    assert feed.take() == CacheChanges(number=0, stored=b"", evicted=b"")
    name = bytes(range(HASH_BYTES))
    feed.stored(name, 0)
    feed.evicted(name)
    assert feed.take() == CacheChanges(number=1, stored=b"", evicted=name[:8])


@pytest.mark.parametrize("cache_salt", ["", "tenant"])
def test_the_router_names_blocks_as_workers_do(cache_salt: str) -> None:
    tokens = list(range(4 * BLOCK))
    pool = BlockPool(8, BLOCK, FINGERPRINT.block_salt)
    compute(pool, tokens, cache_salt)
    known = CachedBlocks()
    feed = CacheFeed(pool)
    feed.restart()
    assert all(known.apply(message) for message in messages(feed))
    for length, blocks in ((4 * BLOCK, 3), (4 * BLOCK + 1, 4), (BLOCK, 0), (1, 0), (0, 0)):
        keys = PromptPrefix([*tokens, 0][:length], cache_salt)(FINGERPRINT)
        assert known.leading(keys) == len(keys) == blocks
    other = PromptPrefix(tokens, "other")(FINGERPRINT)
    assert known.leading(other) == 0


class Pools:
    """Real block pools behind the workers of some routers, which are told of them by hand."""

    def __init__(self, *workers: str, routers: int = 1) -> None:
        self.scenes = [Scene(*workers) for _ in range(routers)]
        self.pools = {w: BlockPool(64, BLOCK, FINGERPRINT.block_salt) for w in workers}
        self.feeds = [{w: CacheFeed(pool) for w, pool in self.pools.items()} for _ in self.scenes]

    def tell(self) -> None:
        for scene, feeds in zip(self.scenes, self.feeds, strict=True):
            for worker, feed in feeds.items():
                for message in messages(feed):
                    scene.say(worker, message)
                scene.beat(worker)

    def serve(self, scene: Scene, number: int, tokens: list[int]) -> tuple[str, int]:
        """One request to its end: its prefill worker, and how many tokens that had cached."""
        scene.wire.sent.clear()
        scene.dispatch(GenerationRequest(f"{number}", tokens, ONE))
        [(peer, asked)] = scene.wire.sent
        assert isinstance(asked, PrefillRequest)
        cached = compute(self.pools[peer.decode()], tokens)
        first = FirstToken(
            request_id=asked.request_id,
            index=0,
            token_id=1,
            finish_reason="length",
            num_cached_tokens=cached,
        )
        scene.say(peer.decode(), first)
        return peer.decode(), cached


def chat(user: int, turn: int) -> list[int]:
    return [user] * (3 * BLOCK * (turn + 1))


def test_three_routers_send_a_chat_where_its_prefix_is() -> None:
    pools = Pools("p0", "p1", "p2", "d0", routers=3)
    pools.tell()
    random, homes = Random(0), {}
    found = prompts = 0
    for turn in range(6):
        for user in range(6):
            scene = random.choice(pools.scenes)
            worker, cached = pools.serve(scene, 10 * turn + user, chat(user, turn))
            assert homes.setdefault(user, worker) == worker
            found += cached
            prompts += len(chat(user, turn)) if turn else 0
            pools.tell()
    assert len(set(homes.values())) == 3
    assert found >= prompts / 2  # all of each former turn but its last block
    predicted = sum(s.count("router_predicted_cached_tokens") for s in pools.scenes)
    assert predicted == found == sum(s.count("router_found_cached_tokens") for s in pools.scenes)


def first_token(attempt: str, token_id: int) -> FirstToken:
    return FirstToken(
        request_id=attempt,
        index=0,
        token_id=token_id,
        finish_reason=None,
        num_cached_tokens=0,
    )


def say_turn(scene: Scene, request_id: str, prompt: list[int], *answer: int) -> tuple[str, str]:
    """One request to its end; its prefill and decode worker."""
    scene.wire.sent.clear()
    sampling = SamplingParams(max_tokens=len(answer))
    scene.dispatch(GenerationRequest(request_id, prompt, sampling))
    [(peer, asked)] = scene.wire.sent
    assert isinstance(asked, PrefillRequest)
    assert asked.decode is not None
    attempt = asked.request_id
    scene.say(peer.decode(), first_token(attempt, answer[0]))
    rest = TokenUpdate(
        request_id=attempt, index=1, token_ids=list(answer[1:]), finish_reason="length"
    )
    scene.say(asked.decode.worker_id, Tokens(updates=[rest]))
    return peer.decode(), asked.decode.worker_id


def test_a_turn_that_comes_before_the_workers_reports_goes_where_the_last_one_was() -> None:
    scene = Scene("p0", "p1", "d0", "d1")
    prompt, answer = list(range(2 * BLOCK)), [7] * (BLOCK + 1)
    home = say_turn(scene, "first", prompt, *answer)
    prompt += [*answer, 8]
    decode = next(w for w in scene.dispatcher._members.registry.all() if w.worker_id == home[1])
    keys = PromptPrefix(prompt)(FINGERPRINT)
    assert decode.cached.leading(keys) == len(keys) == 3  # the prompt's and the answer's
    assert say_turn(scene, "second", prompt, *answer) == home
    for worker in home:
        scene.beat(worker)  # they tell of nothing: it was evicted at once
    assert decode.cached.leading(keys) == 0
    assert say_turn(scene, "third", prompt, *answer) != home


def test_a_prompt_follows_one_like_it_whose_kv_is_on_its_way_to_decode() -> None:
    scene = Scene("p0", "d0", "d1")
    for number in range(3):
        scene.dispatch(GenerationRequest(f"{number}", list(range(4 * BLOCK)), FEW))
        scene.say("p0", first_token(f"{number}#1", 7))
    asked = scene.wire.to("p0", PrefillRequest)
    assert [request.decode.worker_id for request in asked] == ["d0"] * 3


@pytest.mark.parametrize(("count", "computed"), [(8, 1), (16, 2)])
def test_prompts_that_begin_alike_go_together_until_their_own_tokens_are_too_many(
    count: int, computed: int
) -> None:
    """Each has 1 of 17 tokens for itself: the first worker takes as many as half the others."""
    scene = Scene("p0", "p1", "d0")
    workers = scene.dispatcher._members.registry.serving("prefill")
    for number in range(count):
        scene.dispatch(GenerationRequest(f"{number}", [*range(4 * BLOCK), number], ONE))
        for worker in workers:  # they tell of no block while they compute
            queued = sum(a.prompt_tokens for a in worker.assigned.values())
            scene.beat(worker.worker_id, scene.load.model_copy(update={"waiting_tokens": queued}))
    tokens = [a.prompt_tokens for w in workers for a in w.assigned.values()]
    assert sorted(tokens) == [1] * (count - computed) + [4 * BLOCK + 1] * computed


def test_a_prompt_that_ended_on_a_worker_is_cached_there_only_if_the_worker_tells_so() -> None:
    scene = Scene("p0", "p1", "d0")
    tokens = list(range(4 * BLOCK))
    scene.dispatch(GenerationRequest("0", tokens, FEW))
    worker, keys = scene.dispatcher._members.registry.named("p0"), PromptPrefix(tokens)(FINGERPRINT)
    assert worker is not None
    scene.beat("p0")
    assert worker.cached.leading(keys) == 3
    scene.say("p0", first_token("0#1", 7))
    assert worker.cached.leading(keys) == 3
    scene.beat("p0")
    assert worker.cached.leading(keys) == 0


def test_a_continued_prompt_is_named_as_the_whole() -> None:
    for length in range(4 * BLOCK):
        for answered in range(2 * BLOCK):
            tokens = list(range(length + answered))
            made = PromptPrefix(tokens[:length], "s").continued(FINGERPRINT, tokens[length:])
            assert made == PromptPrefix(tokens, "s")(FINGERPRINT)


def test_what_a_router_knows_of_a_worker_ends_with_its_session() -> None:
    pools = Pools("p0", "p1", "d0")
    [scene], [feeds] = pools.scenes, pools.feeds
    pools.tell()
    home, _ = pools.serve(scene, 0, chat(1, 3))
    pools.tell()
    rows = {row["id"]: row["cached_blocks"] for row in scene.dispatcher.workers()}
    assert rows[home] == len(findable(pools.pools[home]))
    scene.say(home, registration(home, session=1))
    assert all(row["cached_blocks"] == 0 for row in scene.dispatcher.workers())
    feeds[home].restart()
    pools.tell()
    assert scene.metrics.get_sample_value("kvferry_router_cached_blocks") == rows[home]


def test_a_gap_is_asked_for_once_more() -> None:
    scene = Scene("p0")
    scene.say("p0", CacheChanges(number=0, stored=bytes(16), evicted=b""))
    scene.say("p0", CacheChanges(number=2, stored=bytes(8), evicted=b""))
    assert scene.wire.to("p0", SendCache) == [SendCache()]
    assert scene.count("router_cache_resyncs") == 1
    scene.say("stranger", CacheChanges(number=2, stored=bytes(8), evicted=b""))
    assert scene.count("router_cache_resyncs") == 1
