"""One thread for every test: tiny models gain nothing from more, and two busy processes would slow each other tenfold."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
