"use strict";
// The page's own examples; everything else comes from the server's API.
const SAMPLES = {
  "Support tickets": ["tickets", `I was charged twice => billing
please refund my last order => billing
the app crashes when I open it => bug
the page stays blank => bug
where is my parcel => delivery
the courier never came => delivery`, "my screen is frozen\nmoney is missing from my card\nthe box has not arrived"],
  "客服意图": ["kefu", `我的包裹还没到 => 物流
快递显示已签收但我没拿到 => 物流
我想退款 => 退款
请把钱退给我 => 退款
忘记密码了 => 账户
怎么修改手机号 => 账户`, "包裹在哪里\n登录不了"],
  "Replies in a style": ["replies", `My kettle leaks. => Ahoy! A new kettle sails to you today.
My lamp is broken. => Ahoy! A new lamp sails to you today.
My chair wobbles. => Ahoy! A new chair sails to you today.
My phone is dead. => Ahoy! A new phone sails to you today.`, "My clock stopped.", true],
};
const $ = (id) => document.getElementById(id);
let base = "", chosen = null, lastId = null, curls = [];

function el(tag, text = "", properties = {}) {
  return Object.assign(document.createElement(tag), { textContent: text }, properties);
}

async function api(path, body, method) {
  const key = sessionStorage.getItem("key");
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: method || (body ? "POST" : "GET"), headers, body: body && JSON.stringify(body) });
  } catch {
    throw new Error("The server does not answer. Is it still running?");
  }
  const content = await response.json().catch(() => ({}));
  if (response.ok) return content;
  if (response.status === 401) { $("key-form").hidden = false; $("key").focus(); }
  const error = new Error(content.error?.message || `The server answered ${response.status}.`);
  throw Object.assign(error, { status: response.status, field: content.error?.param });
}

function parse(text) {
  const examples = [], badLines = [];
  text.split("\n").forEach((line, index) => {
    if (!line.trim()) return;
    let example = null;
    if (line.trim().startsWith("{")) {
      try { example = JSON.parse(line); } catch { /* a bad line */ }
      if (!(example && (example.messages || (example.input && typeof example.target === "string")))) example = null;
    } else {
      const [input, ...rest] = line.split(line.includes("\t") ? "\t" : "=>");
      if (input.trim() && rest.join("").trim()) example = { input: input.trim(), target: rest.join("=>").trim() };
    }
    if (example) examples.push(example); else badLines.push(index + 1);
  });
  return { examples, badLines };
}

function count() {
  const { examples, badLines } = parse($("examples").value);
  const targets = new Set(examples.map((example) => example.target));
  const warning = badLines.length ? `; line ${badLines.slice(0, 5).join(", ")} has no answer` : "";
  const summary = `${examples.length} examples, ${targets.size} different answers${warning}`;
  $("count").textContent = examples.length || badLines.length ? summary : "";
}

function show(parent, ...nodes) { parent.replaceChildren(...nodes); }

function showError(parent, error) { show(parent, el("p", error.message, { className: "error" })); }

async function busy(button, work) {
  button.disabled = true; button.setAttribute("aria-busy", "true");
  try { await work(); } finally { button.disabled = false; button.removeAttribute("aria-busy"); }
}

function curl(path, body) {
  const key = $("key-form").hidden && !sessionStorage.getItem("key") ? "" : " \\\n  -H 'Authorization: Bearer '$KEY";
  return `curl ${location.origin}${path}${key} \\\n  -d '${JSON.stringify(body).replaceAll("'", "'\\''")}'`;
}

function showCurl(index, path, body) {
  curls[index] = curl(path, body);
  $("curl").textContent = curls.filter(Boolean).join("\n\n");
  $("curl-section").hidden = false;
}

$("teach").addEventListener("submit", (event) => {
  event.preventDefault();
  busy($("learn"), async () => {
    const { examples, badLines } = parse($("examples").value);
    try {
      if (badLines.length) throw new Error(`Line ${badLines[0]}: expected "text => answer".`);
      const body = { name: $("name").value, examples, ...($("written").checked && { kind: "text" }) };
      const adapter = await api("/v1/adapters", body);
      curls = [];
      showCurl(0, "/v1/adapters", body);
      const result = adapter.loss_before === null ? "kept as they are" : `loss ${losses(adapter, 3)}`;
      const line = el("p", "", { className: "big" });
      line.append(el("b", adapter.name), ` learned ${adapter.examples} examples in ${adapter.seconds.toFixed(2)} s: ${result}`);
      show($("learned"), line);
      choose(adapter);
      await listAdapters();
    } catch (error) { showError($("learned"), error); }
  });
});

function losses(adapter, digits) {
  const { loss_before: before, loss_after: after } = adapter;
  return before === null ? "" : `${before.toFixed(digits)} → ${after.toFixed(digits)}`;
}

function choose(adapter) {
  chosen = adapter;
  $("chosen").textContent = adapter ? adapter.name : "no adapter yet";
  $("ask").disabled = !adapter;
  show($("answers"));
  markChosen();
}

function markChosen() {
  for (const row of $("adapters").tBodies[0].rows) {
    if (row.dataset.id === chosen?.id) row.setAttribute("aria-current", "true"); else row.removeAttribute("aria-current");
  }
}

