// The dashboard: follows `dashboard/events`, keeps the newest state, and draws it.
//
// All text of the server, which may come from names in Redis, is set as text (textContent) or as an attribute of
// an element made here. Nothing is parsed as HTML.
"use strict";

const HISTORY_S = 300;
const BIN_S = 5;
const PHONE = matchMedia("(max-width: 640px)");
const ONE_COLUMN = matchMedia("(max-width: 1080px)");
const SILENT_MS = 10_000; // without a state for so long, the connection is made anew
const LONGEST_PAUSE_MS = 10_000;

const STATES = {
  "down": ["bad", "down"],
  "not ready": ["bad", "not ready"],
  "failing": ["bad", "failing"],
  "silent": ["warn", "slow"],
  "suspect": ["warn", "suspect"],
  "draining": ["none", "draining"],
  "busy": ["warn", "busy"],
  "serving": ["ok", "serving"],
  "registered": ["none", "registered"],
};
const RANK = Object.fromEntries(Object.keys(STATES).map((name, place) => [name, place]));
const SIGNS = { ok: "✓", warn: "!", bad: "✕", none: "…" };

let state = null;
let page = 0;
let showsAllEvents = false;

const pageRows = () => (PHONE.matches ? 10 : 20);
const fewEvents = () => (ONE_COLUMN.matches ? 5 : 12);
const element = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function draw(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function breakable(name) { // a long name may break behind a dot
  const parts = name.split(/(?<=[./])/);
  return make("span", {}, ...parts.flatMap((part, place) => (place ? [make("wbr"), part] : [part])));
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// ------------------------------------------------------------------ words for figures

const whole = new Intl.NumberFormat("en");
const rounded = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

function number(value) {
  if (value >= 100_000) return short.format(value);
  return value >= 100 ? whole.format(Math.round(value)) : rounded.format(value);
}

function milliseconds(value) {
  if (value === null || value === undefined) return ["–", ""];
  if (value < 1000) return [value < 10 ? rounded.format(value) : whole.format(Math.round(value)), "ms"];
  return [rounded.format(value / 1000), "s"];
}

function percentiles(p90, p99) {
  if (p90 < 1000 && p99 >= 1000) return `p90 ${rounded.format(p90 / 1000)} · p99 ${rounded.format(p99 / 1000)} s`;
  const [high, unit] = milliseconds(p99);
  return `p90 ${milliseconds(p90)[0]} · p99 ${high} ${unit}`;
}

function since(seconds) {
  if (seconds < 90) return `${Math.max(0, Math.round(seconds))} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 129_600) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86_400)} d`;
}

function moment(at) {
  const age = state.now - at;
  return age < 72_000 ? clock(at) : `${since(age)} ago`;
}

function clock(at) {
  return new Date(at * 1000).toLocaleTimeString("en-GB");
}

function count(value, one, many) {
  return `${whole.format(value)} ${value === 1 ? one : many}`;
}

// ------------------------------------------------------------------ the state

function apply(name, data) {
  if (name === "state") {
    state = data;
    return;
  }
  for (const [part, value] of Object.entries(data)) {
    if (["who", "loads", "points", "events"].includes(part)) {
      Object.assign(state[part], value.set);
      for (const key of value.gone) delete state[part][key];
    } else {
      state[part] = value;
    }
  }
}

let isDrawing = false;

function show() {
  if (isDrawing) return;
  isDrawing = true;
  requestAnimationFrame(() => {
    isDrawing = false;
    if (state === null) return;
    element("facts").hidden = false;
    showVerdict();
    showTiles();
    showModels();
    showGroups();
    showInstances();
    showRouters();
    showEvents();
    const processes = count(state.processes.length, "frontend process", "frontend processes");
    setText(element("foot"), `${processes} on this port. Rates of the last 10 s; latencies and failures of the last `
      + "minute; charts of the last 5 minutes.");
  });
}

// ------------------------------------------------------------------ the verdict

function showVerdict() {
  const [level, title, text] = state.verdict;
  setVerdict(level, title, text);
  const problems = state.problems.map(([severity, fact, advice]) => {
    const word = severity === "bad" ? "failure" : "warning";
    const head = make("strong", {}, make("span", { class: "level" }, word), fact);
    return make("li", { "data-level": severity }, head, make("p", {}, advice));
  });
  replaceIfChanged(element("problems"), JSON.stringify(state.problems), problems);
}

function setVerdict(level, title, text) {
  element("verdict").dataset.level = level;
  setText(element("sign"), SIGNS[level]);
  setText(element("verdict-title"), title);
  setText(element("verdict-text"), text);
  setText(element("announcement"), title); // read out when it changes, and not with each figure
  document.title = `${title} · dynamo_redis`;
  const colour = { ok: "%2317733f", warn: "%23c07800", bad: "%23b3261e", none: "%23566072" }[level];
  const icon = `data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'>`
    + `<circle cx='8' cy='8' r='7' fill='${colour}'/></svg>`;
  if (element("icon").getAttribute("href") !== icon) element("icon").setAttribute("href", icon);
}

function replaceIfChanged(node, key, children) {
  if (node.dataset.shown === key) return;
  node.dataset.shown = key;
  node.replaceChildren(...children);
}

// ------------------------------------------------------------------ figures and charts

function binned(place, isRate) {
  const end = Math.floor(state.now) - 1;
  const bins = Array.from({ length: HISTORY_S / BIN_S }, () => []);
  for (const [at, point] of Object.entries(state.points)) {
    const bin = Math.floor((Number(at) - (end - HISTORY_S) - 1) / BIN_S);
    if (bin >= 0 && bin < bins.length && point[place] !== null) bins[bin].push(point[place]);
  }
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  return bins.map((values) => {
    if (isRate) return sum(values) / BIN_S;
    return values.length ? sum(values) / values.length : null;
  });
}

function sparkline(values) {
  const width = 100;
  const height = 30;
  const top = Math.max(...values.filter((value) => value !== null), 0) || 1;
  const step = width / (values.length - 1);
  let line = "";
  let area = "";
  let began = null;
  values.forEach((value, place) => {
    const x = (place * step).toFixed(2);
    if (value !== null) {
      const y = (height - 1 - (value / top) * (height - 3)).toFixed(2);
      line += began === null ? `M${x} ${y}h.01` : `L${x} ${y}`; // so a single value is a dot
      area += began === null ? `M${x} ${height}L${x} ${y}` : `L${x} ${y}`;
      began = x;
    }
    if (began !== null && (value === null || place === values.length - 1)) {
      area += `L${began} ${height}Z`;
      began = null;
    }
  });
  const chart = draw("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true" });
  chart.append(draw("path", { class: "area", d: area }), draw("path", { class: "stroke", d: line }));
  return chart;
}

function tile(title, value, unit, more, values, level = "none") {
  const figure = make("p", { class: "value" }, value);
  if (unit) figure.append(" ", make("small", {}, unit));
  return make("li", { class: "tile", "data-level": level }, make("h3", {}, title), figure,
    make("p", { class: "more" }, more), values === null ? null : sparkline(values));
}

function showTiles() {
  const f = state.figures;
  const failedPart = f.ended ? `of ${number(f.ended)} in a minute` : "in the last minute";
  const waiting = [f.queued ? `${whole.format(f.queued)} before their first token` : "",
    f.waiting ? `${whole.format(f.waiting)} in line` : ""].filter(Boolean).join(", ");
  const latency = (name, title, place) => {
    const [p50, p90, p99] = f.times[name];
    const [value, unit] = milliseconds(p50);
    const more = p50 === null ? "none in the last minute" : percentiles(p90, p99);
    return tile(title, value, p50 === null ? "" : `${unit} p50`, more, binned(place, false));
  };
  const failedLevel = !f.failed ? "none" : f.failed > f.ended / 2 ? "bad" : "warn";
  element("tiles").replaceChildren(
    tile("Requests", number(f.requests_s), "/s", `${count(f.in_flight, "request", "requests")} under way`
      + (waiting ? `; ${waiting}` : ""), binned(0, true)),
    tile("Tokens", number(f.tokens_s), "/s", f.hit_rate === null ? "of answers"
      : `KV hit rate ${Math.round(100 * f.hit_rate)} %`, binned(1, true)),
    tile("Failed", whole.format(f.failed), "", failedPart, binned(2, true), failedLevel),
    latency("first", "Time to first token", 3),
    latency("gap", "Inter-token latency", 4),
    latency("duration", "Request duration", 5),
  );
}

// ------------------------------------------------------------------ models, routers, groups

function badge(level, text) {
  return make("span", { class: "badge", "data-level": level }, text);
}

function table(caption, columns, rows) {
  const heads = columns.map(([title, kind]) => make("th", { scope: "col", class: kind || null }, title));
  const body = rows.map((cells) => make("tr", {}, ...cells.map((cell, place) => place === 0
    ? make("th", { scope: "row" }, cell) : make("td", { class: columns[place][1] || null }, cell))));
  return make("table", {}, make("caption", { class: "unseen" }, caption),
    make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...body));
}

