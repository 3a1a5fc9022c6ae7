"""Where the clone is: tests that read its files, or start programs in it, do not count folders upward themselves."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
