// What the pages do beyond HTML: follow the ledger, draw the chart, ask before a change. One function per view.
// Everything recorded is set as text, never as HTML.
"use strict";

const page = document.body.dataset;
const byId = (id) => document.getElementById(id);
const count = new Intl.NumberFormat("en-US");
const plural = (n, word) => `${count.format(n)} ${word}${n === 1 ? "" : "s"}`;

// -- the server --

async function api(path, body, { again = true } = {}) {
  const options = { headers: { Accept: "application/json" } };
  if (body !== undefined) {
    options.method = "POST";
    options.body = JSON.stringify(body);
    options.headers["Content-Type"] = "application/json";
    options.headers["X-CSRF-Token"] = document.querySelector('meta[name="csrf-token"]').content;
  }
  const answer = await fetch(path, options);
  if (again && answer.headers.get("X-Ledger-Stale")) {
    await renewToken();
    return api(path, body, { again: false });
  }
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(sentence(found.error || `the server answered ${answer.status}`, found.advice));
  return found;
}

// The dashboard was started anew, or another tab became another visitor: a page of now has the right token.
async function renewToken() {
  const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
  const found = new DOMParser().parseFromString(await answer.text(), "text/html");
  const token = found.querySelector('meta[name="csrf-token"]');
  if (token) document.querySelector('meta[name="csrf-token"]').content = token.content;
}

// What begins with the name of a tool keeps its letters.
function sentence(what, advice) {
  const text = what.replace(/^(a|an|no|nothing|since|the|there|this|what) /, (word) => word[0].toUpperCase() + word.slice(1));
  return advice ? `${text}. ${advice}` : `${text}.`;
}

// -- times: the server's, as in what it has rendered --

function serverTime(milliseconds, options) {
  const shifted = new Date(milliseconds + Number(page.offset) * 60_000);
  return shifted.toLocaleString("en-US", { ...options, hourCycle: "h23", timeZone: "UTC" });
}

const DAY = { month: "short", day: "numeric" };
const MINUTES = { hour: "2-digit", minute: "2-digit" };
const SECONDS = { ...MINUTES, second: "2-digit" };

function moment(milliseconds) {
  const isToday = serverTime(milliseconds, { dateStyle: "short" }) === serverTime(Date.now(), { dateStyle: "short" });
  return serverTime(milliseconds, isToday ? SECONDS : { ...DAY, ...SECONDS });
}

// -- following the ledger --

function linkState(state, words) {
  byId("link-state").dataset.state = state;
  if (byId("link-words").textContent !== words) byId("link-words").textContent = words;
}

// Ask for what this page asked for.
function narrow(url, names) {
  const asked = new URLSearchParams(location.search);
  for (const name of names) if (asked.get(name)) url.searchParams.set(name, asked.get(name));
}

// Server-sent events from where this page stands. A hidden tab hangs up: browsers allow six connections
// to one server, and a seventh tab would wait for ever.
function follow(onEvents, names = ["tool", "wf", "caller"]) {
  let seq = Number(page.seq);
  let source = null;
  let again = 0;
  let wasLost = false;

  function open() {
    close();
    const url = new URL(page.stream, location.href);
    narrow(url, names);
    url.searchParams.set("after", seq);
    source = new EventSource(url);
    source.addEventListener("hello", () => {
      linkState("live", "live");
      if (wasLost) onEvents([]);
      wasLost = false;
    });
    for (const kind of ["events", "missed"]) {
      source.addEventListener(kind, (message) => {
        seq = Number(message.lastEventId);
        onEvents(JSON.parse(message.data), kind === "missed");
      });
    }
    source.addEventListener("gone", () => lost("ledger is gone"));
    source.addEventListener("back", () => location.reload());
    source.addEventListener("error", () => {
      lost("disconnected");
      if (source.readyState === EventSource.CLOSED) again = setTimeout(open, 3000);
    });
  }

  function lost(words) {
    wasLost = true;
    linkState("lost", words);
  }

  function close() {
    clearTimeout(again);
    if (source) source.close();
    source = null;
  }

  document.addEventListener("visibilitychange", () => {
    if (document.hidden) {
      close();
      linkState("starting", "asleep");
    } else open();
  });
  document.addEventListener("htmx:after:history:push", open);
  addEventListener("pagehide", close);
  addEventListener("pageshow", (shown) => shown.persisted && open());
  open();
}

