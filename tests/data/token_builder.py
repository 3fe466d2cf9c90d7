"""Builds tokens in a process that a test can kill: python token_builder.py CACHE HF_DIR CHUNK_BYTES WORKERS FILE ...

Prints "shards DONE/TOTAL" while it works, and the folder at the end.
"""

import sys
from pathlib import Path

from pctrain.config.tree import DataConfig
from pctrain.data import build as build_module
from pctrain.data.build import TokenJob, build, folder_of


def main():
    cache, hf_dir, chunk_bytes, workers, *files = sys.argv[1:]
    build_module.CHUNK_BYTES = int(chunk_bytes)
    job = TokenJob([Path(file) for file in files], Path(hf_dir), DataConfig(workers=int(workers)), 4096)
    folder = folder_of(Path(cache), job)
    for progress in build(job, folder):
        print(f"shards {progress.done}/{progress.total}", flush=True)
    print(folder, flush=True)


if __name__ == "__main__":  # worker processes import this module again
    main()
