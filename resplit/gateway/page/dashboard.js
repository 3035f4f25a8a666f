// The dashboard: what the gateway tells over /dashboard/watch, drawn anew at every look. It only reads.
"use strict";

const KEPT_S = 300;            // what the plots and timelines show
const EVENTS_MAX = 200;        // of the trail, in the page
const FACTS_MAX = 6, FACT_CHARS = 60;  // of an event
const PAST_MAX = 4;            // epochs before the one in force, as strips
const COLOURS = ["#3366cc", "#c2571a", "#2a8f5b", "#a03a8c", "#8a6d00", "#107c91", "#b5304a", "#6a55c2", "#5b7a1f", "#7a5a44"];
const QUIET = new Set(["checkpoint", "request_ended", "blocks_staged", "blob_fetched", "prediction_judged"]);
const SVG = "http://www.w3.org/2000/svg";

const seen = { looks: [], events: [], finished: new Map(), last: null };
const $ = (id) => document.getElementById(id);

// --- elements: every word of the cluster is set as text, never as markup ---

function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "colour") made.style.backgroundColor = value;
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function svg(tag, attributes = {}, text = null) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== null) made.textContent = text;
  return made;
}

const titled = (shape, text) => { shape.append(svg("title", {}, text)); return shape; };

// A node keeps its colour as long as the page is open.
const coloured = new Map();
function colour(node) {
  if (!coloured.has(node)) coloured.set(node, COLOURS[coloured.size % COLOURS.length]);
  return coloured.get(node);
}

const short = (value) => /^[0-9a-f]{64}$/.test(value) ? value.slice(0, 12) : value;  // digests
const bytes = (n) => n >= 2 ** 30 ? `${(n / 2 ** 30).toFixed(1)} GiB` : `${Math.round(n / 2 ** 20)} MiB`;
const clock = (at) => new Date(at * 1000).toLocaleTimeString([], { hour12: false });
const ms = (value) => value >= 100 ? value.toFixed(0) : value.toPrecision(2);

// --- deployments: the cut as strips of blocks, coloured by node ---

function owners(route, blocks) {
  const found = new Array(blocks).fill(null);
  for (const [node, first, last] of route) for (let b = first; b <= last; b++) found[b] = node;
  return found;
}

function strip(plan, route, before, kind) {
  const picture = svg("svg", { class: `strip ${kind}`, viewBox: `0 0 ${plan.blocks * 40} 34`, preserveAspectRatio: "none", role: "img" });
  const now = owners(route, plan.blocks), old = before ? owners(before, plan.blocks) : now;
  picture.setAttribute("aria-label", route.map(([node, first, last]) => `${node}: blocks ${first} to ${last}`).join(", "));
  for (let b = 0; b < plan.blocks; b++) {
    const moved = now[b] !== old[b];
    const rect = svg("rect", { x: b * 40, y: 0, width: 40, height: 34, fill: now[b] === null ? "#999" : colour(now[b]), class: moved ? "moved" : "" });
    picture.append(titled(rect, `block ${b} on ${now[b]}${moved ? `, now on ${old[b]}` : ""}`));
  }
  return picture;
}

function legend(route) {
  return el("p", { class: "what" }, ...route.flatMap(([node, first, last]) => [
    el("span", { class: "dot", colour: colour(node) }), `${node} ${first === last ? first : `${first}-${last}`}   `,
  ]));
}