// Calls `work` soon after `ask()`, and never for more than a twentieth of the time.
function gently(work) {
  let due = 0;
  let earliest = 0;
  let running = false;

  async function run() {
    due = 0;
    running = true;
    const begun = performance.now();
    await work().catch(() => {}); // the badge tells of a lost server
    const ended = performance.now();
    running = false;
    earliest = ended + Math.max(1500, 20 * (ended - begun));
  }

  return function ask() {
    if (due || document.hidden) return;
    due = setTimeout(() => (running ? (due = 0, ask()) : run()), Math.max(earliest - performance.now(), running ? 200 : 0));
  };
}

// Patch the page from the server's own HTML: what did not change stays, and with it scroll and selection.
async function refresh(more = {}) {
  const region = byId("live-region");
  if (region.dataset.gone) return;
  const before = new Set([...region.querySelectorAll("[id]")].map((element) => element.id));
  const url = new URL(location.href);
  for (const [name, value] of Object.entries(more)) url.searchParams.set(name, value);
  await htmx.ajax("GET", url.pathname + url.search, { target: region, swap: "innerMorph" });
  for (const row of region.querySelectorAll("tr[id^='c-'], tr[id^='t-'], li[id^='e-'], li[id^='d-']")) {
    if (!before.has(row.id)) row.classList.add("fresh");
  }
}

// A refresh that was refused: what is shown is no longer what the ledger says.
function refused(event) {
  const { response, sourceElement } = event.detail.ctx;
  if (sourceElement !== document.body) return;
  if (page.view !== "call" || response.status !== 404) {
    page.refused = "1";
    return linkState("lost", `error ${response.status}`);
  }
  const region = byId("live-region");
  const words = document.createElement("h1");
  words.textContent = "This call is no longer in the ledger";
  const card = document.createElement("section");
  card.className = "empty";
  card.append(words);
  region.replaceChildren(card);
  region.dataset.gone = "1";
}

// Doubts come up without an event, when a lease is over: look now and then.
function keepFresh(ask) {
  setInterval(ask, 10_000);
}

// -- views --

const MOST_ROWS = 150;
const MOST_HELD = 1000;

// Whether somebody would lose their place if a list moved.
function isReading(list) {
  const selection = getSelection();
  const selected = !selection.isCollapsed && list.contains(selection.anchorNode);
  return scrollY > 0 || selected || list.contains(document.activeElement);
}

// A list that grows at its top while it is read.
function longList(word, isNew, names) {
  let more = 0;
  const ask = gently(async () => {
    const rows = document.querySelectorAll("#rows > tr").length;
    if (byId("live-region").querySelector("[data-further]")) return refresh({ rows: Math.max(rows, 1) });
    // rows that are being read stay: the list grows by what came, up to a limit
    if (rows + more > MOST_ROWS && isReading(byId("rows"))) return offer();
    await newest(Math.max(rows + more, 50));
  });

  function offer() {
    byId("news-button").textContent = more ? plural(more, `new ${word}`) : `Newest ${word}s`;
    byId("news").hidden = false;
  }

  async function newest(rows) {
    more = 0;
    byId("news").hidden = true;
    await refresh({ rows: Math.min(rows, MOST_ROWS) });
  }

  byId("news-button").addEventListener("click", async () => {
    await newest(50);
    scrollTo(0, 0);
  });
  follow((events) => {
    more += events.filter(isNew).length;
    ask();
  }, names);
  keepFresh(ask);
  filterForm(word);
}

