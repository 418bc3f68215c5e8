// The page of a trace. Everything it shows is in the JSON beside it; it asks nobody for anything.
"use strict";
const trace = JSON.parse(document.getElementById("trace").textContent);
const $ = (id) => document.getElementById(id);
const make = (tag, className, text) => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
};
const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const percent = (share) => (100 * share).toFixed(share < 0.1 ? 1 : 0) + " %";
const views = trace.views.map((view) => ({ ...view, data: bytes(view.data) }));
let chosen = null;

$("question").textContent = trace.question;
$("answer").textContent = trace.answer;
$("verdict").textContent = trace.verdict.text;
$("verdict").classList.toggle("bad", trace.verdict.failed);

// Images: each drawn on a canvas that also holds the padding around it.
const images = trace.images.map((image, index) => {
  const all = image.boxes.filter(Boolean).concat([[0, 0, image.width, image.height]]);
  const left = Math.min(...all.map((box) => box[0])), top = Math.min(...all.map((box) => box[1]));
  const right = Math.max(...all.map((box) => box[2])), bottom = Math.max(...all.map((box) => box[3]));
  const scale = 720 / Math.max(right - left, bottom - top);
  const figure = make("figure", "image"), canvas = make("canvas");
  canvas.width = Math.round((right - left) * scale);
  canvas.height = Math.round((bottom - top) * scale);
  const name = trace.images.length > 1 ? `image ${index + 1}: ` : "";
  figure.append(canvas, make("figcaption", "", name + image.caption));
  $("images").append(figure);
  const bitmap = new Image();
  const shown = { ...image, canvas, bitmap, left, top, scale };
  bitmap.onload = draw;
  bitmap.src = image.source;
  canvas.addEventListener("pointermove", (event) => pointAt(shown, event));
  return shown;
});
$("look").hidden = !images.length;
if (!images.length) document.querySelector("main").style.gridTemplateColumns = "minmax(0, 1fr)";

function option(select, value, text) {
  const entry = make("option", "", text);
  entry.value = value;
  select.append(entry);
}
views.forEach((view, index) => option($("view"), index, view.name));
option($("view"), "tiles", "tiles");
const tiled = images.some((image) => image.tiles.length > 1);
$("part-label").hidden = !tiled;
["all", "overview", "tiles"].forEach((name) => option($("part"), name, name));
const currentView = () => views[$("view").value];

function fillLayers() {
  const view = currentView();
  $("layer-label").hidden = !view || view.layers < 2;
  $("layer").replaceChildren();
  if (!view) return;
  option($("layer"), 0, "all, on average");
  for (let layer = 1; layer < view.layers; layer++) option($("layer"), layer, String(layer));
}

// The share of each feature for the chosen token, 0 to 1 of the largest.
function shares() {
  const view = currentView();
  if (!view || chosen === null) return null;
  const row = trace.tokens[chosen].rows[view.key];
  if (row === undefined || row === null) return null;
  const start = (Number($("layer").value) * view.rows + row) * trace.features;
  return view.data.subarray(start, start + trace.features);
}

function draw() {
  const values = shares(), part = $("part").value;
  for (const image of images) {
    const { canvas, bitmap, left, top, scale } = image, pen = canvas.getContext("2d");
    const place = ([x0, y0, x1, y1]) => [(x0 - left) * scale, (y0 - top) * scale, (x1 - x0) * scale, (y1 - y0) * scale];
    pen.clearRect(0, 0, canvas.width, canvas.height);
    pen.fillStyle = "#8886";
    pen.fillRect(0, 0, canvas.width, canvas.height);
    if (!bitmap.complete) continue;
    pen.drawImage(bitmap, ...place([0, 0, image.width, image.height]));
    const wanted = (index) => part === "all" || (part === "overview") === (index < image.overview);
    if (values) {
      pen.fillStyle = "#0b1220a8";
      pen.fillRect(0, 0, canvas.width, canvas.height);
      image.boxes.forEach((box, index) => {
        if (!box || !wanted(index)) return;
        const heat = values[image.first + index] / 255;
        pen.save();
        pen.beginPath();
        pen.rect(...place(box));
        pen.clip();
        pen.globalAlpha = Math.pow(heat, 0.7) * (tiled && part === "all" ? 0.7 : 1);
        pen.drawImage(bitmap, ...place([0, 0, image.width, image.height]));
        pen.fillStyle = "hsl(24 100% 50% / 0.28)";
        pen.fillRect(...place(box));
        pen.restore();
      });
    }
    if ($("grid").checked) outline(pen, image.boxes.filter((box, index) => box && wanted(index)).map(place), "#ffffffb0", 1);
    if ($("view").value === "tiles" || $("grid").checked) outline(pen, image.tiles.map(place), "#e8541a", 3);
  }
}

function outline(pen, boxes, colour, width) {
  pen.strokeStyle = colour;
  pen.lineWidth = width;
  for (const box of boxes) pen.strokeRect(...box);
}