function empty(...parts) {
  return make("p", { class: "empty" }, ...parts);
}

function showModels() {
  const rows = state.models.map(([name, isServed, context, cards, reachable, underWay, , versions, failure]) => {
    let mark = badge("ok", "serving");
    if (!isServed) mark = failure === null ? badge("warn", "loading") : badge("bad", "cannot load");
    else if (!reachable) mark = badge("bad", "no instance");
    else if (versions > 1) mark = badge("warn", count(versions, "version", "versions"));
    return [breakable(name), mark, reachable === cards ? whole.format(reachable) : `${whole.format(reachable)} of ${whole.format(cards)}`,
      whole.format(underWay), context === null ? "–" : whole.format(context)];
  });
  const shown = rows.length
    ? table("Models", [["Model"], ["State"], ["Instances", "number"], ["Under way", "number"],
      ["Context", "number wide"]], rows)
    : empty("No model is registered. ", make("code", {}, "dynamo-redis worker mock"), " starts a mock worker.");
  replaceIfChanged(element("models"), JSON.stringify(state.models), [shown]);
}

function showRouters() {
  element("routers-card").hidden = !state.routers.length;
  const rows = state.routers.map((router) => {
    let index = badge("none", router.mode === "load" ? "load only" : "predicted");
    if (router.mode === "events") {
      index = router.connected ? badge("ok", "reads events") : badge("bad", "no events");
    }
    let lag = "–";
    if (router.lag_entries !== null) {
      lag = router.lag_entries ? `${whole.format(router.lag_entries)} entries` : "none";
      if (router.lag_s) lag += `, ${rounded.format(router.lag_s)} s`;
    }
    const rate = router.prompt_tokens ? `${Math.round(100 * router.cached_tokens / router.prompt_tokens)} %` : "–";
    const requests = whole.format(router.active_count)
      + (router.waiting_count ? ` + ${whole.format(router.waiting_count)} waiting` : "");
    return [breakable(router.endpoint), index, lag, rate, requests, whole.format(router.block_count)];
  });
  const shown = table("Routers", [["Chooses among"], ["Index"], ["Lag", "number"], ["Hit rate", "number"],
    ["Requests", "number wide"], ["Blocks", "number wide"]], rows);
  replaceIfChanged(element("routers"), JSON.stringify(state.routers), [shown]);
}

