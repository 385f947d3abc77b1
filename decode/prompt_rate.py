"""How fast decode computes prompts beside the tokens that it generates. Pure state."""

from __future__ import annotations

from engine.rate import MEMORY, Rate

LEAST_SHARE = 0.1  # of a step's time that always counts as its prompts'


class PromptRate:
    """Prompt tokens a second, of the time that prompts add to steps.

    A step that only generates shows what a step takes without any prompt.
    """

    def __init__(self) -> None:
        self._rate = Rate()
        self._generating = 0.0  # seconds of a step that only generates

    @property
    def tokens_per_second(self) -> float:
        """0 until a step with prompt tokens has been measured."""
        return self._rate.per_second

    def step(self, num_prompt_tokens: int, num_generating: int, seconds: float) -> None:
        """A step has computed so many prompt tokens beside one token each of some sequences."""
        if num_prompt_tokens == 0:
            known = self._generating or seconds
            self._generating = MEMORY * known + (1 - MEMORY) * seconds
            return
        spared = self._generating if num_generating else 0.0
        self._rate.add(num_prompt_tokens, max(seconds - spared, LEAST_SHARE * seconds))