const views = {
  overview() {
    const chart = activity();
    const ask = gently(async () => {
      await refresh();
      await chart.load();
      if (byId("view-state").dataset.ready === "0") setTimeout(ask, 500);
    });
    follow(ask);
    keepFresh(ask);
    chart.load().catch(() => {});
    if (byId("view-state").dataset.ready === "0") ask();
  },

  calls() {
    longList("call", (event) => event.kind === "claimed");
  },

  call() {
    const ask = gently(() => refresh());
    const call = byId("live-region").dataset.call;
    follow((events, missed) => {
      if (missed || !events.length || events.some((event) => event.call === call || event.kind === "reset")) ask();
    });
    keepFresh(ask);
  },

  doubts() {
    const ask = gently(() => refresh());
    const telling = new Set(["doubt", "late", "resolved", "released", "reset", "claimed"]);
    follow((events, missed) => {
      if (missed || !events.length || events.some((event) => telling.has(event.kind))) ask();
    });
    keepFresh(ask);
  },

  live() {
    const held = [];
    let paused = false;
    let missing = false;
    const button = byId("pause");

    function told() {
      const waiting = missing ? "many events" : plural(held.length, "event");
      byId("held").textContent = paused ? `paused, ${waiting} waiting` : "";
    }

    button.addEventListener("click", () => {
      paused = !paused;
      button.setAttribute("aria-pressed", String(paused));
      button.textContent = paused ? "Go on" : "Pause";
      if (!paused) goOn();
      told();
    });

    function goOn() {
      showEvents(held.splice(0));
      if (missing) catchUp().catch(() => {}); // the badge tells of a lost server
      missing = false;
    }

    follow((events, missed) => {
      held.push(...events);
      missing ||= missed || held.length > MOST_HELD;
      if (missing) held.length = 0;
      if (!paused) return goOn();
      told();
    });
  },
};

// -- live --

const TONES = {
  claimed: "running", success: "success", ran: "success", failed: "failed", raised: "failed", suspended: "suspended",
  doubt: "in_doubt", blocked: "blocked", late: "in_doubt", resolved: "success", released: "running",
};

const MOST_EVENTS = 300;

function showEvents(events) {
  const list = byId("events");
  const fresh = events.filter((event) => event.seq > Number(list.dataset.newest));
  if (!fresh.length) return;
  list.dataset.newest = fresh[fresh.length - 1].seq;
  list.prepend(...fresh.slice(-MOST_EVENTS).map(eventRow).reverse());
  while (list.children.length > MOST_EVENTS) list.lastElementChild.remove();
  byId("live-empty").hidden = true;
}

// After more events than could be told: the newest of them, above a row that says what is missing.
async function catchUp() {
  const url = new URL(page.events, location.href);
  narrow(url, ["tool", "wf", "caller"]);
  url.searchParams.set("limit", 100);
  const { events } = await api(url);
  byId("events").prepend(byId("gap-template").content.firstElementChild.cloneNode(true));
  byId("live-empty").hidden = true;
  showEvents(events);
}

function eventRow(event) {
  const row = byId("event-template").content.firstElementChild.cloneNode(true);
  const [time, badge, link, times] = ["time", ".badge", "a", "b"].map((part) => row.querySelector(part));
  const at = Date.parse(event.at);
  time.dateTime = event.at;
  time.title = `${serverTime(at, { dateStyle: "medium", timeStyle: "medium" })} ${page.zone}`;
  time.textContent = moment(at);
  badge.textContent = event.kind;
  badge.classList.add(TONES[event.kind] || "plain");
  if (event.call) {
    link.href = byId("events").dataset.callUrl.replace("CALL", encodeURIComponent(event.call));
    link.textContent = printable(event.name || event.call.slice(0, 12));
    link.title = printable(event.tool || "");
  }
  times.textContent = event.n > 1 ? `× ${event.n}` : "";
  row.querySelector(".event-who").textContent = printable([event.wf, event.caller].filter(Boolean).join(" · "));
  row.querySelector(".event-detail").textContent = printable((event.detail || "").slice(0, 160));
  row.classList.add("fresh");
  return row;
}