function stateBar(counts, total) {
  const bar = draw("svg", { class: "bar", viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" });
  let x = 0;
  for (const level of ["bad", "warn", "none", "ok"]) {
    const part = Object.entries(counts).filter(([name]) => STATES[name][0] === level)
      .reduce((sum, [, value]) => sum + value, 0);
    if (!part) continue;
    const width = Math.max(100 * part / total, 1.5);
    bar.append(draw("rect", { x, y: 0, width: Math.min(width, 100 - x), height: 8, "data-level": level }));
    x += width;
  }
  return bar;
}

function showGroups() {
  const groups = new Map();
  for (const [name, [endpoint, , models]] of Object.entries(state.who)) {
    const key = JSON.stringify([endpoint, models]);
    if (!groups.has(key)) groups.set(key, { endpoint, models, total: 0, requests: 0, counts: {} });
    const group = groups.get(key);
    const [condition, requests] = state.loads[name];
    group.total += 1;
    group.requests += requests;
    group.counts[condition] = (group.counts[condition] || 0) + 1;
  }
  const ordered = [...groups.values()].sort((a, b) => (b.models !== "") - (a.models !== "")
    || a.endpoint.localeCompare(b.endpoint) || a.models.localeCompare(b.models));
  const rows = ordered.map((group) => {
    const words = Object.keys(STATES).filter((name) => group.counts[name])
      .map((name) => `${whole.format(group.counts[name])} ${STATES[name][1]}`).join(", ");
    return [breakable(group.endpoint), group.models || "–", make("div", {}, words, stateBar(group.counts, group.total)),
      whole.format(group.requests)];
  });
  const shown = rows.length
    ? table("Instances by endpoint and model", [["Endpoint"], ["Model", "wide"], ["Instances"],
      ["Requests", "number"]], rows)
    : empty("No instance is registered. Start a worker: it appears here within a second.");
  replaceIfChanged(element("groups"), JSON.stringify(ordered), [shown]);
  element("browser").hidden = !ordered.length;
}

// ------------------------------------------------------------------ instances

const ORDERS = {
  trouble: (a, b) => RANK[a.load[0]] - RANK[b.load[0]],
  requests: (a, b) => b.load[1] - a.load[1],
  blocks: (a, b) => (b.load[2] || 0) - (a.load[2] || 0),
  started: (a, b) => b.who[4] - a.who[4],
};

function matching() {
  const wanted = element("find").value.trim().toLowerCase();
  const condition = element("state").value;
  const order = ORDERS[element("order").value];
  const found = [];
  for (const [name, who] of Object.entries(state.who)) {
    const load = state.loads[name];
    if (condition && load[0] !== condition) continue;
    if (wanted && !`${name} ${who[2]} ${who[3]}`.toLowerCase().includes(wanted)) continue;
    found.push({ name, who, load });
  }
  return found.sort((a, b) => order(a, b) || (a.name < b.name ? -1 : 1));
}

function showStateChoices() {
  const select = element("state");
  const chosen = select.value;
  const names = Object.keys(STATES).filter((name) => state.figures.states[name] || name === chosen);
  const choices = names.map((name) => make("option", { value: name },
    `${STATES[name][1]} (${whole.format(state.figures.states[name] || 0)})`));
  if (document.activeElement !== select) {
    replaceIfChanged(select, JSON.stringify(state.figures.states), [make("option", { value: "" }, "all"), ...choices]);
    select.value = chosen;
  }
}

function showInstances() {
  const total = Object.keys(state.who).length;
  element("filter").hidden = total < 4;
  showStateChoices();
  const found = matching();
  const size = pageRows();
  const last = Math.max(0, Math.ceil(found.length / size) - 1);
  page = Math.min(page, last);
  const shown = found.slice(page * size, (page + 1) * size);
  const rows = shown.map(({ who: [, id, models, address, startedAt], load: [condition, requests, used, all] }) => {
    const [level, word] = STATES[condition];
    let blocks = "–";
    if (used !== null) blocks = all ? `${Math.round(100 * used / all)} %` : whole.format(used);
    return make("tr", {},
      make("td", {}, badge(level, word)),
      make("th", { scope: "row", class: "id" }, id),
      make("td", { class: "wide" }, models || "–"),
      make("td", { class: "wide" }, address),
      make("td", { class: "number" }, whole.format(requests)),
      make("td", { class: "number" }, blocks),
      make("td", { class: "number wide" }, startedAt ? since(state.now - startedAt) : "–"));
  });
  if (!rows.length) {
    rows.push(make("tr", {}, make("td", { colspan: "7", class: "empty" }, "No instance matches the filter.")));
  }
  const key = rows.map((row) => row.textContent).join("\n");
  replaceIfChanged(element("instances").tBodies[0], key, rows);
  const from = found.length ? page * size + 1 : 0;
  const to = Math.min((page + 1) * size, found.length);
  setText(element("range"), `${whole.format(from)}–${whole.format(to)} of ${whole.format(found.length)}`);
  document.querySelector(".pager").hidden = last === 0;
  element("before").disabled = page === 0;
  element("after").disabled = page === last;
}

// ------------------------------------------------------------------ events

const TOLD = {
  joined: ["ok", "joined", "joined"],
  left: ["none", "left", "left"],
  lost: ["bad", "is lost: its lease ended", "are lost: their leases ended"],
  missing: ["warn", "is missing since Redis lost its history", "are missing since Redis lost its history"],
  down: ["bad", "does not answer", "do not answer"],
  silent: ["warn", "is slow to answer", "are slow to answer"],
  failing: ["bad", "fails requests, and is passed over", "fail requests, and are passed over"],
  suspect: ["warn", "left the registry, and is kept while it answers", "left the registry, and are kept while they answer"],
  recovered: ["ok", "answers again", "answer again"],
  hangs: ["bad", "hangs", "hang"],
};

function told([, kind, subject, times, detail]) {
  if (kind in TOLD) {
    const [level, one, many] = TOLD[kind];
    const words = times === 1 ? `Instance ${detail} of ${subject} ${one}` : `${whole.format(times)} instances of ${subject} ${many}`;
    return [level, words];
  }
  switch (kind) {
    case "migrated":
      return ["warn", `${count(times, "answer", "answers")} migrated to another instance`];
    case "failed_over":
      return ["warn", `${count(times, "request", "requests")} failed over to another instance`];
    case "overloaded":
      return ["warn", `${count(times, "request", "requests")} refused because of overload`];
    case "model_served":
      return ["ok", `Model ${subject} is served`];
    case "model_ended":
      return ["bad", `Model ${subject} is no longer served`];
    case "redis_lost":
      return ["bad", "Redis lost: it does not answer"];
    case "redis_back":
      return ["ok", "Redis is back"];
    case "redis_refuses":
      return ["bad", `Redis refuses writes: ${detail}`];
    default:
      return ["none", `${kind} ${subject} ${detail}`];
  }
}

function showEvents() {
  const events = Object.entries(state.events).sort(([, a], [, b]) => b[0] - a[0]);
  const shown = showsAllEvents ? events : events.slice(0, fewEvents());
  const rows = shown.map(([, event]) => {
    const [level, words] = told(event);
    const at = new Date(event[0] * 1000).toISOString();
    return make("li", { "data-level": level }, make("time", { datetime: at }, moment(event[0])),
      make("span", { class: "dot", "aria-hidden": "true" }), make("p", {}, words));
  });
  if (!rows.length) rows.push(make("li", { class: "empty-row" }, make("p", { class: "empty" }, "Nothing has happened since the frontend started.")));
  replaceIfChanged(element("events"), JSON.stringify(shown), rows);
  const more = element("more");
  more.hidden = events.length <= fewEvents();
  setText(more, showsAllEvents ? "Show fewer" : `Show all ${whole.format(events.length)}`);
}

// ------------------------------------------------------------------ the stream

let stopped = null;
let lastAt = 0;
let pauseMs = 500;
let timer = 0;

function note(level, text) {
  element("live").dataset.level = level;
  setText(element("live-text"), text);
}

async function follow() {
  const controller = new AbortController();
  stopped = controller;
  lastAt = Date.now();
  const watchdog = setInterval(() => {
    if (Date.now() - lastAt > SILENT_MS) controller.abort();
  }, 1000);
  try {
    const response = await fetch("dashboard/events", { cache: "no-store", signal: controller.signal });
    if (response.status === 401) throw new Error("The frontend asks for another API key: load the page again.");
    if (!response.ok) throw new Error(`It answers ${response.status}.`);
    await read(response.body.getReader());
    throw new Error("It has ended the stream.");
  } catch (error) {
    if (document.hidden) return false;
    lost(error);
    return true;
  } finally {
    clearInterval(watchdog);
    controller.abort();
  }
}

async function read(reader) {
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    lastAt = Date.now();
    const parts = (rest + decoder.decode(value, { stream: true })).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const found = /^event: (\w+)\ndata: (.*)$/.exec(part);
      if (found === null) continue; // a comment
      apply(found[1], JSON.parse(found[2]));
      pauseMs = 500;
      document.body.classList.remove("stale");
      note("ok", `Live · ${clock(state.now)}`);
      show();
    }
  }
}

