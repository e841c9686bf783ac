"""Random numbers of training by position: an iteration and a sample are seeded by their place in the run.

So a resumed run draws what the uninterrupted one would have drawn, whatever was drawn before and by whichever worker.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from mmengine.hooks import Hook
from torch.utils.data import DataLoader, Dataset

NO_BATCH = 'train_dataloader gives no batch: its data set is empty or smaller than batch_size'


class SeedHook(Hook):
    """Seeds every training iteration by its number."""

    priority = 'VERY_HIGH'

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        seed_generators(runner.seed, runner.rank, runner.iter)


def seed_generators(seed: int, *position: int, seed_torch: Callable[[int], object] = torch.manual_seed) -> None:
    """Seed the global generators of Python, NumPy and PyTorch by a position in a run.

    Args:
        seed (int): of the run.
        position (int): any number of ints that tell what is seeded.
        seed_torch (Callable): seeds PyTorch, by default on all devices.
    """
    words = np.random.SeedSequence(seed, spawn_key=position).generate_state(4)
    random.seed(words.tobytes())
    np.random.seed(words)
    seed_torch(int(words[:2].view(np.uint64)[0]))


def check_batches(loader: DataLoader) -> None:
    """Raise a ValueError if the length of a data loader says that it gives no batch."""
    if len(loader) == 0:
        raise ValueError(NO_BATCH)


def number_batches(loader: DataLoader, seeds: tuple[int, int], first: int, skip: int, endless: bool) -> None:
    """Make a data loader seed every sample by the number of its batch in the run, and by its place in the batch.

    Args:
        loader (DataLoader): of training, before it is iterated.
        seeds (tuple[int]): seed of the run, rank of the process.
        first (int): number of the first batch.
        skip (int): how many batches of the sampler come before it; their samples are not loaded.
        endless (bool): whether the loader starts again at the end of the data.
    """
    object.__setattr__(loader, 'batch_sampler', NumberedBatches(loader.batch_sampler, first, skip, endless))
    if hasattr(loader.dataset, '__dict__'):  # a list has none, and draws no random numbers
        loader.dataset.__getitems__ = SeededSamples(loader.dataset, seeds)


class _Batch(list):
    """Indices of samples, with the number of the batch."""

    number: int


class NumberedBatches:
    """A batch sampler whose batches know their number. Its other attributes are those of the wrapped one.

    Args:
        batches (Iterable[list[int]]): the wrapped batch sampler.
        number (int): number of the first batch that it yields.
        skip (int): how many batches it skips first.
        endless (bool): whether it starts again at the end, in the sampler's next epoch.
    """

    def __init__(self, batches, number: int = 0, skip: int = 0, endless: bool = False):
        self.batches = batches
        self.number = number
        self.skip = skip
        self.endless = endless

    def __getattr__(self, name):
        if name == 'batches':  # while it is copied
            raise AttributeError(name)
        return getattr(self.batches, name)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        skip, self.skip = self.skip, 0
        for indices in itertools.islice(self._passes(), skip, None):
            batch = _Batch(indices)
            batch.number = self.number
            self.number += 1
            yield batch

    def _passes(self):
        if not self.endless:
            yield from self.batches
            return
        sampler = getattr(self.batches, 'sampler', None)
        for epoch in itertools.count():
            if hasattr(sampler, 'set_epoch'):
                sampler.set_epoch(epoch)
            batch = None
            for batch in self.batches:
                yield batch
            if batch is None:
                raise ValueError(NO_BATCH)


class SeededSamples:
    """Loads the samples of a batch, each with random numbers of its own, in a worker or in the main process.

    Args:
        dataset (Dataset): of training.
        seeds (tuple[int]): seed of the run, rank of the process.
    """

    def __init__(self, dataset: Dataset, seeds: tuple[int, int]):
        self.dataset = dataset
        self.load_batch = getattr(dataset, '__getitems__', None)
        self.seeds = seeds

    def __call__(self, batch: Sequence[int]) -> list:
        if self.load_batch is not None:  # the data set loads whole batches itself
            self._seed(getattr(batch, 'number', None), 0)
            return self.load_batch(batch)
        return [self._load(index, getattr(batch, 'number', None), place) for place, index in enumerate(batch)]

    def _load(self, index, number, place):
        self._seed(number, place)
        return self.dataset[index]

    def _seed(self, number, place):
        if number is not None:  # else the batch is of another loader of the same data
            seed_generators(*self.seeds, number, place, seed_torch=torch.default_generator.manual_seed)
