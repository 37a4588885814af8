"""The graph of a network, where its layers can be changed one by one."""

from torch import nn
from torch.fx import GraphModule, symbolic_trace


def traced(network: nn.Module) -> GraphModule | None:
    """Return the graph of a network as it is, train or eval mode; the modules in it are the network's own.

    Returns:
        None where tracing fails, or where a change to one layer would change more or be bypassed: hooks, a layer with
        weights that is called twice, weights that are read past their layer.
    """
    if any(module._forward_hooks or module._forward_pre_hooks for module in network.modules()):
        return None
    try:
        graph = symbolic_trace(network)
    except Exception:  # tracing runs the network's own code on symbols, which may fail in any way
        return None
    calls = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    weighty = [call for call in calls if any(True for _ in graph.get_submodule(call).state_dict())]
    read = {node.target.rpartition(".")[0] for node in graph.graph.nodes if node.op == "get_attr"}
    return None if len(set(weighty)) < len(weighty) or read & set(calls) else graph
