"""What the workers of `vllm serve` do for `VLLMServer` when all weights are passed. It runs on the server.

vllm serve … --worker-extension-cls rlhf_lightning.generation.vllm_worker.PolicyWorker
"""

from typing import Protocol

from torch import nn


class Worker(Protocol):
    """The methods of a worker of vLLM that are used."""

    def get_model(self) -> nn.Module:
        """The model."""

    def reload_weights(self, *, weights_path: str) -> None:
        """Load weights from a folder."""


class PolicyWorker:
    """Methods that vLLM adds to its workers."""

    def load_policy(self: Worker, folder: str) -> None:
        """Load all weights.

        Args:
            folder: Folder with files of safetensors, with Hugging Face names.
        """
        self.reload_weights(weights_path=folder)
        renew_heads(self.get_model())


def renew_heads(model: nn.Module) -> None:
    """Renew what vLLM prepared from a head that is tied to the embeddings; `reload_weights` skips it.

    Args:
        model: The model of vLLM.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)