function timeline(name) {
  const to = seen.last.at, from = to - KEPT_S, picture = svg("svg", { class: "timeline", viewBox: "0 0 1000 30", preserveAspectRatio: "none" });
  const spans = [];
  for (const look of seen.looks) {
    const found = (look.deployments || []).find((one) => one.name === name);
    if (!found || !found.current) continue;
    const last = spans[spans.length - 1];
    if (last && last.epoch === found.current.epoch) last.to = look.at;
    else spans.push({ epoch: found.current.epoch, from: last ? last.to : look.at, to: look.at, plan: found.current });
  }
  const x = (at) => Math.max(0, (at - from) / KEPT_S * 1000);
  for (const span of spans) {
    const left = x(span.from), right = Math.max(left + 2, x(span.to));
    picture.append(titled(svg("rect", { x: left, y: 0, width: right - left, height: 30, class: span.epoch % 2 ? "odd" : "" }), `epoch ${span.epoch}: ${span.plan.reason}`));
    if (span !== spans[0]) picture.append(svg("line", { x1: left, x2: left, y1: 0, y2: 30 }));
  }
  // What was before, the newest first, so that it is seen what moved.
  const past = spans.slice(0, -1).reverse().slice(0, PAST_MAX).flatMap((span) => [
    el("p", { class: "what" }, `epoch ${span.epoch}, until ${clock(span.to)}${span.plan.cold ? ": cold" : ""}`),
    ...(span.plan.cold ? [] : span.plan.routes.map((route) => strip(span.plan, route, null, "past"))),
  ]);
  return [el("p", { class: "what" }, `epochs of the last ${KEPT_S / 60} minutes`), picture, ...past];
}

function deployment(found) {
  const plan = found.current, next = found.candidate;
  const facts = [found.model, plan ? `epoch ${plan.epoch}` : null, found.attained ? `objectives met: ${found.attained}` : null,
    found.estimate && found.estimate.tpot_ms ? `predicted ${ms(found.estimate.tpot_ms)} ms a token` : null];
  const card = el("article", { id: `deployment-${found.name}` }, el("h2", {}, el("b", {}, found.name),
    el("span", { class: `chip ${found.state}` }, found.state), el("span", { class: "soft" }, facts.filter(Boolean).join(" · "))));
  if (plan && plan.cold) card.append(el("p", { class: "what" }, "cold: nothing is loaded; requests are taken and wait"));
  if (plan && !plan.cold) for (const route of plan.routes) card.append(strip(plan, route, null, "now"), legend(route));
  if (next) {
    card.append(el("p", { class: "what" }, `epoch ${next.epoch} loads (${found.ready.length} nodes ready):`));
    next.routes.forEach((route, i) => card.append(strip(next, route, plan && !plan.cold ? plan.routes[Math.min(i, plan.routes.length - 1)] : null, "next"), legend(route)));
  }
  for (const old of found.draining) card.append(el("p", { class: "what" }, `epoch ${old.epoch} drains`));
  const why = (next || plan || {}).reason;
  if (why) card.append(el("p", { class: "reason" }, why));
  if (found.remarks) card.append(el("p", { class: "what" }, found.remarks));
  card.append(...timeline(found.name));
  return card;
}

// --- plots: a line a node or deployment, a dot a request, all over the same five minutes ---

function plot(id, series, top) {
  const picture = $(id), to = seen.last.at, from = to - KEPT_S, width = 300, height = 130, left = 34, bottom = 112;
  picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const values = series.flatMap((one) => one.points.map(([, value]) => value));
  const most = top || Math.max(1e-9, ...values) * 1.1;
  const x = (at) => left + (at - from) / KEPT_S * (width - left), y = (value) => bottom - Math.min(1, value / most) * (bottom - 8);
  const parts = [svg("line", { x1: left, x2: width, y1: bottom, y2: bottom }), svg("line", { x1: left, x2: width, y1: y(most / 2), y2: y(most / 2) })];
  if (values.length) {
    for (const value of [0, most / 2, most]) parts.push(svg("text", { x: 0, y: y(value) + 3 }, value === 0 ? "0" : ms(value)));
  } else parts.push(svg("text", { x: width / 2 - 30, y: 60 }, "nothing yet"));
  parts.push(svg("text", { x: left, y: height - 4 }, clock(from)), svg("text", { x: width - 46, y: height - 4 }, clock(to)));
  series.forEach((one, i) => {
    const shown = one.points.filter(([at]) => at >= from);
    if (!shown.length) return;
    const stroke = one.colour || COLOURS[i % COLOURS.length];
    const steps = shown.map(([at, value], k) => `${k && !one.dots ? "L" : "M"}${x(at).toFixed(1)} ${y(value).toFixed(1)}${one.dots ? "h0" : ""}`);
    parts.push(titled(svg("path", { d: steps.join(""), stroke, class: one.dots ? "dots" : "" }), one.name));
    if (one.dots) return;
    const [at, value] = shown[shown.length - 1];
    parts.push(titled(svg("circle", { cx: x(at), cy: y(value), r: 2.4, fill: stroke }), `${one.name}: ${ms(value)}`));
  });
  picture.replaceChildren(...parts);
  // Who has which colour: of nodes that is said above.
  const named = id === "load" || series.length < 2 ? [] : series.flatMap((one, i) => [el("span", { class: "dot", colour: one.colour || COLOURS[i % COLOURS.length] }), `${one.name}   `]);
  let legend = picture.parentElement.querySelector("p");
  if (!legend) picture.after(legend = el("p", { class: "what" }));
  legend.replaceChildren(...named);
}

