"""New weights for vLLM's workers while they serve.

    VLLM_SERVER_DEV_MODE=1 vllm serve ... --worker-extension-cls pdlink.vllm.weights.WeightsExtension

Each rank stages and checks what the proxy offers it, natively and beside the engine. Rank 0 (`lead`) then has its own API server
pause the engine, tells all ranks to load, by `/collective_rpc`, which runs between two steps on each of them (`rank`), and has
the engine go on. Tensors go through vLLM's own layer-wise reload, as views of what was staged (`load`).
"""

from .extension import WeightsExtension

__all__ = ["WeightsExtension"]
