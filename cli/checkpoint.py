"""What ``--model`` names: a local directory, a hub id, or the bundled demo model."""

from __future__ import annotations

from pathlib import Path

DEMO_MODEL = Path(__file__).parent / "demo_model"


def locate(model: str) -> str:
    """The directory or hub id to load."""
    return str(DEMO_MODEL) if model == "demo" else model


def served_name(model: str) -> str:
    """How the API names the model where nobody says otherwise."""
    return "kvferry-demo" if model == "demo" else model
