// Unpacks the generations, then filters, sorts and compares them. Texts are only ever set as text.
(() => {
  "use strict";
  const PAGE = 50;
  const FIRED = 1, REFUSED = 2, CUT = 4, UNENDED = 8;
  const ORDER = ["refused", "displaced", "shortened", "reworded", "fires", "answered", "other", "same"];
  const SILENCED = new Set(["refused", "displaced", "shortened", "reworded"]);
  const MAX_WORDS = 1500; // of a side: the comparison takes their product
  const root = document.documentElement;
  const by = (id) => document.getElementById(id);
  const controls = ["text", "kind", "before", "after", "change", "latent", "seed", "sort"].map(by);
  const initial = Object.fromEntries(controls.map((c) => [c.id, c.value]));
  let data = null;
  let shown = [];
  let drawn = 0;

  const dark = matchMedia("(prefers-color-scheme: dark)");
  by("theme").addEventListener("click", () => {
    const now = root.dataset.theme || (dark.matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
  });

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  // What became of one response, from a to b.
  function happened(a, b) {
    if (b.flags & REFUSED && !(a.flags & REFUSED)) return "refused";
    if (a.flags & FIRED && !(b.flags & FIRED)) {
      const had = new Set(a.fired.map(([i]) => i));
      if (b.below.length || b.fired.some(([i]) => !had.has(i))) return "displaced";
      return 2 * b.tokens < a.tokens ? "shortened" : "reworded";
    }
    if (!(a.flags & FIRED) && b.flags & FIRED) return "fires";
    if (a.flags & REFUSED && !(b.flags & REFUSED)) return "answered";
    return a.text === b.text ? "same" : "other";
  }

  // Whether a response of one policy is set beside that of another.
  function paired(a, b) {
    const from = data.policies[a.policy], to = data.policies[b.policy];
    return a.sample === b.sample && (!from.trained || !to.trained || from.seed === to.seed);
  }

  // The pairs of a prompt that the two arms make, one a seed and sample.
  function pairs(prompt, before, after, seed) {
    const of = (arm) => prompt.answers.filter(({ policy }) => {
      const { arm: its, trained, seed: own } = data.policies[policy];
      return its === arm && (seed === "" || !trained || own === +seed);
    });
    return of(after).flatMap((b) => of(before).filter((a) => paired(a, b)).map((a) => ({ a, b, what: happened(a, b) })));
  }

  const mean = (values) => (values.length ? values.reduce((sum, v) => sum + v, 0) / values.length : 0);
  const SORTS = {
    id: () => 0,
    happened: (e) => e.rank,
    reward: (e) => mean(e.pairs.map(({ a, b }) => (b.reward ?? 0) - (a.reward ?? 0))),
    length: (e) => mean(e.pairs.map(({ a, b }) => b.tokens - a.tokens)),
  };

  function filter() {
    if (!data) return;
    const [text, kind, before, after, change, latent, seed, sort] = controls.map((c) => c.value);
    const wanted = text.toLowerCase();
    const place = data.latents.findIndex((l) => String(l.latent) === latent);
    shown = [];
    for (const prompt of data.prompts) {
      if (kind && prompt.kind !== kind) continue;
      if (wanted && !prompt.words.includes(wanted)) continue;
      if (place >= 0 && !prompt.answers.some((a) => a.fired.some(([i]) => i === place))) continue;
      const found = pairs(prompt, before, after, seed);
      const fits = ({ a, b, what }) =>
        !change || what === change || (change === "silenced" && a.flags & FIRED && !(b.flags & FIRED));
      if (change && !found.some(fits)) continue;
      const counts = ORDER.map((name) => found.filter((p) => p.what === name).length);
      const first = counts.findIndex((n) => n > 0);
      const rank = first < 0 ? ORDER.length : first + 1 - counts[first] / found.length;
      shown.push({ prompt, pairs: found, counts, rank });
    }
    const key = SORTS[sort];
    shown = shown.map((e, i) => [key(e), i, e]).sort((x, y) => x[0] - y[0] || x[1] - y[1]).map((x) => x[2]);
    by("list").replaceChildren();
    drawn = 0;
    more();
    by("count").textContent = shown.length + " of " + data.prompts.length + " prompts";
    remember();
  }

  function more() {
    for (const entry of shown.slice(drawn, drawn + PAGE)) by("list").append(listed(entry));
    drawn = Math.min(drawn + PAGE, shown.length);
    by("more").hidden = drawn === shown.length;
  }

  // One prompt of the list. Its texts are made when it is opened.
  function listed(entry) {
    const { prompt, counts } = entry;
    const tags = ORDER.map((name, i) => (counts[i] ? element("span", { class: "tag " + name }, name + (counts[i] > 1 ? " × " + counts[i] : "")) : "")).filter(Boolean);
    const said = prompt.kind === "safe" ? prompt.prompt.slice(0, 90) : prompt.category || "prompt " + prompt.id;
    const summary = element("summary", {}, element("span", { class: "tag " + prompt.kind }, prompt.kind), " " + said + " ", ...tags);
    const made = element("details", { class: "sample", "data-id": prompt.id }, summary);
    made.addEventListener("toggle", () => {
      if (!made.open) return;
      if (made.children.length === 1) made.append(...opened(prompt));
      history.replaceState(null, "", link(prompt.id));
    });
    return made;
  }

  function opened(prompt) {
    const seed = by("seed").value;
    const mine = prompt.answers.filter((a) => seed === "" || !data.policies[a.policy].trained || data.policies[a.policy].seed === +seed);
    const samples = new Set(mine.map((a) => a.sample));
    const groups = new Map();
    for (const answer of mine) {
      const policy = data.policies[answer.policy];
      const of = policy.trained ? "seed " + policy.seed : "untrained";
      const name = of + (samples.size > 1 ? ", sample " + answer.sample : "");
      if (!groups.has(name)) groups.set(name, []);
      groups.get(name).push(answer);
    }
    const head = element("p", { class: "meta" }, "prompt " + prompt.id + (prompt.category ? ", " + prompt.category : "") + " ", element("a", { href: link(prompt.id) }, "link"));
    const parts = [head, element("p", { class: "prompt" }, prompt.prompt)];
    for (const [name, answers] of groups) {
      parts.push(element("h3", {}, name), element("div", { class: "answers" }, ...answers.map((a) => cell(prompt, a))));
    }
    return parts;
  }

  function cell(prompt, answer) {
    const policy = data.policies[answer.policy];
    const before = by("before").value;
    const other = policy.arm === before ? null : prompt.answers.find((one) => data.policies[one.policy].arm === before && paired(one, answer));
    const said = ["reward " + (answer.reward ?? "n/a"), answer.tokens + " tokens"];
    if (answer.kl !== null) said.push("KL " + answer.kl);
    if (answer.harm !== null) said.push("harm by the judge " + answer.harm);
    if (answer.flags & REFUSED) said.push("refuses");
    if (answer.flags & CUT) said.push("cut at the token limit");
    if (answer.flags & UNENDED) said.push("scored text does not end");
    const fired = element("p", { class: "meta" }, answer.fired.length ? "fires " : "no watched latent fires");
    answer.fired.forEach(([i, z], n) => {
      const { latent, role } = data.latents[i];
      fired.append(n ? ", " : "", element("a", { href: "cards.html#latent-" + latent, class: role }, String(latent)), " (" + role + ", z " + z + ")");
    });
    if (answer.below.length) fired.append("; just below the cutoff: " + answer.below.map((i) => data.latents[i].latent).join(", "));
    return element("div", { class: "answer", "data-policy": policy.name }, element("h4", {}, policy.words), marked(other, answer), element("p", { class: "meta" }, said.join(", ")), fired);
  }

  // The words of a response, those marked that the one before does not have.
  function marked(other, answer) {
    const made = element("p", { class: "words" });
    const to = answer.text.match(/\s+|\S+/g) ?? [];
    const from = other ? other.text.match(/\s+|\S+/g) ?? [] : null;
    if (!from || from.length > 2 * MAX_WORDS || to.length > 2 * MAX_WORDS) {
      made.append(answer.text);
      return made;
    }
    for (const [kind, text] of differences(from.filter((w) => w.trim()), to)) {
      if (kind === "same") made.append(text);
      else if (kind === "added") made.append(element("mark", {}, text));
      else if (by("removed").checked) made.append(element("del", {}, text), " ");
    }
    return made;
  }

  // Longest common subsequence by words; the spaces are those of the response after.
  function differences(from, tokens) {
    const to = tokens.filter((w) => w.trim());
    const n = from.length, m = to.length;
    const best = new Uint16Array((n + 1) * (m + 1));
    for (let i = n - 1; i >= 0; i--)
      for (let j = m - 1; j >= 0; j--)
        best[i * (m + 1) + j] = from[i] === to[j] ? best[(i + 1) * (m + 1) + j + 1] + 1 : Math.max(best[(i + 1) * (m + 1) + j], best[i * (m + 1) + j + 1]);
    const found = [];
    let i = 0, j = 0;
    for (const token of tokens) {
      if (!token.trim()) {
        found.push(["same", token]);
        continue;
      }
      while (i < n && from[i] !== token && best[(i + 1) * (m + 1) + j] >= best[i * (m + 1) + j + 1]) found.push(["removed", from[i++]]);
      if (i < n && from[i] === token) {
        found.push(["same", token]);
        i++;
      } else found.push(["added", token]);
      j++;
    }
    while (i < n) found.push(["removed", from[i++]]);
    return found;
  }

  // What is set stands in the address, so that a view can be passed on.
  function link(id) {
    const set = new URLSearchParams();
    for (const control of controls) if (control.value !== initial[control.id]) set.set(control.id, control.value);
    if (id) set.set("prompt", id);
    return "#" + set;
  }
  function remember() {
    history.replaceState(null, "", link(""));
  }
  function follow() {
    const set = new URLSearchParams(location.hash.slice(1));
    for (const control of controls) {
      const value = set.get(control.id) ?? initial[control.id];
      if (control.tagName !== "SELECT" || [...control.options].some((o) => o.value === value)) control.value = value;
    }
    filter();
    const id = set.get("prompt");
    if (!id) return;
    const at = shown.findIndex((e) => e.prompt.id === id);
    while (at >= drawn) more();
    const entry = [...by("list").children].find((e) => e.dataset.id === id);
    if (!entry) {
      by("count").textContent = "prompt " + id + " is not among those shown";
      return;
    }
    entry.open = true;
    entry.scrollIntoView();
    entry.querySelector("summary").focus({ preventScroll: true });
  }

  let waiting = 0;
  for (const control of controls) {
    control.addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(filter, control.id === "text" ? 120 : 0);
    });
  }
  by("removed").addEventListener("input", filter);
  by("text").form.addEventListener("submit", (event) => event.preventDefault());
  by("text").form.addEventListener("reset", () => setTimeout(filter));
  by("more").addEventListener("click", more);
  addEventListener("hashchange", follow);
  addEventListener("keydown", (event) => {
    if (event.key !== "/" || /INPUT|SELECT|TEXTAREA/.test(event.target.tagName)) return;
    event.preventDefault();
    by("text").focus();
  });

  async function unpack() {
    const bytes = Uint8Array.from(atob(by("data").textContent.trim()), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const found = JSON.parse(await new Response(stream).text());
    const names = ["policy", "sample", "text", "reward", "tokens", "flags", "kl", "harm", "fired", "below"];
    for (const prompt of found.prompts) {
      prompt.answers = prompt.answers.map((row) => Object.fromEntries(names.map((name, i) => [name, row[i]])));
      prompt.words = [prompt.id, prompt.category, prompt.prompt, ...prompt.answers.map((a) => a.text)].join("\n").toLowerCase();
    }
    data = found;
    performance.mark("unpacked");
    follow();
    root.dataset.drawn = data.prompts.length;
  }
  // After the first paint; a page in the background has none.
  let begun = false;
  const begin = () => {
    if (!begun) unpack();
    begun = true;
  };
  new PerformanceObserver((list) => list.getEntriesByName("first-contentful-paint").length && begin()).observe({ type: "paint", buffered: true });
  setTimeout(begin, document.hidden ? 0 : 2000);
})();
