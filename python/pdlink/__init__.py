"""The link between prefill and decode.

The package holds the runtime as a native module, `pdlink.vllm` with the KV connectors that vLLM loads by name,
`pdlink.trainer` for whoever sends weights, and the `pdlink` command. Nothing here imports vLLM except `pdlink.vllm`.
"""

from ._native import PdlinkError, __version__

__all__ = ["PdlinkError", "__version__"]
