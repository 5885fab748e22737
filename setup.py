"""Turns a Python of 32 bits away before pip begins to compile what has no wheels for it. All else is in setup.cfg."""

import sys

if sys.maxsize < 1 << 32:
    sys.exit(
        "edge-runtime needs a 64-bit system: this Python has 32 bits, for which onnxruntime has no wheels. "
        "A Raspberry Pi 3, 4, 5 or Zero 2 runs the 64-bit Raspberry Pi OS"
    )
from setuptools import setup

setup()
