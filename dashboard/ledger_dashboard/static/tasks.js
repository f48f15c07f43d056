// The pages of tasks: what follows them, and two pictures. One function per view; all that is recorded is set as text.
"use strict";

const SVG = "http://www.w3.org/2000/svg";

function svg(name, attributes, ...parts) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...parts);
  return made;
}

function taskUrl(base, { session, id }) {
  return `${base}?${new URLSearchParams({ session, id })}`;
}

function clipped(text, most) {
  const letters = [...printable(text)];
  return letters.length > most ? `${letters.slice(0, most - 1).join("")}…` : letters.join("");
}

// What the badge of a task says.
function stateOf(task) {
  return task.state === "pending" && task.waiting ? "waiting" : task.state;
}

// The page began without a task, and now there is one: it needs its filter and its picture.
function beginAnew() {
  const empty = document.querySelector("[data-empty]");
  if (empty) location.reload();
  return Boolean(empty);
}

function followTasks(work, concerns = () => true) {
  const ask = gently(async () => {
    if (!beginAnew()) await work();
  });
  follow((events, missed) => {
    if (missed || !events.length || events.some(concerns)) ask();
  }, ["session"]);
  keepFresh(ask);
}

const taskViews = {
  tasks() {
    if (document.querySelector("[data-empty]")) return followTasks(() => refresh());
    longList("task", (event) => event.kind === "created", ["session"]);
  },

  task() {
    const { session } = byId("live-region").dataset; // its neighbours are shown too
    followTasks(() => refresh(), (event) => event.session === session);
  },

  task_tree() {
    followTasks(() => refresh());
  },

  task_dead() {
    followTasks(() => refresh(), (event) => event.kind === "moved");
  },

  task_workers() {
    followTasks(() => refresh(), (event) => event.kind !== "checkpoint");
  },

  task_compounds() {
    followTasks(() => refresh(), (event) => event.kind === "moved" || event.kind === "created");
  },

  task_compound() {
    const { task, session } = byId("live-region").dataset;
    const draw = graph();
    const isPart = (event) => event.session === session && `${event.task}.`.startsWith(`${task}.`);
    followTasks(async () => {
      await refresh();
      await draw();
    }, isPart);
    draw().catch(() => {});
  },

  task_graph() {
    const draw = graph();
    followTasks(async () => {
      await refresh();
      await draw();
    });
    draw().catch(() => {});
  },

  task_agents() {
    const draw = lanes();
    followTasks(async () => {
      await refresh();
      await draw();
    });
    draw().catch(() => {});
  },
};

// -- the graph --

const NODE = { width: 190, height: 46, right: 64, below: 14, edge: 12 };

// Rows of each column: a task stands near the middle of what it depends on, so that lines cross less.
function placed(tasks, links) {
  const columns = [];
  for (const task of tasks) (columns[task.column] ||= []).push(task);
  const before = new Map();
  for (const { task, on } of links) before.set(task, [...(before.get(task) || []), on]);
  const row = new Map();
  for (const column of columns) {
    const middle = (task) => {
      const rows = (before.get(task.num) || []).map((num) => row.get(num) ?? 0);
      return rows.length ? rows.reduce((sum, n) => sum + n, 0) / rows.length : 0;
    };
    const sorted = column.map((task) => [middle(task), task]).sort((a, b) => a[0] - b[0] || a[1].num - b[1].num);
    let next = 0;
    for (const [wish, task] of sorted) {
      next = Math.max(next, Math.floor(wish));
      row.set(task.num, next);
      next += 1;
    }
  }
  const at = new Map();
  for (const task of tasks) {
    at.set(task.num, {
      x: NODE.edge + task.column * (NODE.width + NODE.right),
      y: NODE.edge + row.get(task.num) * (NODE.height + NODE.below),
    });
  }
  return at;
}

// The second line of a node: of a subtask of a compound also who does it, and what it cost.
function below(task, state) {
  const words = "model" in task ? [task.status, task.model, task.cost && `$${Number(task.cost.toFixed(4))}`] : [state, task.assignee];
  return words.filter(Boolean).join(" · ");
}

function node(task, { x, y }, box) {
  const state = stateOf(task);
  const isFocus = box.focus === task.id;
  const group = svg(
    "g", { transform: `translate(${x} ${y})`, class: `node t-${state}${isFocus ? " focus" : ""}` },
    svg("rect", { width: NODE.width, height: NODE.height, rx: 8 }),
    svg("rect", { class: "stripe", x: 5, y: 8, width: 4, height: NODE.height - 16, rx: 2 }),
    svg("text", { x: 17, y: 19 }, clipped(task.label, 24)),
    svg("text", { x: 17, y: 36, class: "sub" }, clipped(below(task, state), 28)),
    svg("title", {}, printable(`${task.label} (${task.id}): ${"tier_assigned" in task ? `tier ${task.tier_assigned}, ${below(task)}` : state}`)),
  );
  return svg("a", { href: taskUrl(box.taskUrl, task), "data-num": task.num }, group);
}

function line({ task, on, on_failure: onFailure }, at) {
  const [from, to] = [at.get(on), at.get(task)];
  const [x1, y1] = [from.x + NODE.width, from.y + NODE.height / 2];
  const [x2, y2] = [to.x, to.y + NODE.height / 2];
  const bend = Math.max((x2 - x1) / 2, 24);
  const way = `M${x1} ${y1}C${x1 + bend} ${y1} ${x2 - bend} ${y2} ${x2 - 5} ${y2}`;
  return svg("path", { d: way, class: `line${onFailure === "run" ? " runs" : ""}`, "marker-end": "url(#arrow)" });
}

