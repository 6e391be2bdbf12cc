"""What one optimizer step reads: its captions' tokens and its recordings' vectors, made ready while another trains."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import numpy as np
from torch import Tensor

from text_to_audio.config import TrainingConfig
from text_to_audio.loading.batches import micro_batches
from text_to_audio.loading.captions import CaptionSet
from text_to_audio.loading.tokens import TokenCache, drop_sentences
from text_to_audio.loading.vectors import AudioVectors
from text_to_audio.model.text_encoder import TextEncoder
from text_to_audio.processes import Processes


@dataclass(frozen=True)
class StepData:
    """The B captions of one effective batch.

    captions: (B,) their numbers among all. rows: (B,) their recordings' rows. source: (B,) a number per source.
    parts: of each micro-batch, the positions in the batch. tokens: those of this process's micro-batches, by the
    micro-batch's number. vectors: space -> (B, dim) stored vectors of the recordings. token_count: tokens of all
    micro-batches, without and with padding.
    """

    captions: np.ndarray
    rows: np.ndarray
    source: np.ndarray
    parts: list[np.ndarray]
    tokens: dict[int, Tensor]
    vectors: dict[str, Tensor]
    token_count: tuple[int, int]

    def __len__(self) -> int:
        return len(self.captions)


class StepReader:
    """Makes `StepData` of batches, some steps ahead of the training in threads of its own.

    Reading mapped vectors and tokenising let other threads run, so that a slow disk is not waited for.
    """

    def __init__(
        self,
        config: TrainingConfig,
        text_encoder: TextEncoder,
        captions: CaptionSet,
        tokens: TokenCache,
        vectors: dict[str, AudioVectors],
        processes: Processes,
    ):
        self._config, self._text_encoder, self._processes = config, text_encoder, processes
        self._captions, self._tokens, self._vectors = captions, tokens, vectors
        self._one_tokeniser = Lock()  # it may be used by one thread at a time
        self._pin = config.torch_device.type == "cuda"  # copies from pinned memory do not hold the training up

    def read(self, step: int, batch: np.ndarray) -> StepData:
        """The data of one step (counted over the whole run), whose batch has these captions."""
        tokens, captions = self._tokens_of(step, batch)
        parts = list(micro_batches(captions, tokens.lengths, self._config.batch_size))
        lengths = [tokens.lengths[captions[part]] for part in parts]
        rows = self._captions.caption_audio[batch]
        return StepData(
            batch,
            rows,
            self._captions.caption_source[batch],
            parts,
            {number: self._ready(tokens.padded(captions[parts[number]])) for number in self._own(parts)},
            {name: self._ready(vectors[rows]) for name, vectors in self._vectors.items()},
            (int(sum(each.sum() for each in lengths)), int(sum(len(each) * each.max() for each in lengths))),
        )

    def ahead(self, first_step: int, batches: list[np.ndarray]) -> Iterator[StepData]:
        """The data of consecutive steps, in order."""
        workers = self._config.num_workers
        if not workers:
            yield from (self.read(first_step + i, batch) for i, batch in enumerate(batches))
            return
        waiting: deque[Future[StepData]] = deque()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="step-reader")
        try:
            for i, batch in enumerate(batches):
                waiting.append(pool.submit(self.read, first_step + i, batch))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _own(self, parts: list[np.ndarray]) -> list[int]:
        return self._processes.own(range(len(parts)))

    def _ready(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self._pin else tensor

    def _tokens_of(self, step: int, batch: np.ndarray) -> tuple[TokenCache, np.ndarray]:
        """Tokens of a batch's captions and the captions' numbers in them; made anew where sentences are dropped."""
        if not self._config.caption_dropout:
            return self._tokens, batch
        rng = np.random.default_rng((self._config.seed, step, 0, 1))
        texts = [drop_sentences(self._captions.captions[i], self._config.caption_dropout, rng) for i in batch]
        with self._one_tokeniser:
            return TokenCache(self._text_encoder, texts), np.arange(len(batch))
