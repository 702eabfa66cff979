// The page of XentCleaner: shows what Python sends, and tells it what a person decides.
// Names, labels and texts become text nodes, never HTML. A mark appears when Python has saved it, not before.

const DECIDE = [
  { key: "k", name: "Keep", decision: "keep" },
  { key: "d", name: "Drop", decision: "drop" },
  { key: "l", name: "Likely label", decision: "likely" },
  { key: "o", name: "Other label…", decision: "other" },
  { key: "u", name: "Unsure", decision: "unsure" },
];
const KEYS = [
  ["← → ↑ ↓", "move"], ["Shift + arrows", "select several"], ["Space", "select one"], ["a", "select the page"],
  ["Esc", "select none"], ["z", "undo"], ["PgUp PgDn", "page"], ["m", "next items"],
];
const SHOWN = 6;        // classes that the chooser lists at once
const PATIENCE = 8000;  // ms until an unanswered decision is said to be unsaved

function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [k, v] of Object.entries(props)) {
    if (k.startsWith("on")) node.addEventListener(k.slice(2), v);
    else if (v !== null && v !== undefined && v !== false) node.setAttribute(k, v === true ? "" : v);
  }
  node.append(...children.filter((o) => o !== null && o !== undefined).map(asNode));
  return node;
}

function asNode(o) { return o instanceof Node ? o : String(o); }

function content(card) {
  if (card.picture) return h("img", { src: card.picture, alt: "", draggable: "false" });
  if (card.row) {
    const rows = card.row.map(([k, v]) => h("tr", {}, h("th", { scope: "row" }, k), h("td", {}, v)));
    return h("table", {}, h("tbody", {}, ...rows));
  }
  return h("p", {}, card.text);
}

function labels(card) {
  const p = (v) => (v ? h("small", {}, ` ${v}`) : null);
  const given = h("span", { class: "xc-given" }, card.given || "no single label", p(card.p_given));
  if (!card.likely) return [given];
  return [given, h("span", { class: "xc-likely" }, "→ ", card.likely, p(card.p_likely))];
}

function spoken(card, mark) {
  const likely = card.likely ? `, likely ${card.likely}` : "";
  return `${card.name}, labelled ${card.given || "no single label"}${likely}${mark ? `, decided: ${mark.text}` : ""}`;
}

// ---- the chooser of another label: type a part of its name

function chooser(classes, id, choose, close) {
  let found = [], at = 0;
  const list = h("ul", { role: "listbox", id: `${id}-classes`, "aria-label": "Classes" });
  const input = h("input", {
    type: "text", role: "combobox", "aria-controls": `${id}-classes`, "aria-expanded": "true",
    "aria-autocomplete": "list", "aria-label": "Another label: type a part of its name",
    placeholder: "Another label…", autocomplete: "off", spellcheck: "false",
    oninput: () => { at = 0; draw(); },
  });
  function draw() {
    const part = input.value.trim().toLowerCase();
    const fits = (o) => o.toLowerCase().includes(part);
    const rank = (o) => (o.toLowerCase() === part ? 0 : o.toLowerCase().startsWith(part) ? 1 : 2);
    const all = classes.map((name, k) => ({ name, k })).filter((o) => fits(o.name));
    all.sort((a, b) => rank(a.name) - rank(b.name) || a.k - b.k);
    found = all.slice(0, SHOWN);
    list.replaceChildren(...found.map((o, k) => h("li", {
      role: "option", id: `${id}-class-${k}`, "aria-selected": String(k === at), onclick: () => choose(o.k),
    }, o.name)));
    if (all.length > SHOWN) list.append(h("li", { class: "xc-more", role: "presentation" }, `and ${all.length - SHOWN} more`));
    if (!all.length) list.append(h("li", { class: "xc-more", role: "presentation" }, "no class is called that"));
    if (found.length) input.setAttribute("aria-activedescendant", `${id}-class-${at}`);
    else input.removeAttribute("aria-activedescendant");
  }
  function key(e) {
    if (e.key === "Escape") close();
    else if (e.key === "Enter") { if (found.length) choose(found[at].k); }
    else if (e.key === "ArrowDown" || e.key === "ArrowUp") {
      const step = e.key === "ArrowDown" ? 1 : -1;
      if (found.length) at = (at + step + found.length) % found.length;
      draw();
    } else return;
    e.preventDefault();
  }
  draw();
  return { node: h("div", { class: "xc-chooser" }, input, list), input, key };
}

