"""What the workers of `vllm serve` do for `VLLMServer` when all weights are passed. It runs on the server.

vllm serve … --worker-extension-cls rlhf_lightning.generation.vllm_worker.PolicyWorker
"""

from pathlib import Path
from typing import Protocol

from torch import nn

from rlhf_lightning.generation.vllm_weights import differing


class Worker(Protocol):
    """The methods of a worker of vLLM that are used."""

    def get_model(self) -> nn.Module:
        """The model."""

    def reload_weights(self, *, weights_path: str) -> None:
        """Load weights from a folder."""


class PolicyWorker:
    """Methods that vLLM adds to its workers."""

    def load_policy(self: Worker, folder: str) -> list[str]:
        """Load all weights, and compare them bit by bit unless the model is split over several workers.

        Args:
            folder: Folder with files of safetensors, with Hugging Face names.

        Returns:
            Names of the weights that the model does not hold as they are in the folder.
        """
        from vllm.distributed import get_tensor_model_parallel_world_size

        self.reload_weights(weights_path=folder)
        model = self.get_model()
        renew_heads(model)
        return [] if get_tensor_model_parallel_world_size() > 1 else differing(model, Path(folder))


def renew_heads(model: nn.Module) -> None:
    """Renew what vLLM prepared from a head that is tied to the embeddings; `reload_weights` skips it.

    Args:
        model: The model of vLLM.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)
