"""What a planner hands in: checked whole before anything is added, then made into tasks.

A compound is a task of the type `compound`; its subtasks are its parts. It waits for all of them whatever becomes of
them, and they wait for each other and fail with what they wait for. So the ledger itself says what can be begun.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from ledger import UsageError
from ledger_tasks.errors import BadPlan, DependencyCycle
from ledger_tasks.model import LONGEST, Dep, Task
from ledger_tasks.operations import refuse_cycle

#: types of the two kinds of tasks; which runner may claim them says a capability, its name
COMPOUND: Final = "compound"
SUBTASK: Final = "compound-subtask"
MOST_SUBTASKS: Final = 10_000
_KEYS: Final = ("index", "description", "tier_hint", "depends_on")


@dataclass(frozen=True, slots=True)
class Tier:
    """What does the subtasks of a tier, and what one costs where its execution reports no cost."""

    model: str
    #: US dollars
    cost: float


#: what a tier means unless a runner is given another table
TIERS: Final[Mapping[int, Tier]] = {1: Tier("haiku", 0.008), 2: Tier("sonnet", 0.04), 3: Tier("opus", 0.15)}


@dataclass(frozen=True, slots=True)
class Step:
    """A subtask as it was planned."""

    index: int
    description: str
    tier_hint: int
    depends_on: tuple[int, ...]
    #: seconds; None: what its runner says
    timeout: float | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What was planned: subtasks 0, 1, 2 … and why so."""

    reasoning: str
    steps: tuple[Step, ...]


def checked_tiers(tiers: Mapping[int, Tier]) -> dict[int, Tier]:
    """The table of tiers; raises `UsageError`."""
    if not isinstance(tiers, Mapping) or not tiers:
        raise UsageError(f"tiers={tiers!r} is no table; give {{1: Tier('haiku', 0.008), …}}")
    for number, tier in tiers.items():
        if not _is_whole(number) or not isinstance(tier, Tier) or not isinstance(tier.model, str):
            raise UsageError(f"tiers[{number!r}] is {tier!r}; give a number and a Tier(model, cost)")
        if not _is_number(tier.cost) or not 0 <= tier.cost <= LONGEST:
            raise UsageError(
                f"the cost of tier {number} is {tier.cost!r}; give a number of dollars from 0 up"
            )
    return dict(tiers)


def plan_from(found: Any, tiers: Mapping[int, Tier]) -> Plan:
    """The plan that a planner returned; raises `BadPlan` that says what is wrong with it."""
    if not isinstance(found, Mapping):
        raise BadPlan(f"it is {_shown(found)}, not a dict with reasoning and subtasks")
    reasoning, listed = found.get("reasoning", ""), found.get("subtasks")
    if not isinstance(reasoning, str):
        raise BadPlan(f"its reasoning is {_shown(reasoning)}, not text")
    if not isinstance(listed, list | tuple):
        raise BadPlan(f"its subtasks are {_shown(listed)}, not a list")
    if not 0 < len(listed) <= MOST_SUBTASKS:
        raise BadPlan(f"it has {len(listed)} subtasks; there must be 1 to {MOST_SUBTASKS}")
    steps = [_step_from(one, place, len(listed), tiers) for place, one in enumerate(listed)]
    _refuse_twice(steps)
    _refuse_round(steps)
    return Plan(reasoning, tuple(sorted(steps, key=lambda step: step.index)))


def _step_from(found: Any, place: int, count: int, tiers: Mapping[int, Tier]) -> Step:
    where = f"its subtask at place {place}"
    if not isinstance(found, Mapping):
        raise BadPlan(f"{where} is {_shown(found)}, not a dict")
    missing = [key for key in _KEYS if key not in found]
    if missing:
        raise BadPlan(f"{where} has no {', '.join(missing)}")
    index, description, tier, depends_on = (found[key] for key in _KEYS)
    if not _is_whole(index) or not 0 <= index < count:
        raise BadPlan(
            f"{where} has the index {_shown(index)}; {count} subtasks are numbered 0 to {count - 1}"
        )
    if not isinstance(description, str) or not description.strip():
        raise BadPlan(f"the description of subtask {index} is {_shown(description)}; it must say what to do")
    if not _is_whole(tier) or tier not in tiers:
        raise BadPlan(
            f"the tier_hint of subtask {index} is {_shown(tier)}, none of {', '.join(map(str, tiers))}"
        )
    return Step(index, description, tier, _deps(depends_on, index, count), _timeout(found, index))