// Recorded text must not turn the reading direction or hide characters.
function printable(text) {
  return text.replace(/[\p{C}\u2028\u2029]/gu, (char) => `\\u${char.codePointAt(0).toString(16).padStart(4, "0")}`);
}

// -- calls --

function filterForm(word) {
  const problem = byId("filter-error");
  document.addEventListener("htmx:config:request", (event) => {
    const body = event.detail.ctx.request.body;
    if (!body || !body.keys) return;
    for (const name of [...body.keys()]) if (!body.get(name)) body.delete(name); // a short URL
  });
  document.addEventListener("htmx:response:error", (event) => {
    const { status } = event.detail.ctx.response;
    if (status >= 500) return;
    const found = JSON.parse(event.detail.ctx.text || "{}");
    problem.textContent = sentence(found.error || `the server answered ${status}`, found.advice);
    problem.hidden = false;
  });
  document.addEventListener("htmx:after:swap", (event) => {
    problem.hidden = true;
    if (event.detail.ctx.sourceElement === document.body) return; // a refresh is no news of the filter
    const rows = document.querySelectorAll("#rows > tr").length;
    byId("announce").textContent = rows ? `${plural(rows, word)} shown` : `No ${word} fits this filter`;
  });
}

// -- overview: the chart --

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function day(seconds) {
  return serverTime(seconds * 1000, { ...DAY, ...MINUTES });
}

function stepWords(seconds) {
  const [size, unit] = seconds >= 86_400 ? [86_400, "day"] : seconds >= 3600 ? [3600, "hour"] : [60, "minute"];
  return plural(seconds / size, unit);
}

function short(n) {
  return n >= 1e6 ? `${n / 1e6} M` : n >= 1e3 ? `${n / 1e3} k` : String(n);
}

function ticks(_, at, __, ___, step) {
  return at.map((seconds) => serverTime(seconds * 1000, step >= 86_400 ? DAY : MINUTES));
}

// uPlot sets its ticks by the browser's clock: give it dates that show the server's.
function dateForTicks(seconds) {
  const date = new Date(seconds * 1000);
  return new Date(date.getTime() + (Number(page.offset) + date.getTimezoneOffset()) * 60_000);
}

// Bars stand on each other: each layer is drawn as a sum, the later ones over the earlier.
function layers({ at, executed, blocked, failed }) {
  const both = executed.map((n, i) => n + blocked[i]);
  return [at, both.map((n, i) => n + failed[i]), both, executed];
}

function layer(name) {
  const paths = uPlot.paths.bars({ size: [0.86, 40], align: 1 });
  const paint = color(`--chart-${name}`);
  return { label: name, stroke: paint, fill: paint, width: 0, paths, points: { show: false } };
}

const STEPS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6, 1e7, 1e8];

function axes() {
  const grid = { stroke: color("--chart-grid"), width: 1 };
  const axis = { stroke: color("--muted"), font: "12px system-ui, sans-serif", ticks: { show: false } };
  return [
    { ...axis, grid: { show: false }, values: ticks, space: 72, size: 28 },
    { ...axis, grid, size: 56, incrs: STEPS, values: (_, at) => at.map(short) },
  ];
}

function chartOptions(box, ends, hooks) {
  return {
    width: box.clientWidth, height: box.clientHeight, legend: { show: false }, padding: [8, 24, 0, 0],
    cursor: { y: false, points: { show: false }, drag: { x: true, y: false, setScale: false } },
    scales: { x: { range: ends }, y: { range: (_, __, most) => [0, Math.max(most * 1.08, 4)] } },
    tzDate: dateForTicks, axes: axes(), series: [{}, layer("failed"), layer("blocked"), layer("executed")], hooks,
  };
}

// The range that was dragged over, for the address.
function rangeOf(u) {
  const [from, to] = [u.select.left, u.select.left + u.select.width].map((x) => u.posToVal(x, "x"));
  const middle = (from + to) / 2;
  const half = Math.max(to - from, 60) / 2; // figures are counted by the minute
  const iso = (seconds) => new Date(Math.round(seconds) * 1000).toISOString().replace(".000", "");
  return `?since=${iso(middle - half)}&until=${iso(middle + half)}`;
}

