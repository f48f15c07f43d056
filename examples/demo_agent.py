"""The agent of `demo.py`: two tools with side effects and a function-calling loop.

Started by the demo, which gives the addresses in the environment. With `--guard` one line differs.
"""

import json
import os
import sys
from collections.abc import Callable

from local_services import post
from openai import DefaultHttpxClient, OpenAI
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolUnionParam

from ledger import current, guard, idempotency_key, tell_model

Tools = dict[str, Callable[..., str]]

#: How long the agent waits for the payment service.
PATIENCE_SECONDS = 1.0
#: How often the model may be asked before the agent gives up.
MAX_TURNS = 12


def charge_card(order_id: str, amount: float, currency: str) -> str:
    """Charge the card of an order; returns the number of the receipt."""
    # Every run of one call has the same key, also in the next process: that is how the payment
    # service knows a charge that it has taken already. (Without the guard there is no such key.)
    headers = {"Idempotency-Key": idempotency_key()} if current() else {}
    charge = {"order_id": order_id, "amount": amount, "currency": currency}
    reply = post(os.environ["PAYMENTS_URL"], charge, headers=headers, seconds=PATIENCE_SECONDS)
    return f"paid, receipt {reply['receipt']}"


def send_email(to: str, subject: str) -> str:
    """Send a mail to a customer."""
    post(os.environ["MAILS_URL"], {"to": to, "subject": subject}, seconds=10)
    return "sent"


def parameters(**types: str) -> dict[str, object]:
    """The JSON schema of a tool's parameters, all of them required."""
    properties = {name: {"type": type_name} for name, type_name in types.items()}
    return {"type": "object", "properties": properties, "required": list(types)}


SCHEMAS: list[ChatCompletionToolUnionParam] = [
    {
        "type": "function",
        "function": {
            "name": "charge_card",
            "description": "Charge the card of an order",
            "parameters": parameters(order_id="string", amount="number", currency="string"),
        },
    },
    {
        "type": "function",
        "function": {
            "name": "send_email",
            "description": "Send a mail to a customer",
            "parameters": parameters(to="string", subject="string"),
        },
    },
]


def run_agent(task: str, tools: Tools) -> str:
    """Let the model work on `task` with `tools` until it has nothing more to ask for."""
    # A proxy that the environment names must not be asked for loopback.
    client = OpenAI(timeout=10, http_client=DefaultHttpxClient(trust_env=False))
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": task}]
    for _ in range(MAX_TURNS):
        reply = client.chat.completions.create(model="local", messages=messages, tools=SCHEMAS)
        message = reply.choices[0].message
        messages.append(message.to_dict())  # type: ignore[arg-type]  # the reply, sent back as it is
        for call in message.tool_calls or []:
            if call.type == "function":
                answer = run_tool(tools, call.function.name, call.function.arguments)
                messages.append({"role": "tool", "tool_call_id": call.id, "content": answer})
        if not message.tool_calls:
            return message.content or ""
    raise RuntimeError(f"the model still asks for tools after {MAX_TURNS} turns")


def run_tool(tools: Tools, name: str, arguments: str) -> str:
    """Run one tool; the model is told an error in words, as agent frameworks do."""
    try:
        answer = tools[name](**json.loads(arguments))
    except Exception as error:  # noqa: BLE001  # the model is told every error in words
        answer = f"error: {error}"
    print(f"  {name:<12} {' '.join(map(str, json.loads(arguments).values())):<40} → {answer}")
    return answer


def main() -> None:
    """Work on the open orders, with the guard if that is asked for."""
    # A killed process loses what it has not flushed, and the demo is about a killed process.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    tools: Tools = {"charge_card": charge_card, "send_email": send_email}
    if "--guard" in sys.argv:
        tools = guard.wrap_tools(tools, blocked_return=tell_model)
    print(f"  {run_agent('Charge the open orders and confirm each by mail.', tools)}")


if __name__ == "__main__":
    main()