function pointAt(image, event) {
  const area = image.canvas.getBoundingClientRect();
  const x = (event.clientX - area.left) / area.width * image.canvas.width / image.scale + image.left;
  const y = (event.clientY - area.top) / area.height * image.canvas.height / image.scale + image.top;
  const hits = image.boxes.map((box, index) => [box, index])
    .filter(([box]) => box && x >= box[0] && x < box[2] && y >= box[1] && y < box[3]).map(([, index]) => index);
  if (!hits.length) return;
  const index = hits[hits.length - 1], values = shares();
  const heat = values ? `, ${Math.round(values[image.first + index] / 2.55)} % of the largest share` : "";
  $("caption").textContent = `feature ${index + 1} of ${image.boxes.length}, position ${image.position + index} of the sequence${heat}`;
}

// Tokens
const chips = trace.tokens.map((token, index) => {
  const looks = Object.values(token.rows).some((row) => row !== null && row !== undefined);
  const chip = make(looks ? "button" : "span", `token ${token.kind}`, token.text);
  if (token.note) chip.append(make("small", "", token.note));
  chip.title = token.title;
  if (token.heat !== undefined) chip.style.background = `hsl(14 80% 55% / ${0.12 + 0.7 * token.heat})`;
  if (looks) {
    chip.type = "button";
    for (const event of ["pointerenter", "focus", "click"]) chip.addEventListener(event, () => choose(index));
  }
  $("tokens").append(chip);
  return chip;
});
$("hint").textContent = trace.hint;

function choose(index) {
  if (chosen !== null) chips[chosen].classList.remove("on");
  chosen = index;
  chips[index].classList.add("on");
  const token = trace.tokens[index], view = currentView();
  const share = view && token.share !== undefined && view.key === "attention" ? `, ${percent(token.share)} of its attention is on images` : "";
  $("caption").textContent = (view ? `${view.caption} ${JSON.stringify(token.text)}${share}.` : token.title);
  draw();
}

if (trace.candidates.length) {
  const table = make("table");
  trace.candidates.forEach((step, index) => {
    const row = make("tr");
    row.append(make("td", "", `token ${index + 1}`));
    for (const candidate of step) {
      const cell = make("td", "", `${candidate.text} ${percent(candidate.p)}`), bar = make("span", "chance");
      bar.style.width = `${Math.round(60 * candidate.p)}px`;
      cell.append(bar);
      row.append(cell);
    }
    table.append(row);
  });
  $("candidates").append(make("h3", "", "First new tokens and what else was likely"), table);
}

// Time
const end = Math.max(...trace.stages.map((stage) => stage.start + stage.seconds), 1e-9);
const begin = Math.min(...trace.stages.map((stage) => stage.start), end);
const named = new Map();
for (const stage of trace.stages) named.set(stage.name, [...(named.get(stage.name) || []), stage]);
for (const [name, stages] of named) {
  const line = make("div", "stage"), track = make("div", "track");
  const seconds = stages.reduce((sum, stage) => sum + stage.seconds, 0);
  for (const stage of stages) {
    const bar = make("div", "bar");
    bar.style.left = `${100 * (stage.start - begin) / (end - begin)}%`;
    bar.style.width = `${100 * stage.seconds / (end - begin)}%`;
    track.append(bar);
  }
  const took = seconds < 1 ? `${(1000 * seconds).toFixed(1)} ms` : `${seconds.toFixed(2)} s`;
  line.append(make("span", "name", name + (stages.length > 1 ? ` (${stages.length})` : "")), track, make("span", "took", took));
  $("waterfall").append(line);
}

// Points
for (const point of trace.points) {
  const box = make("details"), head = make("summary");
  const bad = point.rows.filter((row) => row.tone === "bad").length, good = point.rows.filter((row) => row.tone === "good").length;
  head.append(make("b", "", point.title), make("code", "", point.where));
  if (bad || good) head.append(make("span", bad ? "mark bad" : "mark", bad ? `${bad} of ${good + bad} checks fail` : `${good} check${good > 1 ? "s hold" : " holds"}`));
  const table = make("table", "rows");
  for (const row of point.rows) {
    const line = make("tr"), cell = make("td", row.tone);
    if (row.spans.length) for (const [text, marked] of row.spans) cell.append(marked ? make("mark", "", text) : text);
    else cell.textContent = row.text;
    line.append(make("th", "", row.label), cell);
    table.append(line);
  }
  box.append(head, table, make("p", "suspect", `suspect: ${point.suspect}`));
  box.open = bad > 0;
  $("points").append(box);
}

$("view").addEventListener("change", () => { fillLayers(); chosen === null ? draw() : choose(chosen); });
for (const id of ["layer", "part", "grid"]) $(id).addEventListener("change", draw);
fillLayers();
if (trace.first !== null) choose(trace.first);
draw();
