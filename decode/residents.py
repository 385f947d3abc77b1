"""The sequences that decode runs: for which router, and until when. Pure state."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Resident:
    """Whom a sequence's tokens go to, and when it must be done."""

    router_id: str
    deadline: float
    admitted: float | None = None  # when, until its first token was told
    waited: float | None = None  # seconds for memory, if decode computes its prompt

    @property
    def awaits_first_token(self) -> bool:
        """Whether its next token is the first after a prompt that decode computes."""
        return self.admitted is not None and self.waited is not None

    def account(self, now: float) -> dict[str, float]:
        """Seconds of what came before its first token here; later nothing."""
        admitted, self.admitted = self.admitted, None
        if admitted is None:
            return {}
        if self.waited is None:
            return {"first_step": now - admitted}
        return {"grant": self.waited, "prefill": now - admitted}


class Residents:
    """Everything between admission and the last token, by request id."""

    def __init__(self) -> None:
        self._residents: dict[str, Resident] = {}

    def __len__(self) -> int:
        return len(self._residents)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._residents

    def add(self, request_id: str, resident: Resident) -> None:
        """A sequence was admitted."""
        self._residents[request_id] = resident

    def get(self, request_id: str) -> Resident:
        """Raises KeyError when the sequence is over."""
        return self._residents[request_id]

    def remove(self, request_id: str) -> None:
        """A sequence is over. Unknown ones are ignored."""
        self._residents.pop(request_id, None)

    def expired(self, now: float) -> list[str]:
        """Sequences past their deadline."""
        return [name for name, resident in self._residents.items() if now >= resident.deadline]

    def of_router(self, router_id: str) -> list[str]:
        """Sequences that a router waits for."""
        return [n for n, resident in self._residents.items() if resident.router_id == router_id]
