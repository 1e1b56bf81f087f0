"use strict";
// Every figure carries its specification as JSON; colours written as var(--name) are taken from the style sheet, so that
// figures follow light and dark mode as the rest of the page does.
(() => {
  const figures = [...document.querySelectorAll(".figure")].map((box) => {
    const source = box.querySelector("script");
    const specification = JSON.parse(source.textContent);
    source.remove();
    const target = document.createElement("div");
    box.append(target);
    return { target, specification };
  });
  const coloured = (value, styles, key = "") => {
    if (Array.isArray(value)) return value.map((item) => coloured(item, styles));
    if (value !== null && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, coloured(item, styles, name)]));
    }
    const named = key.endsWith("color") && typeof value === "string" && /^var\((--[a-z]+)\)$/.exec(value);
    return named ? styles.getPropertyValue(named[1]).trim() : value;
  };
  const draw = () => {
    const styles = getComputedStyle(document.documentElement);
    for (const { target, specification } of figures) {
      const { data, layout } = coloured(specification, styles);
      Plotly.react(target, data, layout, { responsive: true, displayModeBar: false });
    }
  };
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
