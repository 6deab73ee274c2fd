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
let base = "", chosen = null, last = null, curls = [];

function el(tag, text = "", properties = {}) {
  return Object.assign(document.createElement(tag), { textContent: text }, properties);
}

async function api(path, body, method) {
  const key = sessionStorage.getItem("key");
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method: method || (body ? "POST" : "GET"), headers, body: body && JSON.stringify(body) });
  } catch {
    throw new Error("The server does not answer. Is it still running?");
  }
  const found = await answer.json().catch(() => ({}));
  if (answer.ok) return found;
  if (answer.status === 401) { $("key-form").hidden = false; $("key").focus(); }
  const error = new Error(found.error?.message || `The server answered ${answer.status}.`);
  throw Object.assign(error, { status: answer.status, field: found.error?.param });
}

function parse(text) {
  const examples = [], wrong = [];
  text.split("\n").forEach((line, place) => {
    if (!line.trim()) return;
    let pair = null;
    if (line.trim().startsWith("{")) {
      try { pair = JSON.parse(line); } catch { /* said below */ }
      if (!(pair && (pair.messages || (pair.input && typeof pair.target === "string")))) pair = null;
    } else {
      const [input, ...rest] = line.split(line.includes("\t") ? "\t" : "=>");
      if (input.trim() && rest.join("").trim()) pair = { input: input.trim(), target: rest.join("=>").trim() };
    }
    if (pair) examples.push(pair); else wrong.push(place + 1);
  });
  return { examples, wrong };
}

function count() {
  const { examples, wrong } = parse($("examples").value);
  const targets = new Set(examples.map((example) => example.target));
  const lines = wrong.length ? `; line ${wrong.slice(0, 5).join(", ")} has no answer` : "";
  $("count").textContent = examples.length || wrong.length ? `${examples.length} examples, ${targets.size} different answers${lines}` : "";
}

function show(place, ...nodes) { place.replaceChildren(...nodes); }

function fail(place, error) { show(place, el("p", error.message, { className: "error" })); }

async function busy(button, work) {
  button.disabled = true; button.setAttribute("aria-busy", "true");
  try { await work(); } finally { button.disabled = false; button.removeAttribute("aria-busy"); }
}

function curl(path, body) {
  const key = $("key-form").hidden && !sessionStorage.getItem("key") ? "" : " \\\n  -H 'Authorization: Bearer '$KEY";
  return `curl ${location.origin}${path}${key} \\\n  -d '${JSON.stringify(body).replaceAll("'", "'\\''")}'`;
}

function note(place, path, body) {
  curls[place] = curl(path, body);
  $("curl").textContent = curls.filter(Boolean).join("\n\n");
  $("curl-section").hidden = false;
}

$("teach").addEventListener("submit", (event) => {
  event.preventDefault();
  busy($("learn"), async () => {
    const { examples, wrong } = parse($("examples").value);
    try {
      if (wrong.length) throw new Error(`Line ${wrong[0]}: expected "text => answer".`);
      const body = { name: $("name").value, examples, ...($("written").checked && { kind: "text" }) };
      const found = await api("/v1/adapters", body);
      curls = [];
      note(0, "/v1/adapters", body);
      const loss = found.loss_before === null ? "kept as they are" : `loss ${found.loss_before.toFixed(3)} → ${found.loss_after.toFixed(3)}`;
      show($("learned"), el("p", "", { className: "big" }));
      $("learned").firstChild.append(el("b", found.name), ` learned ${found.examples} examples in ${found.seconds.toFixed(2)} s: ${loss}`);
      choose(found);
      await list();
    } catch (error) { fail($("learned"), error); }
  });
});

function choose(adapter) {
  chosen = adapter;
  $("chosen").textContent = adapter ? adapter.name : "no adapter yet";
  $("ask").disabled = !adapter;
  show($("answers"));
  for (const row of $("adapters").tBodies[0].rows) {
    if (adapter && row.dataset.id === adapter.id) row.setAttribute("aria-current", "true"); else row.removeAttribute("aria-current");
  }
}

async function asked(inputs) {
  const body = { model: chosen.model, input: inputs };
  try {
    const own = await api("/v1/classify", body);
    note(1, "/v1/classify", body);
    const options = Object.keys(own.data[0].probabilities);
    const plain = await api("/v1/classify", { model: base, input: inputs, options });
    return [plain.data, own.data];
  } catch (error) {
    if (error.field !== "options") throw error;  // an adapter without labels writes
  }
  const writing = { model: chosen.model, prompt: inputs, max_tokens: 64 };
  const own = await api("/v1/completions", writing);
  note(1, "/v1/completions", writing);
  const plain = await api("/v1/completions", { ...writing, model: base });
  return [plain, own].map((found) => [...found.choices].sort((a, b) => a.index - b.index));
}

