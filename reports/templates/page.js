// Draws the plots one after another, so that the page answers meanwhile; sorts tables; filters samples; switches themes.
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
    return Plotly.newPlot(canvas, data, themed({ ...layout, autosize: true }), SETTINGS);
  }

  const later = window.requestIdleCallback ? (f) => requestIdleCallback(f, { timeout: 200 }) : (f) => setTimeout(f, 1);
  function drawFrom(i) {
    if (i === canvases.length) {
      root.dataset.drawn = i;
      return;
    }
    draw(canvases[i]).then(() => later(() => drawFrom(i + 1)));
  }
  drawFrom(0);

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

  // A printed page is as wide as its paper, and black on white.
  addEventListener("beforeprint", () => {
    for (const canvas of canvases) {
      if (!canvas.layout) continue;
      const layout = themed(canvas.layout);
      Plotly.newPlot(canvas, canvas.data, { ...layout, width: 660, font: { ...layout.font, color: "#000" } }, SETTINGS);
    }
  });
  addEventListener("afterprint", () => {
    for (const canvas of canvases) if (canvas.layout) draw(canvas);
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

  const text = document.getElementById("sample-text");
  if (text) {
    const kind = document.getElementById("sample-kind");
    const flag = document.getElementById("sample-flag");
    const samples = [...document.querySelectorAll(".sample")];
    const filter = () => {
      const wanted = text.value.toLowerCase();
      let shown = 0;
      for (const sample of samples) {
        const fits =
          (!kind.value || sample.dataset.kind === kind.value) &&
          (!flag.value || sample.dataset.flags.split(" ").includes(flag.value)) &&
          (!wanted || sample.textContent.toLowerCase().includes(wanted));
        sample.hidden = !fits;
        shown += fits;
      }
      document.getElementById("sample-count").textContent = shown + " shown";
    };
    for (const control of [text, kind, flag]) control.addEventListener("input", filter);
    text.form.addEventListener("submit", (event) => event.preventDefault());
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