function arrow() {
  const head = svg("path", { d: "M0 0L8 4L0 8z", class: "head" });
  return svg("defs", {}, svg("marker", { id: "arrow", markerWidth: 8, markerHeight: 8, refX: 3, refY: 4, orient: "auto" }, head));
}

function graph() {
  const box = byId("graph");
  if (!box) return async () => {};
  let isFirst = true;

  return async function draw() {
    const url = new URL(box.dataset.api, location.href);
    url.searchParams.set("session", box.dataset.session);
    if (box.dataset.focus) url.searchParams.set("id", box.dataset.focus);
    const { tasks, subtasks, links } = await api(url);
    show(tasks || subtasks, links);
  };

  function show(tasks, links) {
    byId("graph-card").hidden = !tasks.length;
    const at = placed(tasks, links);
    const spots = [...at.values()];
    const width = Math.max(0, ...spots.map(({ x }) => x)) + NODE.width + NODE.edge;
    const height = Math.max(0, ...spots.map(({ y }) => y)) + NODE.height + NODE.edge;
    const words = `${plural(tasks.length, "task")}, ${links.length} dependencies`;
    const picture = svg(
      "svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": words }, arrow(),
      ...links.map((link) => line(link, at)), ...tasks.map((task) => node(task, at.get(task.num), box.dataset)),
    );
    const [left, top] = [box.scrollLeft, box.scrollTop];
    box.replaceChildren(picture);
    box.scrollTo(left, top);
    const focus = picture.querySelector(".focus");
    if (isFirst && focus) focus.scrollIntoView({ block: "nearest", inline: "center" });
    isFirst = false;
  }
}

// -- the timeline of agents --

const LANE = { height: 34, bar: 18, name: 150, top: 26, least: 620 };

function steps(begin, end, most) {
  const sizes = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14_400, 21_600, 43_200, 86_400, 172_800, 604_800];
  const size = (sizes.find((seconds) => (end - begin) / seconds / 1000 <= most) || 2_592_000) * 1000;
  const found = [];
  for (let at = Math.ceil(begin / size) * size; at <= end; at += size) found.push(at);
  return [found, size];
}

function tick(at, size) {
  if (size < 60_000) return serverTime(at, SECONDS);
  return serverTime(at, size < 86_400_000 ? MINUTES : DAY);
}

function bar(one, y, place, end, base) {
  const [from, to] = [place(Date.parse(one.begin)), place(one.end ? Date.parse(one.end) : end)];
  const shape = svg("rect", { x: from, y, width: Math.max(to - from, 2), height: LANE.bar, rx: 3, class: `bar-${one.state}` });
  const words = `${one.id}: ${one.state}${one.then ? `, then ${one.then}` : ", still"}`;
  const parts = [shape, svg("title", {}, printable(words))];
  if (["done", "failed", "dead"].includes(one.then)) {
    parts.push(svg("circle", { cx: Math.max(to, from + 2), cy: y + LANE.bar / 2, r: 4, class: `end-${one.then}` }));
  }
  return svg("a", { href: taskUrl(base, one), tabindex: -1 }, ...parts);
}

function lane(agent, index, place, end, base) {
  const y = LANE.top + index * LANE.height;
  const bars = agent.bars.map((one) => bar(one, y + (LANE.height - LANE.bar) / 2, place, end, base));
  const name = svg("text", { x: 0, y: y + LANE.height / 2 + 5, class: "agent" }, clipped(agent.agent, 19));
  name.append(svg("title", {}, printable(agent.agent)));
  return svg("g", { class: "lane" }, svg("path", { class: "rule", d: `M0 ${y + LANE.height}H${place(end)}` }), name, ...bars);
}

function lanes() {
  const box = byId("lanes");
  if (!box) return async () => {};
  let found = null;

  function show() {
    if (!found || !found.agents.length) return;
    const [begin, end] = [Date.parse(found.since), Date.parse(found.until)];
    const width = Math.max(box.clientWidth, LANE.least);
    const height = LANE.top + found.agents.length * LANE.height + 4;
    const place = (at) => LANE.name + ((width - LANE.name - 12) * (at - begin)) / Math.max(end - begin, 1);
    const [times, size] = steps(begin, end, width / 110);
    const scale = times.flatMap((at) => [
      svg("path", { class: "rule", d: `M${place(at)} ${LANE.top - 6}V${height}` }),
      svg("text", { x: place(at), y: 13, class: "tick" }, tick(at, size)),
    ]);
    box.replaceChildren(svg(
      "svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": "What each agent had, and when" },
      ...scale, ...found.agents.map((agent, i) => lane(agent, i, place, end, box.dataset.taskUrl)),
    ));
    byId("lane-words").textContent = `${moment(begin)} to ${moment(end)}`;
  }

  addEventListener("resize", show);
  return async function draw() {
    const url = new URL(box.dataset.api, location.href);
    narrow(url, ["session", "since"]);
    found = await api(url);
    byId("lanes-card").hidden = !found.agents.length;
    show();
  };
}

(taskViews[page.view] || (() => {}))();
