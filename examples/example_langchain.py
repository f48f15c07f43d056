"""LangChain and LangGraph: wrap the raw functions first, then build the tools from them.

The model asks for the same charge twice in one turn, and once more in the next one with a new
tool-call id. The guard runs it once; with `replay=True` each duplicate gets the first answer, also
the one that comes while the charge is still running. A wrapped function keeps its signature, its
types and its docstring, so the model sees the same schema.

Runs without an account: agent, tools and messages are the real packages, only the model is a fake.
"""

import os
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from langchain_core.language_models import BaseChatModel, GenericFakeChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolCall, ToolMessage
from langchain_core.tools import BaseTool, StructuredTool
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from typing_extensions import override

from ledger import guard

CHARGES: list[str] = []


def charge_card(order_id: str, amount: float) -> dict[str, str]:
    """Charge the card of an order.

    Args:
        order_id: the order to charge
        amount: how much, in euros
    """
    time.sleep(0.2)
    CHARGES.append(order_id)
    return {"receipt": f"r-{len(CHARGES)}", "amount": f"{amount:.2f} EUR"}


class FakeModel(GenericFakeChatModel):
    """Says the messages that it was made with, one after the other."""

    @override
    def bind_tools(self, tools: Sequence[object], **kwargs: object) -> "FakeModel":
        return self


def ask() -> ToolCall:
    """The same charge with a new tool-call id, as models ask for it."""
    arguments = {"order_id": "A-1001", "amount": 99.0}
    return ToolCall(name="charge_card", args=arguments, id=f"call_{uuid.uuid4().hex[:8]}")


def build_tools(functions: list[Callable[..., Any]]) -> list[BaseTool]:
    """Guard the functions, then make LangChain tools of them: in this order."""
    return [StructuredTool.from_function(f) for f in guard.wrap_tools(functions, replay=True)]


def build_agent(model: BaseChatModel, tools: Sequence[BaseTool]) -> Any:
    """The usual loop of LangGraph: ask the model, run its tools, ask again."""
    bound = model.bind_tools(tools)

    def ask_model(state: MessagesState) -> dict[str, list[BaseMessage]]:
        return {"messages": [bound.invoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    graph.add_node("model", ask_model)
    graph.add_node("tools", ToolNode(tools))
    graph.add_edge(START, "model")
    graph.add_conditional_edges("model", tools_condition)
    graph.add_edge("tools", "model")
    return graph.compile()


def main() -> None:
    """Let the agent charge one order for which its model asks three times."""
    path = os.environ.get("LEDGER_DB") or f"{tempfile.mkdtemp(prefix='ledger-')}/ledger.db"
    guard.persist(path)
    guard.workflow(f"request-{uuid.uuid4().hex[:8]}")

    turns = [
        AIMessage("", tool_calls=[ask(), ask()]),
        AIMessage("", tool_calls=[ask()]),
        AIMessage("Order A-1001 is paid."),
    ]
    agent = build_agent(FakeModel(messages=iter(turns)), build_tools([charge_card]))
    messages = agent.invoke({"messages": [HumanMessage("Charge order A-1001.")]})["messages"]

    for message in messages:
        if isinstance(message, ToolMessage):
            print(f"  {message.tool_call_id} gets {message.content}")
    print(messages[-1].content)
    print(f"charges: {len(CHARGES)}")
    guard.log()
    print(f"ledger.db: {path}")


if __name__ == "__main__":
    main()