// ---- the page

function render({ model, el }) {
  const id = `xc-${Math.random().toString(36).slice(2)}`;
  let cursor = 0, anchor = 0, selected = new Set(), sent = 0, open = null;
  let waiting = null, turning = null;  // numbers of the message in flight, and of one that brings other cards
  const queue = [];                    // sent one by one, when the last is answered: none overtakes another
  const pending = new Map();           // number of a message → its items
  const cards = () => model.get("cards");
  const state = () => model.get("state");
  const marks = () => model.get("chosen");

  const filters = h("div", { class: "xc-filters" });
  const buttons = h("div", { class: "xc-buttons", role: "toolbar", "aria-label": "Decide about the selected items" });
  const place = h("div");
  const grid = h("div", {
    class: "xc-grid", role: "listbox", tabindex: "0", "aria-multiselectable": "true", "aria-label": "Items",
    "aria-describedby": `${id}-keys`, onclick: clicked, onmousedown: (e) => { if (e.shiftKey) e.preventDefault(); },
  });
  const pager = h("div", { class: "xc-pager" });
  const said = h("div", { class: "xc-said", role: "status", "aria-live": "polite" });
  const keys = h("div", { class: "xc-keys", id: `${id}-keys` },
    ...KEYS.flatMap(([k, what]) => [h("span", {}, h("kbd", {}, k), ` ${what}`)]));
  const root = h("div", { class: "xc" }, filters, buttons, place, grid, pager, said, keys);
  el.append(root);

  // -- to Python

  function send(message, items = []) {
    const number = `${id}-${++sent}`;
    if (items.length) {
      pending.set(number, items);
      setTimeout(() => {
        if (!pending.has(number)) return;
        tell("Not saved yet: the kernel has not answered. Is it running? Run the cell again.", true);
      }, PATIENCE);
    }
    queue.push({ ...message, number });
    pump();
    return number;
  }

  function pump() {
    if (waiting || !queue.length) return;
    const message = queue.shift();
    waiting = message.number;
    model.send(message);
  }

  function chosen() {
    const at = selected.size ? [...selected].sort((a, b) => a - b) : [cursor];
    return at.filter((k) => k < cards().length);
  }

  function decide(decision, label) {
    const at = chosen();
    if (!at.length || turning) return;  // nobody decides about what is not shown yet
    const items = at.map((k) => cards()[k].item);
    send(label === undefined ? { do: "decide", items, decision } : { do: "decide", items, decision, label }, items);
    selected = new Set();
    const next = at[at.length - 1] + 1;
    if (next < cards().length) cursor = anchor = next;
    else if (state().page + 1 < state().pages) turn(1);
    else cursor = anchor = cards().length - 1;
    reveal();
  }

  function reveal() {
    paint();
    grid.children[cursor]?.scrollIntoView({ block: "nearest" });
  }

  function turn(step) {
    const to = state().page + step;
    if (to < 0 || to >= state().pages) return;
    turning = send({ do: "page", page: to });
  }

  function more() { turning = send({ do: "more" }); }

  function act(decision) {
    if (decision === "other") choose();
    else decide(decision);
  }

  function choose() {
    if (!cards().length || !state().classes.length) return;
    open = chooser(state().classes, id, (k) => { close(); decide("relabel", k); }, close);
    const card = grid.children[cursor];
    open.node.style.left = `${card.offsetLeft}px`;
    open.node.style.top = `${card.offsetTop + card.offsetHeight - 30}px`;
    place.replaceChildren(open.node);
    open.input.focus();
  }

  function close() {
    open = null;
    place.replaceChildren();
    grid.focus();
  }

  // -- moving and selecting

  function columns() {
    const tops = [...grid.children].map((o) => o.offsetTop);
    return Math.max(1, tops.filter((o) => o === tops[0]).length);
  }

  function move(to, extend) {
    const last = cards().length - 1;
    if (last < 0) return;
    cursor = Math.min(Math.max(to, 0), last);
    if (extend) {
      const [a, b] = [Math.min(anchor, cursor), Math.max(anchor, cursor)];
      selected = new Set(Array.from({ length: b - a + 1 }, (_, k) => a + k));
    } else { anchor = cursor; selected = new Set(); }
    reveal();
  }

  function toggle(k) {
    if (!selected.delete(k)) selected.add(k);
    cursor = anchor = k;
    paint();
  }

  function clicked(e) {
    const k = [...grid.children].indexOf(e.target.closest("[role=option]"));
    if (k < 0) return;
    if (e.ctrlKey || e.metaKey) toggle(k);
    else move(k, e.shiftKey);
  }

  const MOVES = {
    ArrowLeft: () => cursor - 1, ArrowRight: () => cursor + 1,
    ArrowUp: () => cursor - columns(), ArrowDown: () => cursor + columns(),
    Home: () => 0, End: () => cards().length - 1,
  };

  function pressed(e) {
    const action = DECIDE.find((o) => o.key === e.key.toLowerCase());
    if (e.key in MOVES) move(MOVES[e.key](), e.shiftKey);
    else if (e.key === "PageDown" || e.key === "PageUp") turn(e.key === "PageDown" ? 1 : -1);
    else if (e.key === " ") toggle(cursor);
    else if (e.key === "a") { selected = new Set(cards().keys()); paint(); }
    else if (e.key === "Escape") move(cursor);
    else if (e.key === "z") send({ do: "undo" });
    else if (e.key === "m") more();
    else if (action) act(action.decision);
    else return;
    e.preventDefault();
  }

  // The notebook has keys of its own, such as d d to delete a cell: it must not hear ours.
  function heard(e) {
    if (!root.contains(e.target) || e.ctrlKey || e.metaKey || e.altKey || e.key === "Tab") return;
    e.stopImmediatePropagation();
    if (open && open.node.contains(e.target)) open.key(e);
    else if (e.target.tagName === "SELECT") return;
    else if (e.target.tagName === "BUTTON" && (e.key === " " || e.key === "Enter")) return;
    else pressed(e);
  }
  window.addEventListener("keydown", heard, true);

  // -- from Python

  function tell(text, bad = false) {
    said.textContent = text;
    said.classList.toggle("xc-bad", bad);
  }

  function paint() {
    const waits = new Set([...pending.values()].flat());
    cards().forEach((card, k) => {
      const node = grid.children[k], mark = marks()[card.item];
      if (!node) return;
      node.setAttribute("aria-selected", String(selected.size ? selected.has(k) : k === cursor));
      node.setAttribute("aria-label", spoken(card, mark));
      node.classList.toggle("xc-cursor", k === cursor);
      node.classList.toggle("xc-selected", selected.has(k));
      node.classList.toggle("xc-waits", waits.has(card.item));
      node.dataset.decision = mark ? mark.decision : "";
      node.querySelector(".xc-mark").textContent = mark ? mark.text : "";
    });
    const now = grid.children[cursor];
    if (now) grid.setAttribute("aria-activedescendant", now.id);
    else grid.removeAttribute("aria-activedescendant");
    const n = chosen().length;
    buttons.setAttribute("aria-label", `Decide about ${n} item${n === 1 ? "" : "s"}`);
  }

  function drawCards() {
    cursor = anchor = 0;
    selected = new Set();
    grid.replaceChildren(...cards().map((card, k) => h("div", {
      role: "option", id: `${id}-${k}`, class: "xc-card", title: card.name,
      "aria-posinset": state().first + k + 1, "aria-setsize": state().n,
    }, h("div", { class: "xc-mark" }), h("div", { class: "xc-shown" }, content(card)),
    h("div", { class: "xc-labels" }, ...labels(card)),
    h("div", { class: "xc-name" }, h("bdi", {}, card.name), h("span", {}, card.score)))));
    if (!cards().length) grid.append(h("p", { class: "xc-none" }, state().none));
    paint();
    model.send({ do: "ahead" });  // while this page is looked at, the next one is read
  }

  function select(label, value, options, change) {
    const named = options.map(([v, text]) => h("option", { value: v, selected: String(v) === String(value) }, text));
    return h("label", {}, `${label} `, h("select", { "aria-label": label, onchange: (e) => change(e.target.value) }, ...named));
  }

  function button(text, key, act, on = true) {
    return h("button", {
      type: "button", disabled: !on, "aria-keyshortcuts": key, onclick: () => { act(); if (!open) grid.focus(); },
    }, text, " ", h("kbd", {}, key));
  }

  function drawFilters() {
    const s = state(), show = (o) => turning = send({ do: "show", split: s.split, label: s.label, kind: s.kind, ...o });
    const classes = [[-1, "all classes"], ...s.classes.map((o, k) => [k, o])];
    const was = filters.contains(document.activeElement) ? [...filters.querySelectorAll("select")].indexOf(document.activeElement) : -1;
    filters.replaceChildren(
      s.splits.length > 1 ? select("Split", s.split, s.splits.map((o) => [o, o]), (v) => show({ split: v })) : "",
      s.classes.length ? select("Labelled", s.label, classes, (v) => show({ label: Number(v) })) : "",
      select("Show", s.kind, [["todo", "to decide"], ["done", "decided"]], (v) => show({ kind: v })),
      h("span", { class: "xc-count" }, s.counted));
    if (was >= 0) filters.querySelectorAll("select")[was]?.focus();
  }

  function drawButtons() {
    const s = state(), can = { likely: s.classes.length, other: s.classes.length };
    if (buttons.children.length) return;
    const usable = DECIDE.filter((o) => can[o.decision] !== 0);
    buttons.append(...usable.map((o) => button(o.name, o.key, () => act(o.decision))),
      button("Undo", "z", () => send({ do: "undo" })));
  }

  function drawPager() {
    const s = state();
    pager.replaceChildren(
      button("Back", "PgUp", () => turn(-1), s.page > 0),
      h("span", {}, s.pages ? `Page ${s.page + 1} of ${s.pages}` : ""),
      button("On", "PgDn", () => turn(1), s.page + 1 < s.pages),
      h("progress", { max: Math.max(s.n, 1), value: s.done, "aria-label": "Decided in this list" }),
      h("span", {}, `${s.done} of ${s.n} in this list`),
      s.kind === "todo" ? button(s.more, "m", more) : "");
  }

  function answered() {
    const number = state().answered;
    pending.delete(number);
    if (number === turning) turning = null;
    if (number === waiting) waiting = null;
    pump();
    drawFilters();
    drawButtons();
    drawPager();
    tell(state().said, state().bad);
    if (state().cursor >= 0 && number?.startsWith(id)) { cursor = anchor = state().cursor; selected = new Set(); }
    paint();
  }

  model.on("change:cards", drawCards);
  model.on("change:state", answered);
  model.on("change:chosen", paint);
  drawCards();
  answered();
  return () => {
    window.removeEventListener("keydown", heard, true);
    model.off("change:cards", drawCards);
    model.off("change:state", answered);
    model.off("change:chosen", paint);
  };
}

export default { render };
