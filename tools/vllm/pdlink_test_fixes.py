"""A vLLM plugin for tests: several workers with vLLM's own NixlConnector on few cores. Does nothing but on CPU.

Each process of vLLM loads it through the entry point group `vllm.general_plugins`.

- NIXL's Python API gives its progress thread a delay of 0: each agent burns a core from its creation on. With 1 ms it
  sleeps, and is woken by events all the same.
- NixlConnector's worker pins itself to the last core of each NUMA node: two workers of one host then share that core. With
  no topology to see it pins nothing.
"""

PROGRESS_DELAY_US = 1000


def register() -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    type(current_platform).discover_numa_topology = classmethod(lambda cls: [])

    import vllm.distributed.nixl_utils as nixl_utils

    load = nixl_utils._load_nixl_attr

    def load_with_delay(name):
        import sys

        found = load(name)
        bind = getattr(sys.modules.get("nixl._api"), "nixlBind", None)
        if bind is not None and not hasattr(bind, "agent_without_delay"):
            bind.agent_without_delay = bind.nixlAgent

            def agent(agent_name, config):
                config.pthrDelay = PROGRESS_DELAY_US
                return bind.agent_without_delay(agent_name, config)

            bind.nixlAgent = agent
        return found

    nixl_utils._load_nixl_attr = load_with_delay