function requests(field) {
  const by = new Map();
  for (const one of seen.finished.values()) {
    if (one[field] === null || one[field] === undefined) continue;
    if (!by.has(one.deployment)) by.set(one.deployment, []);
    by.get(one.deployment).push([one.at, one[field]]);
  }
  return [...by].map(([name, points]) => ({ name, points, dots: true }));
}

function over(of, pick, value, colourOf) {
  const by = new Map();
  for (const look of seen.looks) for (const one of look[of] || []) {
    const found = value(one);
    if (found === null || found === undefined) continue;
    if (!by.has(one[pick])) by.set(one[pick], []);
    by.get(one[pick]).push([look.at, found]);
  }
  return [...by].map(([name, points]) => ({ name, points, colour: colourOf ? colourOf(name) : undefined }));
}

// --- nodes, links, trail ---

function meter(value, text) {
  return el("td", { title: text }, el("meter", { value: Math.min(1, Math.max(0, value)), max: 1, high: 0.9 }), ` ${Math.round(100 * value)} %`);
}

function nodes(look) {
  const names = ["node", "state", "runs on", "load", "GPU", "memory", "sequences", "°C", "W", "heard"];
  const head = el("tr", {}, ...names.map((name) => el("th", {}, name)));
  const rows = look.nodes.map((node) => {
    const used = node.memory_total ? 1 - node.memory_free / node.memory_total : 0;
    return el("tr", {}, el("td", {}, el("span", { class: "dot", colour: colour(node.name) }), node.name),
      el("td", { class: node.lost ? "lost" : "" }, node.state), el("td", {}, `${node.device}, ${node.threads} threads`),
      meter(node.load, "share of cores that is busy"), node.gpu_load === null ? el("td", {}, "-") : meter(node.gpu_load, "of the last sampling period"),
      meter(used, `${bytes(node.memory_free)} free of ${bytes(node.memory_total)}`), el("td", {}, String(node.sequences)),
      el("td", {}, node.temperature === null ? "-" : node.temperature.toFixed(0)), el("td", {}, node.power === null ? "-" : node.power.toFixed(0)),
      el("td", {}, `${node.age} s ago`));
  });
  for (const row of rows) [...row.children].forEach((cell, i) => cell.setAttribute("data-name", names[i]));  // where there is no head
  $("nodes").replaceChildren(el("thead", {}, head), el("tbody", {}, ...rows));
}

function links(look) {
  const names = look.nodes.map((node) => node.name), by = new Map(look.links.map((link) => [`${link.from} ${link.to}`, link]));
  if (names.length > 16) {  // a matrix of more is not read by anybody: the slowest
    const worst = [...look.links].sort((a, b) => b.rtt_ms - a.rtt_ms).slice(0, 32);
    $("links").replaceChildren(...worst.map((link) => el("tr", {}, el("td", {}, `${link.from} > ${link.to}`), el("td", {}, said(link)))));
    return;
  }
  const head = el("tr", {}, el("th", {}, "from / to"), ...names.map((name) => el("th", {}, name)));
  const rows = names.map((from) => el("tr", {}, el("th", {}, from), ...names.map((to) => {
    const link = by.get(`${from} ${to}`);
    return el("td", { class: from === to ? "self" : link && !link.up ? "lost" : "" }, link ? said(link) : "");
  })));
  $("links").replaceChildren(head, ...rows);
}

