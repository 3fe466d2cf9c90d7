"""From the sources of a config to tokenized trajectories that every rank reads. Processes of rank 0 make them once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pctrain.common.errors import UserError
from pctrain.common.progress import progress
from pctrain.config.tree import ResolvedConfig, SourceConfig
from pctrain.data.build import Progress, TokenJob, build, folder_of
from pctrain.data.sources import list_files
from pctrain.data.store import TokenStore, is_finished
from pctrain.data.trajectories import Trajectories, source_names
from pctrain.distributed import parallel


@dataclass(frozen=True)
class Prepared:
    """Sources whose files are known, and the folders that have, or will have, their tokens."""

    sources: Sequence[SourceConfig]
    jobs: list[TokenJob]
    folders: list[Path]

    @property
    def digests(self) -> dict[str, str]:
        """The digests, by path, of what a source's tokens depend on: contents, tokenizer, template, policies."""
        return {str(source.path): folder.name for source, folder in zip(self.sources, self.folders, strict=True)}


def prepare_sources(config: ResolvedConfig, sources: Sequence[SourceConfig], limit: int) -> Prepared:
    """Find the files of the sources and their token folders; nothing is tokenized. Collective.

    `limit` is the most tokens of a trajectory. The first call on a file reads it, for its digest.
    """
    return parallel.from_rank_zero(lambda: _prepare(config, sources, limit))


def _prepare(config: ResolvedConfig, sources: Sequence[SourceConfig], limit: int) -> Prepared:
    source_names(sources)  # refuses two sources with the same name
    cache = cache_folder(config)
    jobs = [TokenJob(list_files(source.path), config.model.path, config.data, limit) for source in sources]
    return Prepared(sources, jobs, [folder_of(cache, job) for job in jobs])


def cache_folder(config: ResolvedConfig) -> Path:
    """Return the folder of the token folders."""
    return config.data.cache or config.run.dir / "tokens"


def open_trajectories(prepared: Prepared, purpose: str) -> Trajectories:
    """Tokenize what is not there yet, with a progress bar, and open it. `purpose` is the bar's label. Collective."""
    for job, folder in zip(prepared.jobs, prepared.folders, strict=True):
        if not _is_finished(folder):
            _build(job, folder, purpose)
    return parallel.agree(lambda: Trajectories(prepared.sources, [_open(folder) for folder in prepared.folders]))


def _is_finished(folder: Path) -> bool:
    return parallel.from_rank_zero(lambda: is_finished(folder))


def _build(job: TokenJob, folder: Path, purpose: str) -> None:
    with progress(f"tokenizing {purpose}", total=1, unit="part", rank=parallel.rank()) as bar:

        def show(state: Progress) -> None:
            bar.resize(max(1, state.total))
            bar.advance(state.done - bar.done, records=state.records, tokens=state.tokens)

        def work() -> Iterator[Progress]:
            return build(job, folder)

        parallel.follow_rank_zero(work, show)


def _open(folder: Path) -> TokenStore:
    if not folder.is_dir():
        raise UserError(
            f"{folder}: rank {parallel.rank()} does not see the tokens that rank 0 wrote. Set data.cache to a folder "
            "that all nodes share"
        )
    return TokenStore(folder)