async function askBoth(inputs) {
  const query = { model: chosen.model, input: inputs };
  try {
    const ofAdapter = await api("/v1/classify", query);
    showCurl(1, "/v1/classify", query);
    const options = Object.keys(ofAdapter.data[0].probabilities);
    const ofBase = await api("/v1/classify", { ...query, model: base, options });
    return [ofBase.data, ofAdapter.data];
  } catch (error) {
    if (error.field !== "options") throw error;  // without labels, the adapter writes a text
  }
  const prompt = { model: chosen.model, prompt: inputs, max_tokens: 64 };
  const ofAdapter = await api("/v1/completions", prompt);
  showCurl(1, "/v1/completions", prompt);
  const ofBase = await api("/v1/completions", { ...prompt, model: base });
  return [ofBase, ofAdapter].map((completion) => [...completion.choices].sort((a, b) => a.index - b.index));
}

function answerCard(title, answer, className) {
  const card = el("div", "", { className });
  card.append(el("h3", title), el("p", answer.label ?? (answer.text.trim() || "(nothing)"), { className: "answer" }));
  const ranked = Object.entries(answer.probabilities || {}).sort((a, b) => b[1] - a[1]).slice(0, 6);
  for (const [label, probability] of ranked) {
    const bar = el("div", "", { className: "bar" });
    const line = el("i", "", { ariaHidden: "true" });
    line.style.setProperty("--share", `${100 * probability}%`);
    bar.append(el("span", label), el("span", `${(100 * probability).toFixed(1)} %`), line);
    card.append(bar);
  }
  return card;
}

$("try").addEventListener("submit", (event) => {
  event.preventDefault();
  busy($("ask"), async () => {
    const inputs = $("inputs").value.split("\n").map((line) => line.trim()).filter(Boolean);
    try {
      const [ofBase, ofAdapter] = await askBoth(inputs);
      show($("answers"), ...inputs.flatMap((input, index) => {
        const sides = el("div", "", { className: "sides" });
        sides.append(answerCard("Base", ofBase[index], "base"), answerCard(chosen.name, ofAdapter[index], "adapter"));
        return [el("p", input, { className: "asked" }), sides];
      }));
    } catch (error) { showError($("answers"), error); }
  });
});

function adapterRow(adapter) {
  const row = el("tr");
  row.dataset.id = adapter.id;
  const name = el("th", adapter.name, { scope: "row", title: adapter.id });
  const time = new Date(1000 * adapter.created).toLocaleString();
  const actions = el("td", "", { className: "do" });
  row.append(name, el("td", adapter.examples), el("td", losses(adapter, 2)), el("td", time), actions);
  showActions(adapter, actions);
  return row;
}

function showActions(adapter, actions) {
  const use = el("button", "Try", { type: "button", ariaLabel: `Try ${adapter.name}` });
  const remove = el("button", "Delete", { type: "button", ariaLabel: `Delete ${adapter.name}` });
  use.addEventListener("click", () => { choose(adapter); $("inputs").focus(); });
  remove.addEventListener("click", () => confirmDelete(adapter, actions));
  show(actions, use, remove);
}

function confirmDelete(adapter, actions) {
  const yes = el("button", "Delete for good", { type: "button", className: "danger", ariaLabel: `Delete ${adapter.name} for good` });
  const no = el("button", "Keep", { type: "button", ariaLabel: `Keep ${adapter.name}` });
  no.addEventListener("click", () => { showActions(adapter, actions); actions.lastChild.focus(); });
  yes.addEventListener("click", () => busy(yes, async () => {
    try {
      await api(`/v1/adapters/${adapter.id}`, null, "DELETE");
      if (chosen?.id === adapter.id) choose(null);
      await listAdapters();
      show($("status"), `${adapter.name} is deleted.`);
      $("list-title").tabIndex = -1;
      $("list-title").focus();
    } catch (error) { showError($("status"), error); }
  }));
  show(actions, yes, no);
  no.focus();
}

async function listAdapters(after = "") {
  const page = await api(`/v1/adapters${after ? `?after=${encodeURIComponent(after)}` : ""}`);
  const body = $("adapters").tBodies[0];
  const rows = page.data.sort((a, b) => b.created - a.created).map(adapterRow);
  if (after) body.append(...rows); else body.replaceChildren(...rows);
  lastId = page.last_id;
  $("more").hidden = !page.has_more;
  $("adapters").hidden = !body.rows.length;
  $("none").hidden = body.rows.length > 0;
  markChosen();
}

async function start() {
  try {
    const models = await api("/v1/models");
    base = models.data.find((model) => !model.parent).id;
    $("base").textContent = base;
    $("key-form").hidden = true;
    await listAdapters();
    show($("status"));
  } catch (error) { showError($("status"), error); }
}

for (const name of Object.keys(SAMPLES)) $("sample").append(el("option", name, { value: name }));
$("sample").addEventListener("change", () => {
  if (!$("sample").value) return;
  const [name, examples, inputs, written] = SAMPLES[$("sample").value];
  [$("name").value, $("examples").value, $("inputs").value] = [name, examples, inputs];
  $("written").checked = Boolean(written);
  count();
});
$("examples").addEventListener("input", count);
$("more").addEventListener("click", () => listAdapters(lastId).catch((error) => showError($("status"), error)));
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value);
  start();
});
$("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText($("curl").textContent);
    show($("copied"), "Copied.");
  } catch {
    getSelection().selectAllChildren($("curl"));
    show($("copied"), "Selected; copy it with Ctrl+C.");
  }
});
start();
