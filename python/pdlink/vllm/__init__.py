"""vLLM's KV connectors, under the names that users choose.

    --kv-transfer-config '{"kv_connector": "PdlinkConnector", "kv_connector_module_path": "pdlink.vllm", "kv_role": ...}'

One source, made for vLLM 0.24 to 0.33 and both of its model runners. Every instance has one side: the scheduler's
(`scheduler`: which request is handed over or loaded) or a worker's (`worker`: block ids into the native runtime, ends out of
it). No byte is moved in Python, and nothing is waited for; only with `PUT` does a step begin when what is being pushed has
gone out.
"""

from .connector import NixlConnector, P2pNcclConnector, PdlinkConnector

__all__ = ["NixlConnector", "P2pNcclConnector", "PdlinkConnector"]
