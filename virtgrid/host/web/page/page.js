// The page of a host: asks once a second what its migrations do, and shows it. No libraries, nothing from
// outside; text from the host is put in as text, never as markup.
"use strict";

const API = "/api/v1";
const HISTORY_S = 120;
const BUSY_SHOWN = 5;
const STEPS = [["prepare", ["preflight", "prepare"]], ["storage", ["storage"]], ["precopy", ["precopy"]],
  ["hold", ["hold"]], ["switchover", ["release", "switchover"]], ["verify", ["verify", "cleanup"]]];

const $ = (selector, from = document) => from.querySelector(selector);
const state = { host: null, cards: new Map(), tables: new Map(), histories: new Map(), failures: 0 };

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined && text !== null) made.textContent = text;
  if (className) made.className = className;
  return made;
}

// -- words ---------------------------------------------------------------------------------------

function duration(s) {
  if (s === null || s === undefined) return "";
  if (s < 1) return `${Math.round(s * 1000)} ms`;
  if (s < 60) return `${s < 10 ? s.toFixed(1) : Math.round(s)} s`;
  const whole = Math.round(s), hours = Math.floor(whole / 3600), minutes = Math.floor(whole / 60) % 60;
  const rest = String(whole % 60).padStart(2, "0");
  return hours ? `${hours}h${String(minutes).padStart(2, "0")}m` : `${minutes}m${rest}s`;
}

function size(bytes) {
  if (bytes === null || bytes === undefined) return "";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (bytes >= 1024 && at < units.length - 1) { bytes /= 1024; at += 1; }
  return `${at && bytes < 100 ? bytes.toFixed(1) : Math.round(bytes)} ${units[at]}`;
}

function moment(iso) {
  if (!iso) return "";
  const at = new Date(iso);
  const two = (n) => String(n).padStart(2, "0");
  return `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())} ${two(at.getHours())}:${two(at.getMinutes())}`;
}

const path = (migration) => encodeURIComponent(migration.id);

// -- asking --------------------------------------------------------------------------------------

async function ask(what, options = {}) {
  const answer = await fetch(API + what, { cache: "no-store", signal: AbortSignal.timeout(8000), ...options });
  const said = await answer.json();
  if (!answer.ok) throw new Error([said.title, said.detail, said.hint].filter(Boolean).join(" – "));
  return said;
}

function link(good, text) {
  const shown = $("#link");
  shown.className = good ? "link good" : "link bad";
  if (shown.textContent !== text) shown.textContent = text;
}

function tell(text, bad) {
  const told = $("#told");
  told.textContent = text;
  told.className = bad ? "told bad" : "told";
  told.hidden = false;
  clearTimeout(tell.timer);
  tell.timer = setTimeout(() => { told.hidden = true; }, 8000);
}

async function look() {
  try {
    if (!state.host) {
      state.host = await ask("/host");
      $("#host").textContent = state.host.host;
      $("#who").textContent = `as ${state.host.who}${state.host.may_steer ? "" : ", to look"}`;
      document.title = `virtgrid ${state.host.host}`;
      $("#grid").hidden = !state.host.grid;
    }
    const found = await ask("/migrations?limit=100");
    showMigrations(found);
    if (state.host.grid) {
      const [jobs, reservations] = await Promise.all([ask("/jobs"), ask("/reservations")]);
      showJobs(jobs);
      showReservations(reservations);
    }
    state.failures = 0;
    link(true, "live");
  } catch (error) {
    state.failures += 1;
    state.host = null;
    link(false, `not answering: ${error.message}`);
  }
  const pause = document.hidden ? 10000 : Math.min(1000 * 2 ** Math.max(0, state.failures - 1), 15000);
  look.timer = setTimeout(look, pause);
}

// -- running -------------------------------------------------------------------------------------