function said(link) {
  const rate = link.bytes_per_s ? `, ${(link.bytes_per_s * 8 / 1e6).toFixed(0)} Mbit/s` : "";
  return `${ms(link.rtt_ms)} ms${rate}${link.direct ? "" : " (bus)"}${link.up ? "" : " DOWN"}`;
}

function events() {
  const wanted = $("filter").value.toLowerCase();
  const shown = seen.events.filter((one) => wanted ? JSON.stringify(one).toLowerCase().includes(wanted) : !QUIET.has(one.kind));
  $("events").replaceChildren(...shown.slice(-EVENTS_MAX).reverse().map((one) => {
    const about = one.deployment ? `${one.deployment}${one.epoch ? `/${one.epoch}` : ""}` : "";
    // What is long is in the trail; here it would hide the rest.
    const facts = Object.entries(one.fields).filter(([, value]) => String(short(value)).length <= FACT_CHARS)
      .slice(0, FACTS_MAX).map(([name, value]) => `${name}=${short(value)}`).join("  ");
    const mark = one.standing === "verified" ? "" : ` [${one.standing}]`;
    return el("li", {}, el("time", {}, clock(one.at)), el("span", { class: "who" }, one.source), el("b", { class: mark ? one.standing : "" }, one.kind + mark),
      el("span", { class: "said" }, `${about} ${one.message}${one.why ? `: ${one.why}` : ""} `, el("span", { class: "soft" }, facts)));
  }));
}

// --- what comes ---

function note(look) {
  seen.looks.push(look);
  seen.looks = seen.looks.filter((one) => one.at > look.at - KEPT_S);
  for (const one of look.finished || []) if (!seen.finished.has(one.key)) seen.finished.set(one.key, { ...one, at: look.at });
  for (const [key, one] of seen.finished) if (one.at < look.at - KEPT_S) seen.finished.delete(key);
  seen.last = look;
}

function draw() {
  if (!seen.last) return;
  for (const node of seen.last.nodes || []) colour(node.name);
  const silent = seen.last.silence, look = silent ? [...seen.looks].reverse().find((one) => !one.silence) : seen.last;
  $("heard").className = silent ? "silent" : "";
  $("heard").textContent = silent ? `${clock(seen.last.at)}: ${silent}` : clock(seen.last.at);
  if (!look) return;
  const others = look.standbys.length ? `, ${look.standbys.join(", ")} stand by` : "";
  $("led").textContent = look.leader ? `${look.leader} leads in term ${look.term}${others} · ${look.nodes.filter((node) => !node.lost).length} nodes up` : `term ${look.term}`;
  $("deployments").replaceChildren(...(look.deployments.length ? look.deployments.map(deployment) : [el("p", { class: "none" }, "nothing is deployed; start with: resplit deploy MODEL")]));
  nodes(look);
  links(look);
  plot("ttft", requests("ttft_ms"));
  plot("tpot", requests("tpot_ms"));
  plot("slo", over("deployments", "name", (one) => one.slo === null ? null : 100 * one.slo), 100);
  plot("load", over("nodes", "name", (one) => 100 * one.load, colour), 100);
}

const waiting = new Set();
function soon(what) {  // however much comes at once, it is drawn once
  if (waiting.size === 0) requestAnimationFrame(() => { const all = [...waiting]; waiting.clear(); all.forEach((one) => one()); });
  waiting.add(what);
}

const source = new EventSource("watch");
source.addEventListener("past", (message) => {
  const past = JSON.parse(message.data);
  Object.assign(seen, { looks: [], events: past.events, finished: new Map(), last: null });
  past.looks.forEach(note);
  soon(events);
  soon(draw);
});
source.addEventListener("look", (message) => { note(JSON.parse(message.data)); soon(draw); });
source.addEventListener("event", (message) => {
  seen.events.push(JSON.parse(message.data));
  seen.events = seen.events.slice(-2 * EVENTS_MAX);
  soon(events);
});
source.addEventListener("error", () => { $("heard").className = "silent"; $("heard").textContent = "the gateway does not answer; trying again"; });
$("filter").addEventListener("input", events);