function rangeWords(figures, text) {
  for (const name of ["executed", "blocked", "failed"]) byId(`range-${name}`).textContent = count.format(figures[name]);
  byId("range-words").textContent = text;
}

function markRange() {
  const asked = new URLSearchParams(location.search);
  const chosen = asked.get("until") ? null : asked.get("since");
  for (const link of document.querySelectorAll(".ranges a")) {
    if (link.dataset.since === chosen) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
  const reset = byId("range-reset");
  if (reset) reset.hidden = !asked.has("since") && !asked.has("until");
}

function activity() {
  let plot = null;
  let shown = null;

  function total() {
    const { chart, range } = shown;
    rangeWords(range, `${day(Date.parse(chart.since) / 1000)} – ${day(Date.parse(chart.until) / 1000)}`);
  }

  function hover(u) {
    const { chart } = shown;
    const i = u.cursor.idx;
    if (i == null || u.cursor.left < 0) return total();
    const figures = { executed: chart.executed[i], blocked: chart.blocked[i], failed: chart.failed[i] };
    rangeWords(figures, `${day(chart.at[i])}, ${stepWords(chart.step_seconds)}`);
  }

  function select(u) {
    if (u.select.width < 5) return;
    const search = rangeOf(u);
    u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    go(search);
  }

  // whole bars, also where the range begins within one
  function ends() {
    const { at, step_seconds: step } = shown.chart;
    return [at[0], at[at.length - 1] + step];
  }

  function draw() {
    const box = byId("chart");
    if (!box || !shown) return;
    if (plot) plot.destroy();
    plot = new uPlot(chartOptions(box, ends, { setSelect: [select], setCursor: [hover] }), layers(shown.chart), box);
    total();
  }

  function go(search) {
    history.pushState({}, "", location.pathname + search);
    load().catch(() => {});
  }

  async function load() {
    const url = new URL(page.overview, location.href);
    narrow(url, ["since", "until"]);
    markRange();
    shown = await api(url);
    if (plot && byId("chart") && byId("chart").contains(plot.root)) {
      plot.setData(layers(shown.chart));
      total();
    } else draw();
  }

  document.addEventListener("click", (event) => {
    const link = event.target.closest(".ranges a, #range-reset");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    go(link.search);
  });
  addEventListener("popstate", () => load().catch(() => {}));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  addEventListener("resize", () => plot && plot.setSize({ width: byId("chart").clientWidth, height: byId("chart").clientHeight }));
  return { load };
}

// -- deciding about a call or a task --

const ACTS = {
  retry: {
    title: "Retry this call?", confirm: "Retry",
    words: "It is released: the next identical call runs once more, even if this one took effect. Nothing runs by itself now.",
  },
  done: {
    title: "Mark this call as done?", confirm: "Mark done",
    words: "You say that its effect happened. Identical calls are blocked from now on.",
  },
  not_done: {
    title: "Mark this call as not done?", confirm: "Mark not done",
    words: "You say that its effect did not happen. The next identical call runs.",
  },
  task_retry: {
    title: "Retry this task?", confirm: "Retry", note: "Reason", noteWords: "(kept with the task)",
    words: "It can be claimed again, and its retries begin anew. What its tools did is replayed and not done again. What was skipped because it failed stays skipped.",
  },
  task_cancel: {
    title: "Cancel this task?", confirm: "Cancel the task", leave: "Leave it", note: "Reason",
    noteWords: "(optional: kept with the task)",
    words: "It ends for good, with its parts; whoever works on it is told to stop. For what depends on it, a dependency has failed.",
  },
};

function decisions() {
  const dialog = byId("act");
  if (!dialog) return;
  let asked = null;

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-act]");
    if (!button) return;
    asked = button.dataset;
    const act = ACTS[asked.act];
    byId("act-form").reset();
    byId("act-title").textContent = act.title;
    byId("act-name").textContent = asked.name;
    byId("act-id").textContent = idOf(asked);
    byId("act-words").textContent = act.words;
    byId("act-confirm").textContent = act.confirm;
    byId("act-result-field").hidden = asked.act !== "done";
    byId("act-dependents-field").hidden = asked.act !== "task_cancel";
    byId("act-fresh-field").hidden = asked.act !== "task_retry";
    byId("act-note-name").textContent = act.note || "Note";
    byId("act-note-words").textContent = act.noteWords || "(optional: why, for the timeline)";
    byId("act-cancel").textContent = act.leave || "Cancel";
    byId("act-error").hidden = true;
    dialog.showModal();
    byId("act-note").focus();
  });
  byId("act-cancel").addEventListener("click", () => dialog.close());
  byId("act-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    byId("act-confirm").disabled = true;
    byId("act-error").hidden = true;
    byId("act-working").hidden = false;
    try {
      const place = placeOf(asked.call);
      await api(asked.url, decision(asked));
      dialog.close();
      byId("announce").textContent = `${ACTS[asked.act].confirm}: ${asked.name} ${idOf(asked)}`;
      await refresh();
      keepFocus(place);
    } catch (error) {
      byId("act-error").textContent = error.message;
      byId("act-error").hidden = false;
    } finally {
      byId("act-working").hidden = true;
      byId("act-confirm").disabled = false;
    }
  });
}