function showMigrations(found) {
  const running = found.migrations.filter((one) => one.outcome === "running");
  for (const [id, card] of state.cards) {
    if (!running.some((one) => one.id === id)) { card.remove(); state.cards.delete(id); state.histories.delete(id); }
  }
  for (const one of running) {
    let card = state.cards.get(one.id);
    if (!card) {
      card = $("#card").content.firstElementChild.cloneNode(true);
      $(".release", card).addEventListener("click", () => steer(card.migration, "release"));
      $(".abort", card).addEventListener("click", () => steer(card.migration, "abort"));
      state.cards.set(one.id, card);
      $("#running").append(card);
    }
    card.migration = one;
    fill(card, one);
  }
  $("#none-running").hidden = running.length > 0;
  const over = found.migrations.filter((one) => one.outcome !== "running");
  rows("ended", over, (one) => [
    ["when", moment(one.started_at), "began"], ["", one.domain], ["", `${one.source} → ${one.destination}`],
    ["", one.verdict], ["n", duration(one.held_s), "held"], ["n", duration(one.downtime_s), "stood still"],
    ["n", one.unsuitable_at_pause, "unsuitable then"], ["", report(one)],
  ], (one) => one.outcome === "finished" ? "" : "bad");
  const unreadable = found.unreadable.map((one) => `${one.journal}: ${one.why}`);
  if (state.tables.get("unreadable") !== unreadable.join("\n")) {
    state.tables.set("unreadable", unreadable.join("\n"));
    $("#unreadable").replaceChildren(...unreadable.map((text) => element("li", text)));
  }
}

function report(one) {
  const made = element("a", "report");
  made.href = `/report/${path(one)}`;
  return made;
}

function fill(card, one) {
  const name = $(".domain", card);
  name.textContent = one.domain;
  name.href = `/report/${path(one)}`;
  $(".way", card).textContent = `${one.source} → ${one.destination}`;
  const pill = $(".pill", card);
  pill.textContent = one.state;
  pill.className = `pill ${one.state.replace(/ .*/, "")}`;
  $(".lasted", card).textContent = one.for_s === null ? "" : `for ${duration(one.for_s)}`;
  $(".id", card).textContent = one.id;
  $(".steps", card).replaceChildren(...steps(one));
  $(".waiting", card).textContent = waiting(one.waiting_for);
  const share = one.state === "copying storage" ? one.progress.storage : one.state === "precopy" ? one.progress.first_pass : null;
  const shown = share !== null && share < 1;
  $("progress", card).hidden = !shown;
  $("progress", card).value = shown ? share : 0;
  $(".share", card).textContent = shown ? `${Math.floor(share * 100)} % of ${one.state === "precopy" ? "memory, first pass" : "the disks"}` : "";
  connections(card, one);
  const memory = one.progress;
  $(".memory", card).textContent = memory.remaining_bytes === null ? "" : [
    `memory: ${size(memory.remaining_bytes)} remaining`,
    memory.dirty_bytes_s === null ? "" : `${size(memory.dirty_bytes_s)}/s dirtied`,
    memory.speed_bytes_s === null ? "" : `${size(memory.speed_bytes_s)}/s sent`,
  ].filter(Boolean).join(", ");
  const may = state.host && state.host.may_steer;
  $(".buttons", card).hidden = !may;
  $(".release", card).disabled = one.state !== "holding";
}

function steps(one) {
  return STEPS.map(([label, names]) => {
    const spans = one.phases.filter((span) => names.includes(span.phase));
    const mark = !spans.length ? "" : spans.some((span) => span.broken) ? "broken" : spans.at(-1).end_s === null ? "now" : "done";
    return element("li", `${{ "": "○", broken: "✗", now: "●", done: "✓" }[mark]} ${label}`, mark);
  });
}

function waiting(one) {
  if (!one) return "";
  const limit = one.hold_max_s === null ? "" : ` of at most ${duration(one.hold_max_s)}${one.then ? `, then ${one.then}` : ""}`;
  return `held ${duration(one.hold_s)}${limit}; waiting for ${one.text}`;
}

function connections(card, one) {
  const counts = one.connections;
  $(".verdicts", card).hidden = $(".history", card).hidden = !counts;
  if (!counts) { $(".busy", card).replaceChildren(); return; }
  const parts = { suitable: counts.suitable, unsuitable: counts.unsuitable - counts.unknown, unknown: counts.unknown };
  const bar = $(".bar", card);
  bar.replaceChildren(...Object.entries(parts).filter(([, n]) => n > 0).map(([kind, n]) => {
    const part = element("i", null, kind);
    part.style.flexGrow = n;
    return part;
  }));
  const words = Object.entries(parts).map(([kind, n]) => `${n} ${kind}`);
  bar.setAttribute("aria-label", `connections: ${words.join(", ")}`);
  const allowed = one.waiting_for ? one.waiting_for.allowed : null;
  $(".legend", card).replaceChildren(...Object.entries(parts).flatMap(([kind, n]) => {
    return [element("b", n, kind), document.createTextNode(` ${kind}  `)];
  }), document.createTextNode(allowed === null ? "" : `· switches at ${allowed} unsuitable${allowed ? " or fewer" : ""}`));
  history(card, one, counts.unsuitable, allowed);
  const busy = one.busy.slice(0, BUSY_SHOWN).map((conn) => {
    const line = element("li");
    line.append(element("span", `${conn.client} ${conn.protocol}: ${conn.reason}`), element("span", duration(conn.for_s)));
    return line;
  });
  const more = counts.unsuitable - busy.length;
  if (more > 0 && busy.length) busy.push(element("li", `and ${more} more`, "faint"));
  $(".busy", card).replaceChildren(...busy);
}

