// Searches and sorts the latents; the address holds what is set, and the latent that it leads to.
(() => {
  "use strict";
  const root = document.documentElement;
  const by = (id) => document.getElementById(id);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  by("theme").addEventListener("click", () => {
    const now = root.dataset.theme || (dark.matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
  });

  const sections = [...document.querySelectorAll("section.latent")];
  const rows = new Map([...document.querySelectorAll("#index tbody tr")].map((row) => [row.dataset.latent, row]));
  const number = (text) => (text === "" ? -Infinity : +text);
  const SORTS = {
    place: (d) => +d.place,
    effect: (d) => -number(d.effect),
    weight: (d) => -Math.abs(+d.weight),
    density: (d) => -number(d.density),
    latent: (d) => +d.latent,
  };

  function filter() {
    const wanted = by("text").value.trim().toLowerCase();
    const list = by("in-list").value;
    const key = SORTS[by("sort").value];
    const order = sections.map((s, i) => [key(s.dataset), i, s]).sort((a, b) => a[0] - b[0] || a[1] - b[1]);
    let shown = 0;
    for (const [, , section] of order) {
      const { words, lists, latent } = section.dataset;
      const fits = (!wanted || words.toLowerCase().includes(wanted)) && (!list || lists.split(" ").includes(list));
      section.hidden = !fits;
      rows.get(latent).hidden = !fits;
      shown += fits;
    }
    by("latents").append(...order.map(([, , section]) => section));
    by("index").tBodies[0].append(...order.map(([, , section]) => rows.get(section.dataset.latent)));
    by("count").textContent = shown + " of " + sections.length + " latents";
  }

  for (const id of ["text", "in-list", "sort"]) by(id).addEventListener("input", filter);
  by("text").form.addEventListener("submit", (event) => event.preventDefault());
  addEventListener("keydown", (event) => {
    if (event.key !== "/" || /INPUT|SELECT|TEXTAREA/.test(event.target.tagName)) return;
    event.preventDefault();
    by("text").focus();
  });

  // A link to a latent that is filtered away shows it.
  function follow() {
    const target = by(location.hash.slice(1));
    if (!target) return;
    if (target.hidden) {
      by("text").value = "";
      by("in-list").value = "";
      filter();
    }
    target.scrollIntoView();
  }
  addEventListener("hashchange", follow);
  follow();
  root.dataset.drawn = sections.length;
})();