function side(title, answer, kind) {
  const found = el("div", "", { className: kind });
  found.append(el("h3", title), el("p", answer.label ?? (answer.text.trim() || "(nothing)"), { className: "said" }));
  const ranked = Object.entries(answer.probabilities || {}).sort((a, b) => b[1] - a[1]).slice(0, 6);
  for (const [label, probability] of ranked) {
    const bar = el("div", "", { className: "bar" });
    const line = el("i", "", { ariaHidden: "true" });
    line.style.setProperty("--share", `${100 * probability}%`);
    bar.append(el("span", label), el("span", `${(100 * probability).toFixed(1)} %`), line);
    found.append(bar);
  }
  return found;
}

$("try").addEventListener("submit", (event) => {
  event.preventDefault();
  busy($("ask"), async () => {
    const inputs = $("inputs").value.split("\n").map((line) => line.trim()).filter(Boolean);
    try {
      const [plain, own] = await asked(inputs);
      show($("answers"), ...inputs.flatMap((input, place) => {
        const sides = el("div", "", { className: "sides" });
        sides.append(side("Base", plain[place], "base"), side(chosen.name, own[place], "adapter"));
        return [el("p", input, { className: "asked" }), sides];
      }));
    } catch (error) { fail($("answers"), error); }
  });
});

function row(adapter) {
  const found = el("tr");
  found.dataset.id = adapter.id;
  const name = el("th", adapter.name, { scope: "row", title: adapter.id });
  const loss = adapter.loss_before === null ? "" : `${adapter.loss_before.toFixed(2)} → ${adapter.loss_after.toFixed(2)}`;
  const time = new Date(1000 * adapter.created).toLocaleString();
  const actions = el("td", "", { className: "do" });
  found.append(name, el("td", adapter.examples), el("td", loss), el("td", time), actions);
  offer(adapter, actions);
  return found;
}

function offer(adapter, actions) {
  const use = el("button", "Try", { type: "button", ariaLabel: `Try ${adapter.name}` });
  const remove = el("button", "Delete", { type: "button", ariaLabel: `Delete ${adapter.name}` });
  use.addEventListener("click", () => { choose(adapter); $("inputs").focus(); });
  remove.addEventListener("click", () => confirmDelete(adapter, actions));
  show(actions, use, remove);
}

function confirmDelete(adapter, actions) {
  const yes = el("button", "Delete for good", { type: "button", className: "danger", ariaLabel: `Delete ${adapter.name} for good` });
  const no = el("button", "Keep", { type: "button", ariaLabel: `Keep ${adapter.name}` });
  no.addEventListener("click", () => { offer(adapter, actions); actions.lastChild.focus(); });
  yes.addEventListener("click", () => busy(yes, async () => {
    try {
      await api(`/v1/adapters/${adapter.id}`, null, "DELETE");
      if (chosen?.id === adapter.id) choose(null);
      await list();
      show($("said"), `${adapter.name} is deleted.`);
      $("list-title").tabIndex = -1;
      $("list-title").focus();
    } catch (error) { fail($("said"), error); }
  }));
  show(actions, yes, no);
  no.focus();
}

async function list(after = "") {
  const found = await api(`/v1/adapters${after ? `?after=${encodeURIComponent(after)}` : ""}`);
  const body = $("adapters").tBodies[0];
  const rows = found.data.sort((a, b) => b.created - a.created).map(row);
  if (after) body.append(...rows); else body.replaceChildren(...rows);
  last = found.last_id;
  $("more").hidden = !found.has_more;
  $("adapters").hidden = !body.rows.length;
  $("none").hidden = body.rows.length > 0;
  if (chosen) for (const one of body.rows) if (one.dataset.id === chosen.id) one.setAttribute("aria-current", "true");
}

async function begin() {
  try {
    const models = await api("/v1/models");
    base = models.data.find((model) => !model.parent).id;
    $("base").textContent = base;
    $("key-form").hidden = true;
    await list();
    show($("said"));
  } catch (error) { fail($("said"), error); }
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
$("more").addEventListener("click", () => list(last).catch((error) => fail($("said"), error)));
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value);
  begin();
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
begin();
