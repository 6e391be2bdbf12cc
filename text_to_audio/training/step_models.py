"""What a training step works with: the models of a run, its queue and its optimizer; nothing that reads or measures."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from text_to_audio.config import TrainingConfig
from text_to_audio.loading.step_data import StepData
from text_to_audio.loss.bank import AudioBank
from text_to_audio.loss.gradient_caching import seed_dropout
from text_to_audio.loss.objective import Candidates, Features, contrastive_objective
from text_to_audio.loss.text_queue import TextQueue
from text_to_audio.model.head import ProjectionHead
from text_to_audio.model.temperature import Temperature
from text_to_audio.model.text_encoder import TextEncoder
from text_to_audio.processes import Processes


@dataclass(kw_only=True)
class SpaceModels:
    """What a step needs of one audio space. config: the settings of a run of this space alone."""

    config: TrainingConfig
    projection: ProjectionHead
    temperature: Temperature
    bank: AudioBank | None

    @property
    def name(self) -> str:
        """The audio encoder's name."""
        return self.config.audio_encoder

    @torch.no_grad()
    def candidates(self, data: StepData, queue: TextQueue) -> Candidates:
        """What a batch's texts and recordings are compared with here."""
        vectors = data.vectors[self.name].to(self.projection.mean.device, non_blocking=True)
        queued = None
        if len(queue):
            self.projection.eval()  # old embeddings, but through the head as it is now
            texts = self.projection.project_text(queue.embeddings)
            self.projection.train()
            queued = texts, torch.from_numpy(data.source[:, None] == queue.source).to(texts.device)
        return Candidates(self.projection.standardise_audio(vectors), data.rows, self.bank, queued)

    def loss(self, embeddings: Tensor, data: StepData, numbers: list[int], candidates: Candidates) -> Tensor:
        """The objective of sentence embeddings (texts, text_dim) of the micro-batches `numbers`, in this space."""
        parts = [data.parts[number] for number in numbers]
        text = self.projection.project_text(embeddings)
        return contrastive_objective(Features(text, parts, candidates), parts, self.temperature(), self.config)


@dataclass(kw_only=True)
class StepModels:
    """What a step needs of a run. step: how many were taken."""

    config: TrainingConfig
    processes: Processes
    text_encoder: TextEncoder
    spaces: Sequence[SpaceModels]
    queue: TextQueue
    optimizer: AdamW
    step: int = 0

    def modules(self) -> Iterator[nn.Module]:
        """Everything that is trained: the text encoder, then each space's head and temperature."""
        yield self.text_encoder
        for space in self.spaces:
            yield from (space.projection, space.temperature)

    def embed(self, data: StepData, number: int) -> Tensor:
        """Sentence embeddings (texts, text_dim) of a micro-batch; called again in a step, it draws the same dropout."""
        seed_dropout(self.config.seed, self.step, number)
        return self.text_encoder.encode(data.tokens[number])

    def losses(self, embeddings: Tensor, data: StepData, numbers: list[int], candidates: list[Candidates]) -> Tensor:
        """Each space's mean loss, (spaces,), of the embeddings of these micro-batches, one after the other."""
        seed_dropout(self.config.seed, self.step, len(data.parts) + numbers[0])
        pairs = zip(self.spaces, candidates, strict=True)
        return torch.stack([space.loss(embeddings, data, numbers, those) for space, those in pairs])
