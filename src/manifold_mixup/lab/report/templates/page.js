"use strict";
// The page works without this script but for figures, sorting, copying and the choice of theme.
(() => {
  const root = document.documentElement;
  const hidden = new Set(); // "experiment-1 method-2": what the legends have switched off
  let plotly = null; // a promise of plotly.js, once a figure needs it

  // ---------------------------------------------------------------- theme

  const THEMES = ["as the system", "light", "dark"];
  const remembered = () => {
    try {
      return localStorage.getItem("manifold-mixup-theme");
    } catch {
      return null; // a page from a file may be refused its memory
    }
  };
  const chooseTheme = (name) => {
    const theme = THEMES.includes(name) ? name : THEMES[0];
    if (theme === THEMES[0]) delete root.dataset.theme;
    else root.dataset.theme = theme;
    document.getElementById("theme").textContent = `theme: ${theme}`;
    try {
      localStorage.setItem("manifold-mixup-theme", theme);
    } catch {
      // not remembered, then
    }
    redraw();
  };

  // ---------------------------------------------------------------- figures

  // plotly.js lies in the page compressed; it is unpacked and run once.
  const loadPlotly = () => {
    plotly ??= (async () => {
      const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
      const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
      const script = document.createElement("script");
      script.textContent = await new Response(stream).text();
      document.head.append(script);
      return window.Plotly;
    })();
    return plotly;
  };

  // Colours written as var(--name) are taken from the style sheet, so that figures follow light and dark mode.
  const coloured = (value, styles, key = "") => {
    if (Array.isArray(value)) return value.map((item) => coloured(item, styles, key));
    if (value !== null && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, coloured(item, styles, name)]));
    }
    const named = typeof value === "string" && /^var\((--[a-z0-9-]+)\)$/.exec(value);
    return named && key.endsWith("color") ? styles.getPropertyValue(named[1]).trim() : value;
  };

  const specifications = new WeakMap();
  const specification = (figure) => {
    if (!specifications.has(figure)) {
      const source = figure.querySelector("script");
      specifications.set(figure, JSON.parse(source.textContent));
    }
    return specifications.get(figure);
  };
  const shown = (figure, data) => {
    const section = figure.closest("section").id;
    return data.map((trace) => ({ ...trace, visible: !hidden.has(`${section} ${trace.legendgroup}`) }));
  };
  // A figure of a single method goes away with it; one of several loses that method's traces.
  const fold = (figure) => {
    const section = figure.closest("section").id;
    const groups = specification(figure).data.map((trace) => trace.legendgroup);
    figure.hidden = groups.length > 0 && groups.every((group) => group && hidden.has(`${section} ${group}`));
  };
  const draw = async (figure) => {
    const target = figure.querySelector(".plot");
    const { data, layout } = coloured(specification(figure), getComputedStyle(root));
    try {
      const library = await loadPlotly();
      await library.react(target, shown(figure, data), layout, { responsive: true, displayModeBar: false });
      figure.dataset.drawn = "";
    } catch (error) {
      target.textContent = `This figure could not be drawn (${error}); the browser may be too old.`;
      throw error;
    }
  };
  const redraw = () => {
    for (const figure of document.querySelectorAll(".figure[data-drawn]")) draw(figure);
  };
  // Figures are drawn when they are about to be seen: a page of a hundred of them opens at once.
  const seen = new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting) continue;
        seen.unobserve(target);
        draw(target);
      }
    },
    { rootMargin: "600px 0px" },
  );

  const save = async (button) => {
    const figure = button.closest(".figure");
    const library = await loadPlotly();
    const styles = getComputedStyle(root);
    const { data, layout } = coloured(specification(figure), styles);
    const paper = styles.getPropertyValue("--paper").trim();
    // What the page says around a figure goes into its file: the title, which plotly.js would read as markup, and the
    // legend.
    const text = document.createElement("i");
    text.textContent = figure.querySelector("h4").textContent;
    const alone = {
      title: { text: text.innerHTML, x: 0.02, xanchor: "left" },
      margin: { ...layout.margin, t: 48 },
      showlegend: true,
      legend: { orientation: "h", y: -0.25 },
      paper_bgcolor: paper,
      plot_bgcolor: paper,
    };
    const square = layout.yaxis?.scaleanchor !== undefined || data.every((trace) => trace.type === "heatmap");
    const size = { width: square ? Math.max(520, layout.height + 80) : 800, height: layout.height + 160 };
    await library.downloadImage(
      { data: shown(figure, data), layout: { ...layout, ...alone } },
      { format: button.dataset.save, filename: button.dataset.name, ...size, scale: 2 },
    );
  };

  // ---------------------------------------------------------------- tables

  const valueOf = (row, column) => {
    const cell = row.cells[column];
    const text = cell.dataset.value ?? cell.textContent.trim();
    const number = /^[+\-\u2212]?[\d.]/.test(text) ? Number.parseFloat(text.replace("\u2212", "-")) : Number.NaN;
    return { text, number };
  };
  const sort = (header, rising) => {
    const body = header.closest("table").tBodies[0];
    for (const other of header.parentElement.cells) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const rows = [...body.rows].map((row) => ({ row, ...valueOf(row, header.cellIndex) }));
    const absent = ["", "-", "\u2013", "nan"];
    const numeric = rows.every(({ number, text }) => !Number.isNaN(number) || absent.includes(text));
    const sign = rising ? 1 : -1;
    rows.sort((a, b) => {
      if (!numeric) return sign * a.text.localeCompare(b.text);
      if (Number.isNaN(a.number) || Number.isNaN(b.number)) return Number.isNaN(a.number) - Number.isNaN(b.number);
      return sign * (a.number - b.number); // what is no number stays last either way
    });
    body.append(...rows.map(({ row }) => row));
  };

  const copy = async (text) => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = document.createElement("textarea"); // where the clipboard is not given to pages from files
      area.value = text;
      document.body.append(area);
      area.select();
      const done = document.execCommand("copy");
      area.remove();
      if (!done) throw new Error("the browser does not let pages copy");
    }
  };
  const say = (button, word) => {
    button.dataset.label ??= button.textContent;
    button.textContent = word;
    setTimeout(() => (button.textContent = button.dataset.label), 1500);
  };

  // ---------------------------------------------------------------- what people do

  const toggle = (button) => {
    const section = button.closest("section");
    const key = `${section.id} ${button.dataset.method}`;
    const on = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(on));
    if (on) hidden.delete(key);
    else hidden.add(key);
    for (const figure of section.querySelectorAll(".figure")) {
      fold(figure);
      if ("drawn" in figure.dataset && !figure.hidden) draw(figure);
    }
  };
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.id === "theme") {
      chooseTheme(THEMES[(THEMES.indexOf(root.dataset.theme ?? THEMES[0]) + 1) % THEMES.length]);
    } else if (button.classList.contains("sort")) {
      const header = button.closest("th");
      sort(header, header.getAttribute("aria-sort") !== "ascending");
    }
    else if (button.dataset.method) toggle(button);
    else if (button.dataset.save) save(button).catch(() => say(button, "not saved"));
    else if (button.dataset.copy !== undefined || button.dataset.copyFrom) {
      const text = button.dataset.copy ?? document.getElementById(button.dataset.copyFrom).textContent;
      copy(text).then(
        () => say(button, "copied"),
        () => say(button, "not copied"),
      );
    }
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  // On paper everything is shown, light. The browser waits for nothing here: what is to be printed has to be drawn
  // before the first pause, so plotly.js is fetched from the page early, and the figures get the light colours by hand.
  let onScreen = null; // the theme to go back to
  addEventListener("beforeprint", () => {
    onScreen ??= { theme: root.dataset.theme };
    root.dataset.theme = "light";
    for (const details of document.querySelectorAll("details")) details.open = true;
    for (const figure of document.querySelectorAll(".figure")) draw(figure);
  });
  addEventListener("afterprint", () => {
    if (onScreen?.theme === undefined) delete root.dataset.theme;
    else root.dataset.theme = onScreen.theme;
    onScreen = null;
    redraw();
  });
  addEventListener("load", () => {
    if (document.querySelector(".figure")) setTimeout(loadPlotly, 1000);
  });

  const watchFigures = () => {
    for (const figure of document.querySelectorAll(".figure")) {
      if (hidden.size) fold(figure);
      seen.observe(figure);
    }
    for (const button of document.querySelectorAll(".key")) {
      const off = hidden.has(`${button.closest("section").id} ${button.dataset.method}`);
      button.setAttribute("aria-pressed", String(!off));
    }
  };

  // ---------------------------------------------------------------- live

  // A page that a board serves asks for its stamp, and takes over a new page's contents when the stamp has changed.
  const follow = () => {
    const news = document.getElementById("news");
    let stamp = root.dataset.stamp ?? null; // of the page as it was served
    const look = async () => {
      try {
        const found = (await (await fetch("stamp", { cache: "no-store" })).json()).stamp;
        if (stamp !== null && found !== stamp) await refresh();
        stamp = found;
        news.textContent = `live: last looked at ${new Date().toLocaleTimeString()}`;
      } catch {
        news.textContent = "live: the board does not answer; it may have been stopped";
      }
      setTimeout(look, 2000);
    };
    const refresh = async () => {
      // An answer that is an error says in its <main> what is wrong, so that is shown as well.
      const answer = await fetch("./", { cache: "no-store" });
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const fresh = page.querySelector("main");
      const key = (summary) => `${summary.closest("section")?.id} ${summary.textContent}`;
      const summaries = [...document.querySelectorAll("details > summary")];
      const open = new Map(summaries.map((summary) => [key(summary), summary.parentElement.open]));
      for (const summary of fresh.querySelectorAll("details > summary")) {
        summary.parentElement.open = open.get(key(summary)) ?? summary.parentElement.open;
      }
      const place = (header) => [
        header.closest("section").id,
        header.closest("table").caption.textContent,
        header.textContent,
      ];
      for (const old of document.querySelectorAll("[aria-sort$='ending']")) {
        const same = (header) => String(place(header)) === String(place(old));
        const header = [...fresh.querySelectorAll("[aria-sort]")].find(same);
        if (header) sort(header, old.getAttribute("aria-sort") === "ascending");
      }
      // A figure that is there already keeps its place: plotly.js moves it to the new numbers without a flicker.
      for (const figure of fresh.querySelectorAll(".figure")) {
        const old = document.getElementById(figure.id);
        const height = (one) => one.querySelector(".plot").style.height;
        if (old?.dataset.drawn === undefined || height(figure) !== height(old)) continue;
        specifications.set(old, JSON.parse(figure.querySelector("script").textContent));
        old.querySelector("figcaption").replaceWith(figure.querySelector("figcaption"));
        old.querySelector(".alt").replaceWith(figure.querySelector(".alt"));
        old.querySelector(".plot").setAttribute("aria-label", figure.querySelector(".plot").getAttribute("aria-label"));
        figure.replaceWith(old);
      }
      document.querySelector("main").replaceWith(fresh);
      document.title = page.title;
      document.getElementById("bibtex").textContent = page.getElementById("bibtex")?.textContent ?? "";
      watchFigures();
      redraw();
    };
    look();
  };

  chooseTheme(remembered());
  watchFigures();
  // While the words at the top are read, plotly.js is unpacked, which takes a second.
  if (document.querySelector(".figure")) addEventListener("load", () => setTimeout(loadPlotly, 100));
  if ("live" in root.dataset) follow();
})();
