"""OpenAI function calling: the whole conversation is retried, the mail goes out once.

The model's server is overloaded after the tool has run. The usual answer is to start the request
again, and the model, which remembers nothing, asks for the same mail again. The guard answers with
"already done at …" (`tell_model`), because a model that reads `null` tries once more.

Runs without an account: the real client talks to a small model server on loopback. For the real
one, leave out `base_url` and `http_client`.
"""

import json
import os
import tempfile
import uuid
from collections.abc import Callable

from local_services import ScriptedModel, serve
from openai import APIStatusError, DefaultHttpxClient, OpenAI
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolUnionParam

from ledger import guard, tell_model

OUTBOX: list[str] = []
REQUEST_ATTEMPTS = 3
MAX_TURNS = 10


def send_email(to: str, subject: str) -> dict[str, str]:
    """Send a mail."""
    OUTBOX.append(f"{subject} → {to}")
    return {"status": "sent", "to": to}


# The line that matters: the model's tools go through the guard.
TOOLS: dict[str, Callable[..., object]] = guard.wrap_tools(
    {"send_email": send_email}, blocked_return=tell_model
)

SCHEMAS: list[ChatCompletionToolUnionParam] = [
    {
        "type": "function",
        "function": {
            "name": "send_email",
            "description": "Send a mail",
            "parameters": {
                "type": "object",
                "properties": {"to": {"type": "string"}, "subject": {"type": "string"}},
                "required": ["to", "subject"],
            },
        },
    }
]


def converse(client: OpenAI, task: str) -> str:
    """The function-calling loop: run what the model asks for until it only talks."""
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": task}]
    for _ in range(MAX_TURNS):
        reply = client.chat.completions.create(model="local", messages=messages, tools=SCHEMAS)
        message = reply.choices[0].message
        if not message.tool_calls:
            return message.content or ""
        messages.append(message.to_dict())  # type: ignore[arg-type]  # the reply, as it came
        for call in message.tool_calls:
            if call.type == "function":
                content = run_tool(call.function.name, call.function.arguments)
                messages.append({"role": "tool", "tool_call_id": call.id, "content": content})
    raise RuntimeError(f"the model still asks for tools after {MAX_TURNS} turns")


def run_tool(name: str, arguments: str) -> str:
    """Run one tool and put its answer, or its error, in words for the model."""
    try:
        content = json.dumps(TOOLS[name](**json.loads(arguments)), ensure_ascii=False)
    except Exception as error:  # noqa: BLE001  # the model is told every error in words
        content = f"error: {error}"
    print(f"  model asks {name}{arguments}: {content}")
    return content


def converse_with_retries(client: OpenAI, task: str) -> str:
    """Start the conversation again when the model's server fails."""
    for attempt in range(1, REQUEST_ATTEMPTS + 1):
        try:
            return converse(client, task)
        except APIStatusError as error:
            print(f"  attempt {attempt} failed: {error.status_code}")
    raise RuntimeError(f"no answer in {REQUEST_ATTEMPTS} attempts")


def main() -> None:
    """Answer one request of a user."""
    path = os.environ.get("LEDGER_DB") or f"{tempfile.mkdtemp(prefix='ledger-')}/ledger.db"
    guard.persist(path)
    # One request of a user is one workflow: the next request may send the same mail again.
    guard.workflow(f"request-{uuid.uuid4().hex[:8]}")
    mail = ("send_email", {"to": "ada@example.com", "subject": "Invoice 7"})
    model = ScriptedModel([[mail]], "The invoice is on its way.", overloaded_at=frozenset({2}))

    with serve(model.answer) as url:
        client = OpenAI(
            base_url=f"{url}/v1",
            api_key="none needed",
            max_retries=0,
            http_client=DefaultHttpxClient(trust_env=False),  # no proxy for loopback
        )
        print(converse_with_retries(client, "Send Ada her invoice."))

    print(f"mails sent: {len(OUTBOX)} ({', '.join(OUTBOX)})")
    guard.log()
    print(f"ledger.db: {path}")


if __name__ == "__main__":
    main()
