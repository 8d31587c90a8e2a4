// Draws the plots one after another, so that the page answers meanwhile; sorts tables; switches themes.
(() => {
  "use strict";
  const root = document.documentElement;
  const canvases = [...document.querySelectorAll(".canvas")];
  const SETTINGS = { responsive: true, displaylogo: false, displayModeBar: "hover", modeBarButtons: [["toImage", "resetScale2d"]] };
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  function themed(layout) {
    const axis = { gridcolor: colour("--line"), linecolor: colour("--line"), zerolinecolor: colour("--line"), tickcolor: colour("--line") };
    const changes = {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("--text"), family: getComputedStyle(document.body).fontFamily, size: 12 },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--soft"), activecolor: colour("--accent") },
      hoverlabel: { bgcolor: colour("--ground"), bordercolor: colour("--line"), font: { color: colour("--text") } },
    };
    for (const key of Object.keys(layout)) if (/^[xy]axis/.test(key)) changes[key] = { ...layout[key], ...axis };
    return { ...layout, ...changes };
  }

  function draw(canvas) {
    const { data, layout } = JSON.parse(document.getElementById("plot-" + canvas.dataset.plot).textContent);
    return Plotly.newPlot(canvas, data, themed({ ...layout, autosize: true }), SETTINGS).then(() => {
      declutter(canvas);
      canvas.on("plotly_afterplot", () => declutter(canvas));
    });
  }

  // Where a plot is narrower than its labels were placed for, those that overlap another stay on hover alone.
  function declutter(canvas) {
    const shown = [];
    for (const label of canvas.querySelectorAll(".textpoint text")) {
      const box = label.getBoundingClientRect();
      const over = (b) => box.left < b.right && b.left < box.right && box.top < b.bottom && b.top < box.bottom;
      const clear = box.width > 0 && !shown.some(over);
      label.style.visibility = clear ? "visible" : "hidden";
      if (clear) shown.push(box);
    }
  }

  // What is folded is drawn when it is opened: a plot in there has no width yet.
  const later = window.requestIdleCallback ? (f) => requestIdleCallback(f, { timeout: 200 }) : (f) => setTimeout(f, 1);
  const seen = (element) => !element.closest("details:not([open])");
  function drawNext() {
    const next = canvases.find((canvas) => !canvas.layout && seen(canvas));
    if (!next) {
      root.dataset.drawn = canvases.filter((canvas) => canvas.layout).length;
      return;
    }
    delete root.dataset.drawn;
    draw(next).then(() => later(drawNext));
  }
  for (const part of document.querySelectorAll("details")) part.addEventListener("toggle", () => part.open && drawNext());
  drawNext();

  // A link to what is folded opens it.
  function reveal() {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    const inner = target.querySelector(":scope > details.part");
    if (inner) inner.open = true;
    for (let e = target.closest("details"); e; e = e.parentElement.closest("details")) e.open = true;
    target.scrollIntoView();
  }
  addEventListener("hashchange", reveal);
  for (const link of document.querySelectorAll('a[href^="#"]')) link.addEventListener("click", () => setTimeout(reveal));
  reveal();

  function retheme() {
    for (const canvas of canvases) if (canvas.layout) Plotly.react(canvas, canvas.data, themed(canvas.layout));
  }
  const dark = matchMedia("(prefers-color-scheme: dark)");
  document.getElementById("theme").addEventListener("click", () => {
    const now = root.dataset.theme || (dark.matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
    retheme();
  });
  dark.addEventListener("change", retheme);

  // A printed page holds every section, is as wide as its paper, and black on white.
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details.part:not([open])")];
    for (const part of folded) part.open = true;
    for (const canvas of canvases) {
      const { data, layout } = JSON.parse(document.getElementById("plot-" + canvas.dataset.plot).textContent);
      const printed = themed(layout);
      Plotly.newPlot(canvas, data, { ...printed, width: 660, font: { ...printed.font, color: "#000" } }, SETTINGS);
    }
  });
  addEventListener("afterprint", () => {
    for (const canvas of canvases) draw(canvas);
    for (const part of folded) part.open = false;
  });

  // Numbers by value, intervals by their lower end, what is not known last, all else by letters.
  function key(cell) {
    const text = cell.textContent.trim();
    if (text === "n/a" || text === "nan") return null;
    const number = parseFloat(text.replace(/^\[/, ""));
    return Number.isNaN(number) ? text : number;
  }
  function compare(a, b) {
    if (a === null || b === null) return 0;
    return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  }
  for (const button of document.querySelectorAll("thead button")) {
    button.addEventListener("click", () => {
      const head = button.parentElement;
      const body = head.closest("table").tBodies[0];
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of head.parentElement.children) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...body.rows].map((row) => [key(row.cells[head.cellIndex]), row]);
      rows.sort(([a], [b]) => (a === null) - (b === null) || (up ? compare(a, b) : compare(b, a)));
      body.append(...rows.map(([, row]) => row));
    });
  }

  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const watch = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        for (const link of links.values()) link.removeAttribute("aria-current");
        links.get(entry.target.id)?.setAttribute("aria-current", "true");
      }
    },
    { rootMargin: "-20% 0px -70% 0px" },
  );
  for (const id of links.keys()) watch.observe(document.getElementById(id));
})();