// What names a call or a task for people.
function idOf(asked) {
  return printable(asked.id || asked.call.slice(0, 12));
}

function placeOf(call) {
  return [...document.querySelectorAll(".doubts > li")].findIndex((row) => row.id === `d-${call}`);
}

// The button that was pressed is gone: go on with the doubt that took its place, or at the top.
function keepFocus(place) {
  if (document.activeElement !== document.body && document.activeElement.isConnected) return;
  const rows = document.querySelectorAll(".doubts > li");
  const next = rows.length && rows[Math.min(Math.max(place, 0), rows.length - 1)].querySelector("button");
  const target = next || document.querySelector("h1");
  if (!next) target.tabIndex = -1;
  target.focus();
}

function decision({ act, id, session }) {
  const note = byId("act-note").value.trim();
  if (act === "task_retry") return { id, session, reason: note, fresh: byId("act-fresh").checked };
  if (act === "task_cancel") return { id, session, reason: note, dependents: byId("act-dependents").checked };
  const said = note ? { note } : {};
  if (act === "retry") return said;
  const result = byId("act-result").value.trim();
  return { ...said, done: act === "done", ...(act === "done" && result ? { result } : {}) };
}

// -- keys --

function keys() {
  const places = { o: 0, c: 1, t: 2, l: 3, d: 4 };
  let afterG = 0;
  const on = byId("keys-on");
  on.checked = localStorage.getItem("ledger-keys") !== "off";
  on.addEventListener("change", () => localStorage.setItem("ledger-keys", on.checked ? "on" : "off"));
  document.addEventListener("keydown", (event) => {
    if (!on.checked) return;
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea, select, dialog")) return;
    const links = document.querySelectorAll(".top nav a");
    if (event.key === "/") {
      event.preventDefault();
      const search = byId("search");
      if (search) search.focus();
      else location.href = `${links[1].href}#search`;
    } else if (event.timeStamp - afterG < 1000 && event.key in places) {
      links[places[event.key]].click();
    }
    afterG = event.key === "g" ? event.timeStamp : -Infinity;
  });
  if (location.hash === "#search" && byId("search")) byId("search").focus();
}

// -- all pages --

document.addEventListener("htmx:after:request", (event) => {
  const doubts = event.detail.ctx.response.headers.get("x-ledger-doubts");
  if (doubts === null) return; // it was refused
  if (page.refused) linkState("live", "live");
  delete page.refused;
  const badge = byId("doubt-count");
  badge.childNodes[1].nodeValue = count.format(doubts);
  badge.hidden = doubts === "0";
});
document.addEventListener("htmx:response:error", refused);
decisions();
keys();
(views[page.view] || (() => {}))();
