"""Folders and files of the repository."""

import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
PARITY = ROOT / "tests" / "parity"
DIGITS = str(ROOT / "configs" / "digits.py")