def _deps(found: Any, index: int, count: int) -> tuple[int, ...]:
    if not isinstance(found, list | tuple):
        raise BadPlan(f"depends_on of subtask {index} is {_shown(found)}, not a list of indices")
    for one in found:
        if not _is_whole(one) or not 0 <= one < count:
            raise BadPlan(
                f"subtask {index} depends on {_shown(one)}; {count} subtasks are numbered 0 to {count - 1}"
            )
        if one == index:
            raise BadPlan(f"subtask {index} depends on itself", (index, index))
    return tuple(dict.fromkeys(found))


def _timeout(found: Mapping[str, Any], index: int) -> float | None:
    seconds = found.get("timeout")
    if seconds is not None and not is_time_limit(seconds):
        raise BadPlan(f"the timeout of subtask {index} is {_shown(seconds)}, not a number of seconds above 0")
    return None if seconds is None else float(seconds)


def _refuse_twice(steps: Sequence[Step]) -> None:
    seen: set[int] = set()
    for step in steps:
        if step.index in seen:
            raise BadPlan(f"two of its subtasks have the index {step.index}")
        seen.add(step.index)


def _refuse_round(steps: Sequence[Step]) -> None:
    try:
        refuse_cycle({str(step.index): [str(on) for on in step.depends_on] for step in steps})
    except DependencyCycle as error:
        path = [int(name) for name in error.path]
        shown = " → ".join(map(str, path if len(path) < 12 else [*path[:6], "…", *path[-5:]]))
        raise BadPlan(
            f"these subtasks would wait for each other for ever: {shown} (→ means waits for)", path
        ) from None


def is_time_limit(seconds: Any) -> bool:
    """Whether it is a number of seconds that something may take."""
    return _is_number(seconds) and 0 < seconds <= LONGEST


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


# -- as tasks --


def tasks_from(
    plan: Plan, compound: str, prompt: str, name: str, tiers: Mapping[int, Tier], submitted: datetime
) -> list[Task]:
    """The compound and its subtasks, to be added together.

    The table of tiers goes with them: a runner that takes over does what was planned, at the price that was planned.
    """
    parts = [_subtask(step, compound, name, tiers[step.tier_hint]) for step in plan.steps]
    told = {
        "reasoning": plan.reasoning,
        "subtask_count": len(parts),
        "submitted_at": submitted.isoformat(),
        "tiers": {str(number): [tier.model, tier.cost] for number, tier in tiers.items()},
    }
    waits = tuple(Dep(part.id, "run") for part in parts)
    # before everything else, for it only takes a moment and somebody waits for it
    whole = Task(
        compound, prompt, type=COMPOUND, capabilities=(name,), depends_on=waits, payload=told, priority=10
    )
    return [whole, *parts]


def _subtask(step: Step, compound: str, name: str, tier: Tier) -> Task:
    told = {"index": step.index, "tier_hint": step.tier_hint, "model": tier.model, "estimate": tier.cost}
    return Task(
        subtask_id(compound, step.index),
        step.description,
        type=SUBTASK,
        parent=compound,
        capabilities=(name,),
        depends_on=tuple(Dep(subtask_id(compound, on), "fail") for on in step.depends_on),
        payload=told if step.timeout is None else {**told, "timeout": step.timeout},
    )


def subtask_id(compound: str, index: int) -> str:
    """What the task of a subtask is called."""
    return f"{compound}.{index}"


def index_in(task_id: str) -> int:
    """The index of the subtask that is called so."""
    return int(task_id.rpartition(".")[2])


def assigned(task: Task) -> tuple[int, str]:
    """The tier and the model that a subtask is given to: what was planned, unless it was routed elsewhere."""
    routed = task.checkpoint or task.payload
    return routed.get("tier_assigned", task.payload["tier_hint"]), routed["model"]
