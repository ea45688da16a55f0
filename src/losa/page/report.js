"use strict";
// Colours by name, for light and dark: a figure says in `meta` which it wants.
const FAMILY = getComputedStyle(document.body).fontFamily;
const THEMES = {
  light: {
    ink: "#1b1e23", muted: "#5f6873", grid: "#e6e9ed", back: "#ffffff", ramp: ["#b9cfee", "#174c9c"],
    palette: ["#1f5fbf", "#c8553d", "#2b8a5f", "#8a5fb8", "#a87412", "#17879a", "#b04a86", "#5f6873"],
    scale: [[0, "#f3f7fd"], [0.5, "#7fa8de"], [1, "#123e80"]],
  },
  dark: {
    ink: "#e7eaee", muted: "#9ba5b1", grid: "#2a2f36", back: "#15171b", ramp: ["#345377", "#a9ccff"],
    palette: ["#7fb2ff", "#f0937d", "#6fcb9f", "#c3a1ee", "#e0b559", "#66c6d8", "#ea94c4", "#9ba5b1"],
    scale: [[0, "#1a2230"], [0.5, "#3f6ca8"], [1, "#d5e5ff"]],
  },
};
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 820px)");

function mixed(from, to, share) {
  const part = (color, i) => parseInt(color.slice(1 + 2 * i, 3 + 2 * i), 16);
  const channels = [0, 1, 2].map((i) => Math.round(part(from, i) + (part(to, i) - part(from, i)) * share));
  return `rgb(${channels.join(", ")})`;
}

function painted(figure, theme) {
  const { data, layout } = structuredClone(figure);
  for (const trace of data) {
    const look = trace.meta ?? {};
    if (look.scale) {
      trace.colorscale = theme.scale;
      trace.colorbar = { ...trace.colorbar, outlinewidth: 0 };
      continue;
    }
    const color = look.color === undefined ? mixed(...theme.ramp, look.shade) : theme.palette[look.color];
    trace.marker = { ...trace.marker, color, line: { width: look.fill ? 0 : 1, color: theme.back } };
    if (!look.fill) trace.line = { width: 2, ...trace.line, color };
  }
  for (const key of Object.keys(layout).filter((name) => /^[xy]axis/.test(name))) {
    const axis = layout[key];
    Object.assign(axis, {
      showgrid: axis.showgrid ?? (data[0].orientation === "h" ? key[0] === "x" : key[0] === "y"),
      gridcolor: theme.grid, zerolinecolor: theme.muted, linecolor: theme.grid, showline: key[0] === "x", automargin: true,
      tickfont: { color: theme.muted, size: 12 }, zeroline: axis.zeroline ?? false, ticks: "", ticklabelstandoff: 6,
    });
    if (axis.title) axis.title = { ...axis.title, font: { color: theme.muted, size: 12 }, standoff: 8 };
  }
  for (const shape of layout.shapes ?? []) shape.line.color = theme.muted;
  for (const text of layout.annotations ?? []) text.font = { color: theme.muted, size: narrow.matches ? 9 : 11 };
  for (const slider of layout.sliders ?? []) {
    Object.assign(slider, {
      bgcolor: theme.grid, activebgcolor: theme.muted, bordercolor: theme.grid, tickcolor: theme.muted, ticklen: 4,
      font: { color: theme.muted, size: 12 }, currentvalue: { visible: false },
    });
  }
  const legend = { orientation: "h", x: 0, xanchor: "left", traceorder: "normal", font: { color: theme.ink } };
  const below = data.some((trace) => trace.legend === "legend2");  // what markers mean
  return [data, {
    ...layout,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: FAMILY, size: 12.5, color: theme.ink },
    margin: { l: 52, r: 14, t: 52, b: below ? 74 : 44 },  // the buttons are above the legend
    legend: {
      ...layout.legend, ...legend, y: 1, yanchor: "bottom",
      title: { ...layout.legend?.title, font: { color: theme.ink, size: 12.5 } },  // plotly's is larger than its entries
    },
    ...(below && { legend2: {
      ...legend, yref: "container", y: 0, yanchor: "bottom", itemclick: false, itemdoubleclick: false,
    } }),
    hoverlabel: { bgcolor: theme.back, bordercolor: theme.muted, font: { family: FAMILY, color: theme.ink } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: theme.muted, activecolor: theme.ink },
    dragmode: narrow.matches ? false : "zoom",  // on a phone, a finger on a picture scrolls the page
  }];
}

async function load() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

async function draw() {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const zoom = ["zoomIn2d", "zoomOut2d", "resetScale2d"];
  const buttons = narrow.matches ? [zoom] : [["toImage"], ["zoom2d", "pan2d"], zoom];
  const config = { responsive: true, displaylogo: false, modeBarButtons: buttons };
  const theme = THEMES[dark.matches ? "dark" : "light"];
  for (const div of document.querySelectorAll(".picture")) {
    await Plotly.react(div, ...painted(figures[div.dataset.picture], theme), config);
  }
  document.body.dataset.drawn = dark.matches ? "dark" : "light";
}

function csv(table) {
  const cell = (td) => (/[",\n]/.test(td.textContent) ? `"${td.textContent.replaceAll('"', '""')}"` : td.textContent);
  return Array.from(table.rows, (row) => Array.from(row.cells, cell).join(",")).join("\n") + "\n";
}

async function copy(button) {
  const text = csv(button.parentElement.querySelector("table"));
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // no permission: the old way
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy as CSV"; }, 1500);
}

for (const button of document.querySelectorAll(".copy")) button.addEventListener("click", () => copy(button));
if (document.querySelector(".picture")) {
  load().then(draw).then(() => {
    for (const media of [dark, narrow]) media.addEventListener("change", draw);
  }).catch((error) => {
    for (const div of document.querySelectorAll(".picture")) {
      div.classList.add("bare");
      div.textContent = "This browser does not draw the picture; its numbers are below.";
    }
    console.error(error);
  });
}
