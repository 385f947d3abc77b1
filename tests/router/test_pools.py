"""The sizes of the pools: who changes its role, when nobody does, and how a change ends."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from protocol.errors import InvalidRequestError, RoleChangeRefusedError, WorkerNotFoundError
from protocol.messages import ChangeRole, Register, Role
from router.pools import ANSWER, Pools
from router.registry import Registry, Worker
from router.worker_states import WorkerState
from tests.router_scene import registration


class Scene:
    """Workers of one letter and a digit each; ``asked`` is what the pools said to whom."""

    def __init__(self, workers: Iterable[str]) -> None:
        self.now = 0.0
        self.registry = Registry(timeout=1e9)
        self.asked: list[tuple[str, Role]] = []
        self.pools = Pools(self.registry, self._send, lambda: self.now)
        for name in workers:
            self.join(registration(name))

    def _send(self, worker: Worker, message: ChangeRole) -> None:
        assert message.epoch == worker.info.epoch
        self.asked.append((worker.worker_id, message.role))

    def join(self, info: Register) -> None:
        self.registry.register(info.worker_id.encode(), info, self.now)

    def worker(self, name: str) -> Worker:
        worker = self.registry.named(name)
        assert worker is not None
        return worker

    def flips(self) -> list[tuple[str, str]]:
        return [(flip["worker"], flip["state"]) for flip in self.change()["flips"]]

    def change(self) -> dict[str, list[dict[str, str]]]:
        change: dict[str, list[dict[str, str]]] = self.pools.present()["change"]
        return change

    def answer(self, name: str, role: Role) -> None:
        self.registry.leave(name.encode(), role)

    def come_back(self, name: str, role: Role) -> None:
        info = self.worker(name).info
        self.join(info.model_copy(update={"role": role, "epoch": info.epoch + 1}))

    def serve(self, name: str, role: Role) -> None:
        """All that a worker does once it is asked."""
        self.answer(name, role)
        self.registry.end_role(name.encode(), role)
        self.come_back(name, role)
        self.pools.step()


def test_a_flip_goes_through_its_states() -> None:
    scene = Scene(["p0", "p1", "d0"])
    scene.pools.flip("p1", "decode")
    assert scene.worker("p1").state is WorkerState.DRAINING
    assert scene.asked == [("p1", "decode")]
    scene.pools.step()
    assert scene.asked == [("p1", "decode")] * 2, "the message may be lost: it is repeated"
    scene.answer("p1", "decode")
    scene.pools.step()
    assert len(scene.asked) == 2
    assert scene.flips() == [("p1", "draining")]
    scene.registry.end_role(b"p1", "decode")
    scene.pools.step()
    assert scene.flips() == [("p1", "flipping")]
    scene.now = 3.0
    scene.come_back("p1", "decode")
    scene.pools.step()
    assert scene.pools.present() == {
        "prefill": 1,
        "decode": 2,
        "change": {
            "prefill": 1,
            "decode": 2,
            "state": "done",
            "reason": None,
            "flips": [{"worker": "p1", "role": "decode", "state": "done", "seconds": 3.0}],
        },
    }


def test_the_least_loaded_workers_change_one_after_the_other() -> None:
    scene = Scene(["p0", "p1", "p2", "d0"])
    scene.worker("p0").load = scene.worker("p0").load.model_copy(update={"num_running": 2})
    scene.worker("p2").load = scene.worker("p2").load.model_copy(update={"num_waiting": 1})
    scene.pools.resize(1, 3)
    assert scene.flips() == [("p1", "draining")]
    scene.serve("p1", "decode")
    assert scene.flips() == [("p1", "done"), ("p2", "draining")]
    scene.serve("p2", "decode")
    scene.pools.step()
    assert scene.flips() == [("p1", "done"), ("p2", "done")]
    assert scene.change()["state"] == "done"
    scene.pools.resize(1, 3)
    assert scene.change()["state"] == "done"


def test_a_worker_that_joins_meanwhile_changes_nothing() -> None:
    scene = Scene(["p0", "p1", "d0"])
    scene.pools.resize(1, 2)
    scene.join(registration("p9"))
    scene.serve("p0", "decode")
    scene.pools.step()
    assert scene.flips() == [("p0", "done")]


@pytest.mark.parametrize(
    ("workers", "flipped", "reason"),
    [
        (["p0", "d0"], "p0", "the last that serves prefill"),
        (["p0", "d0", "d1"], "p0", "the last that serves prefill"),
        (["p0", "p1", "d0"], "d0", "the last that serves decode"),
    ],
)
def test_no_pool_becomes_empty(workers: list[str], flipped: str, reason: str) -> None:
    scene = Scene(workers)
    with pytest.raises(RoleChangeRefusedError, match=reason):
        scene.pools.flip(flipped, "decode" if flipped[0] == "p" else "prefill")
    assert scene.asked == []
    assert scene.pools.present()["change"] is None


def test_workers_that_leave_do_not_keep_a_pool_alive() -> None:
    scene = Scene(["p0", "p1", "d0"])
    scene.registry.leave(b"p1")
    with pytest.raises(RoleChangeRefusedError, match="the last"):
        scene.pools.flip("p0", "decode")
    with pytest.raises(RoleChangeRefusedError, match="p1 is leaving"):
        scene.pools.flip("p1", "decode")


def test_workers_whose_kv_fits_nobody_do_not_count() -> None:
    scene = Scene(["p0", "d0"])
    info = registration("p1")
    other = info.fingerprint.model_copy(update={"weights_digest": "11"})
    scene.join(info.model_copy(update={"fingerprint": other}))
    with pytest.raises(RoleChangeRefusedError, match="whose KV fits"):
        scene.pools.flip("p0", "decode")


def test_one_change_at_a_time() -> None:
    scene = Scene(["p0", "p1", "p2", "d0", "d1"])
    scene.pools.flip("p0", "decode")
    with pytest.raises(RoleChangeRefusedError, match="under way"):
        scene.pools.flip("p1", "decode")
    with pytest.raises(RoleChangeRefusedError, match="under way"):
        scene.pools.resize(1, 4)
    scene.serve("p0", "decode")
    scene.answer("d1", "prefill")  # another router asked it
    with pytest.raises(RoleChangeRefusedError, match="d1 is draining"):
        scene.pools.flip("p1", "decode")


def test_what_makes_no_sense_is_refused() -> None:
    scene = Scene(["p0", "p1", "d0"])
    with pytest.raises(WorkerNotFoundError, match="p9"):
        scene.pools.flip("p9", "decode")
    with pytest.raises(RoleChangeRefusedError, match="prefill already"):
        scene.pools.flip("p0", "prefill")
    with pytest.raises(InvalidRequestError, match="empty"):
        scene.pools.resize(3, 0)
    with pytest.raises(InvalidRequestError, match="are 4, but 3 serve"):
        scene.pools.resize(2, 2)


def test_a_worker_that_does_not_answer_serves_on() -> None:
    scene = Scene(["p0", "p1", "d0"])
    scene.pools.flip("p0", "decode")
    scene.now = ANSWER + 1
    scene.pools.step()
    assert scene.change()["reason"] == f"worker p0 did not answer for {ANSWER:g} s"
    assert scene.worker("p0").state is WorkerState.SERVING


def test_a_change_ends_when_its_worker_is_lost_leaves_or_comes_back_as_it_was() -> None:
    for end, reason in (
        (lambda scene: scene.registry.remove(b"p0"), "worker p0 was lost"),
        (lambda scene: scene.registry.leave(b"p0"), "worker p0 is leaving"),
        (lambda scene: scene.come_back("p0", "prefill"), "worker p0 came back as prefill"),
    ):
        scene = Scene(["p0", "p1", "p2", "p3", "d0"])
        scene.pools.resize(2, 3)
        end(scene)
        scene.pools.step()
        scene.pools.step()
        assert scene.change()["reason"] == reason
        assert scene.flips() == [("p0", "failed")]
        assert scene.asked == [("p0", "decode")]


def test_the_rest_of_a_change_is_given_up_when_it_would_empty_a_pool() -> None:
    scene = Scene(["p0", "p1", "p2", "d0"])
    scene.pools.resize(1, 3)
    scene.registry.remove(b"p2")
    scene.serve("p0", "decode")
    assert "the last that serves prefill" in str(scene.change()["reason"])
    assert scene.flips() == [("p0", "done")]
