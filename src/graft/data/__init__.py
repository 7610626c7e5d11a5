"""Data: sources to rows (`rows`), to tokens (`template`), to batches (`collate`), and a look first (`report`).

Annotated data and models behind endpoints to instruction data: `recipe`, `make`.
"""