function lost(error) {
  document.body.classList.add("stale");
  note("bad", "Not connected");
  const words = error instanceof TypeError || error.name === "AbortError" ? "It does not answer." : error.message;
  const last = state === null ? "Nothing is known yet." : `Below is the state of ${clock(state.now)}.`;
  setVerdict("bad", "No connection to the frontend", `${words} ${last} Trying again.`);
}

async function keepFollowing() {
  clearTimeout(timer);
  if (stopped !== null && !stopped.signal.aborted) return;
  if (await follow()) {
    timer = setTimeout(keepFollowing, pauseMs * (0.75 + Math.random() / 2));
    pauseMs = Math.min(2 * pauseMs, LONGEST_PAUSE_MS);
  }
}

document.addEventListener("visibilitychange", () => { // a hidden page costs nothing
  if (document.hidden) {
    clearTimeout(timer);
    if (stopped !== null) stopped.abort();
    note("none", "Paused");
  } else {
    keepFollowing();
  }
});
for (const id of ["find", "state", "order"]) {
  element(id).addEventListener("input", () => {
    page = 0;
    show();
  });
}
element("filter").addEventListener("submit", (event) => event.preventDefault());
element("before").addEventListener("click", () => {
  page -= 1;
  show();
});
element("after").addEventListener("click", () => {
  page += 1;
  show();
});
for (const query of [PHONE, ONE_COLUMN]) query.addEventListener("change", show);
element("more").addEventListener("click", () => {
  showsAllEvents = !showsAllEvents;
  show();
});

keepFollowing();