function history(card, one, unsuitable, allowed) {
  const now = performance.now() / 1000;
  const seen = (state.histories.get(one.id) || []).filter(([at]) => now - at < HISTORY_S);
  seen.push([now, unsuitable, allowed]);
  state.histories.set(one.id, seen);
  const top = Math.max(1, ...seen.map(([, n, limit]) => Math.max(n, limit ?? 0)));
  const x = (at) => (240 * (1 - (now - at) / HISTORY_S)).toFixed(1);
  const y = (n) => (37 - 34 * n / top).toFixed(1);
  const drawn = (value) => seen.filter((row) => row[value] !== null).map((row, at) => `${at ? "L" : "M"}${x(row[0])} ${y(row[value])}`).join("");
  const picture = $(".history", card);
  $(".line", picture).setAttribute("d", drawn(1));
  $(".allowed", picture).setAttribute("d", drawn(2));
  picture.setAttribute("aria-label", `unsuitable connections in the last two minutes, ${unsuitable} now, at most ${top}`);
}

// -- tables --------------------------------------------------------------------------------------

function rows(id, found, cells, kind = () => "") {
  const key = JSON.stringify(found);
  if (state.tables.get(id) === key) return;
  state.tables.set(id, key);
  $(`#${id} tbody`).replaceChildren(...found.map((one) => {
    const row = element("tr", null, kind(one));
    for (const [className, value, label] of cells(one)) {
      const cell = element("td", null, className);
      if (label) cell.dataset.label = label;
      cell.append(value ?? "");
      row.append(cell);
    }
    return row;
  }));
  const none = $(`#none-${id}`);
  if (none) none.hidden = found.length > 0;
}

const seconds = (s) => moment(new Date(s * 1000).toISOString());

function showJobs(said) {
  const jobs = [...said.jobs].sort((a, b) => b.submitted_at_s - a.submitted_at_s).slice(0, 50);
  rows("jobs", jobs, (one) => [
    ["", one.id], ["", one.state], ["when", seconds(one.window.begins_at_s), "begins"], ["n", one.nodes, "nodes"],
    ["", one.sites.join(", ")], ["", one.argv.join(" ").slice(0, 80)], ["", one.reason],
  ], (one) => one.verdict && one.verdict !== "DONE" ? "bad" : "");
  $("#none-jobs").textContent = said.why || "None.";
}

function showReservations(said) {
  const found = [...said.reservations].sort((a, b) => b.window.begins_at_s - a.window.begins_at_s).slice(0, 50);
  rows("reservations", found, (one) => [
    ["", one.id], ["", one.state], ["when", seconds(one.window.begins_at_s), "begins"],
    ["n", duration(one.window.lasts_s), "lasts"], ["n", one.nodes, "nodes"], ["", one.sites.join(", ")], ["", one.reason],
  ]);
  $("#none-reservations").textContent = said.why || "None.";
}

// -- steering ------------------------------------------------------------------------------------

function steer(one, verb) {
  const waits = one.connections ? ` ${one.connections.unsuitable} of its ${one.connections.total} connections are not suitable now.` : "";
  $("#question").textContent = verb === "release"
    ? `Let ${one.domain} switch over now?${waits}`
    : `End the migration of ${one.domain}? It stays at ${one.source}.`;
  $("#yes").textContent = verb === "release" ? "Let go" : "Abort it";
  // The dialog's end is told later, maybe after it was opened again: what was agreed to is said once.
  let agreed = false;
  $("#yes").onclick = () => { agreed = true; };
  $("#sure").onclose = () => {
    if (agreed) { agreed = false; send(one, verb); }
  };
  $("#sure").showModal();
}

async function send(one, verb) {
  try {
    const said = await ask(`/migrations/${path(one)}/${verb}`, {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ by: "the web page" }),
    });
    tell(said.text || "It has been told.");
  } catch (error) {
    tell(error.message, true);
  }
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) { clearTimeout(look.timer); look(); }
});
look();
