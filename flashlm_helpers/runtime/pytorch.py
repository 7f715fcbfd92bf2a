"""PyTorch itself as a runtime: it needs nothing else, and is the reference for the others."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor, nn

from flashlm_helpers.config import FlashLMError
from flashlm_helpers.corpus import TextSource
from flashlm_helpers.evaluation import token_nats
from flashlm_helpers.generation import Prompts, Sampling, Story, stream_by_reading
from flashlm_helpers.mixers import State
from flashlm_helpers.quantization import freeze_ternary
from flashlm_helpers.vocab import Vocabulary


class PyTorchModel:
    """A network in PyTorch with its vocabulary: the LanguageModel that is trained.

    network: a FlashLM, or anything with its hidden(), head(), token_nll() and `config`. It may be
    trained on: every call rounds its ternary weights anew.
    source: the text it was trained on. bfloat16: whether token_nats() computes matmuls in it
    (None: where the processor has it); writing is always in float32.
    Raises FlashLMError if network and vocabulary do not belong together.
    """

    runtime = "torch"

    def __init__(
        self,
        network: nn.Module,
        vocabulary: Vocabulary,
        source: TextSource | None = None,
        bfloat16: bool | None = None,
    ):
        known = network.config.vocabulary_size
        if len(vocabulary) != known:
            raise FlashLMError(
                f"the model knows {known} ids and the vocabulary has {len(vocabulary)}: "
                "use the vocabulary the model was trained with"
            )

        # Nothing is copied here, so the model follows its network when that trains on.
        self.network = network
        self.vocabulary = vocabulary
        self.source = source
        self.bfloat16 = bfloat16

    def token_nats(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the negative log-likelihood, in nats, of every id but the first (float64)."""
        return token_nats(self.network, sequences, self.bfloat16)

    def write(self, prompts: Prompts, sampling: Sampling) -> list[Story]:
        """Write one story for each prompt."""
        *_, stories = self.stream(prompts, sampling)
        return stories

    def stream(self, prompts: Prompts, sampling: Sampling) -> Iterator[list[Story]]:
        """Write the same stories, and yield them after each token, grown in place."""
        # Rounded at each call, which takes a few tokens' time: a copy kept here would grow stale.
        frozen = freeze_ternary(self.network)

        def read(ids: Tensor, states: list[State] | None) -> tuple[Tensor, list[State]]:
            hidden, states = frozen.hidden(ids, states)
            return frozen.head(hidden[:, -1]).float(), states

        return stream_by_reading(read, prompts, sampling)
