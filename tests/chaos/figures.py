"""What one play of a scenario showed, and many plays together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.chaos.asks import Reference
from tests.chaos.clients import CANCELLED, FINISHED, Stream


@dataclass
class Figures:
    """One play. Times in seconds; None where the scenario has no such moment."""

    streams: int = 0
    open_then: int | None = None  # of them, when the disturbance came
    disturbed_after: float | None = None  # from the first stream's opening
    longest_wait: float | None = None  # for a token, of the streams that finished
    longest_gap: tuple[float, int] = 0.0, 0  # in a finished stream, see Stream.longest_gap
    aim: float | None = None  # for that gap, where there is one
    recovery: float | None = None  # from the disturbance's end to full service, or to all freed
    tokens_compared: int = 0
    tokens_wrong: int = 0
    ties: int = 0  # streams in which rounding decided, see Reference.is_tie
    blocks_leaked: int = 0
    errors: Counter[str] = field(default_factory=Counter)  # what clients saw, by kind
    allowed: frozenset[str] = frozenset()  # of these kinds; others break the promise
    broken: list[str] = field(default_factory=list)  # promises that did not hold
    evidence: list[str] = field(default_factory=list)  # what helps to see why they did not

    def require(self, holds: bool, promise: str) -> None:
        """Note a broken promise unless it holds."""
        if not holds:
            self.broken.append(promise)

    def compare(
        self, streams: Sequence[Stream], answers: Sequence[Sequence[int]], reference: Reference
    ) -> None:
        """Hold ended streams against undisturbed answers.

        Whatever was streamed before an error or a cancel must be the answer's beginning. After a
        tie, which rounding decides, all that is compared is how many tokens there are.
        """
        for stream, answer in zip(streams, answers, strict=True):
            self.streams += 1
            finished = stream.ending == FINISHED
            expected = answer if finished else answer[: len(stream.token_ids)]
            pairs = list(zip(stream.token_ids, expected, strict=False))
            same = next((i for i, (got, wanted) in enumerate(pairs) if got != wanted), len(pairs))
            if same < len(pairs) and reference.is_tie(stream.ask, answer[:same], pairs[same][0]):
                self.ties += 1
                pairs = pairs[:same]
            self.tokens_compared += len(pairs)
            self.tokens_wrong += sum(got != wanted for got, wanted in pairs)
            self.tokens_wrong += abs(len(stream.token_ids) - len(expected))
            if finished:
                self.longest_wait = max(self.longest_wait or 0.0, stream.longest_wait)
                self.longest_gap = max(self.longest_gap, stream.longest_gap)
            elif stream.ending != CANCELLED:
                self.errors[stream.ending] += 1
        self.require(self.tokens_wrong == 0, "clients got wrong tokens")
        unexpected = sorted(set(self.errors) - self.allowed)
        self.require(not unexpected, f"clients saw {', '.join(unexpected)}")


@dataclass
class Row:
    """A scenario's plays added up, or why it was skipped."""

    plays: list[Figures] = field(default_factory=list)
    skipped: str = ""

    def cells(self) -> list[str]:
        """As text, one for each of ``HEADINGS``."""
        if not self.plays:
            return ["0", *["-"] * (len(HEADINGS) - 2), f"skipped: {self.skipped}"]
        open_then = [p.open_then for p in self.plays if p.open_then is not None]
        moments = [p.disturbed_after for p in self.plays if p.disturbed_after is not None]
        waits = [p.longest_wait for p in self.plays if p.longest_wait is not None]
        gaps = [(p.longest_gap[0], p.aim) for p in self.plays if p.aim is not None]
        gap, aim = max(gaps, key=lambda pair: pair[0] / pair[1], default=(0.0, 0.0))
        recoveries = [p.recovery for p in self.plays if p.recovery is not None]
        errors: Counter[str] = sum((p.errors for p in self.plays), Counter())
        broken = Counter(promise for p in self.plays for promise in p.broken)
        compared = f"{sum(p.tokens_compared for p in self.plays)}"
        compared += f", {sum(p.tokens_wrong for p in self.plays)} wrong"
        if ties := sum(p.ties for p in self.plays):
            compared += f", ties x {ties}"
        return [
            str(len(self.plays)),
            str(sum(p.streams for p in self.plays)),
            f"{min(open_then)} to {max(open_then)}" if open_then else "-",
            f"{min(moments):.2f} to {max(moments):.2f}" if moments else "-",
            f"{max(waits):.1f}" if waits else "-",
            f"{gap:.1f} ({aim:.1f})" if gaps else "-",
            f"{max(recoveries):.1f}" if recoveries else "-",
            compared,
            str(sum(p.blocks_leaked for p in self.plays)),
            listed(errors) or "none",
            listed(broken) or "held",
        ]


HEADINGS = (
    "seeds",
    "streams",
    "open then",
    "disturbed after, s",
    "longest wait, s",
    "gap (aim), s",
    "recovery, s",
    "tokens compared",
    "blocks leaked",
    "errors seen",
    "promise",
)


def listed(counts: Counter[str]) -> str:
    """``kind x 3, other x 1``, or nothing."""
    return ", ".join(f"{kind} x {count}" for kind, count in sorted(counts.items()))
