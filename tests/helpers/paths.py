"""Folders of real data."""

from pathlib import Path

SHARED = Path(__file__).resolve().parents[3] / "shared"
CHAT_TEMPLATES = Path(__file__).parents[1] / "data" / "chat_templates"
"""Real ones, for every reader of the repository; see the README there."""
