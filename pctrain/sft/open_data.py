"""From the sources of a config to tokenised trajectories that every rank reads: made once, by processes of rank 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pctrain.common.errors import UserError
from pctrain.common.progress import progress
from pctrain.config.tree import Config, SourceConfig
from pctrain.data.build import Progress, TokenJob, build, folder_of
from pctrain.data.sources import list_files
from pctrain.data.store import TokenStore, is_finished
from pctrain.data.trajectories import Trajectories, source_names
from pctrain.distributed import parallel


@dataclass(frozen=True)
class Prepared:
    """Sources whose files are known, and where their tokens lie or will lie."""

    sources: Sequence[SourceConfig]
    jobs: list[TokenJob]
    folders: list[Path]

    @property
    def digests(self) -> dict[str, str]:
        """{path: what its tokens depend on: contents, tokenizer, template, policies}."""
        return {str(source.path): folder.name for source, folder in zip(self.sources, self.folders, strict=True)}


def prepare_sources(config: Config, sources: Sequence[SourceConfig], limit: int) -> Prepared:
    """Collective. Reads the files to know their contents, the first time; nothing is tokenised.

    Args:
        limit: most tokens of a trajectory.
    """
    return parallel.from_rank_zero(lambda: _prepare(config, sources, limit))


def _prepare(config: Config, sources: Sequence[SourceConfig], limit: int) -> Prepared:
    source_names(sources)  # refuses two of one name
    cache = cache_folder(config)
    jobs = [TokenJob(list_files(source.path), config.model.path, config.data, limit) for source in sources]
    return Prepared(sources, jobs, [folder_of(cache, job) for job in jobs])


def cache_folder(config: Config) -> Path:
    return config.data.cache or config.run.dir / "tokens"


def open_trajectories(prepared: Prepared, what: str) -> Trajectories:
    """Collective. Tokenises what is not there yet, with a progress bar. `what`: "training" or "validation"."""
    for job, folder in zip(prepared.jobs, prepared.folders, strict=True):
        if not parallel.from_rank_zero(lambda: is_finished(folder)):
            _build(job, folder, what)
    return parallel.agree(lambda: Trajectories(prepared.sources, [_open(folder) for folder in prepared.folders]))


def _build(job: TokenJob, folder: Path, what: str) -> None:
    with progress(f"tokenising {what}", total=1, unit="part", rank=parallel.rank()) as bar:

        def show(state: Progress) -> None:
            bar.resize(max(1, state.total))
            bar.advance(state.done - bar.done, records=state.records, tokens=state.tokens)

        parallel.follow_rank_zero(lambda: build(job, folder), show)


def _open(folder: Path) -> TokenStore:
    if not folder.is_dir():
        raise UserError(
            f"{folder}: rank {parallel.rank()} does not see what rank 0 wrote; set data.cache to a folder that all nodes share"
        )
    return TokenStore(folder)
