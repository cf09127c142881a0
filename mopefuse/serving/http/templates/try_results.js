"use strict";
// What the page shows: elements, answers of every task, and errors. Every text becomes a text node, never HTML.

const HIDDEN = /[\u0000-\u001f\u007f-\u009f\u2028-\u202e\u2066-\u2069\ufeff]/g;
const FIRST = 10; // labels that are shown at once
const MOST = 500; // labels that are shown at all

const readable = (text) => String(text).replace(HIDDEN, (one) => `\\u${one.charCodeAt(0).toString(16).padStart(4, "0")}`);

const make = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.map((child) => (child instanceof Node ? child : readable(child))));
  return node;
};

const number = (value) => (Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(6))));
const percent = (share) => `${(100 * share).toFixed(share >= 0.0995 ? 1 : 2)} %`;

const table = (kind, caption, headings, rows) => {
  const cells = headings.map((heading, column) => make("th", { scope: "col", ...(column ? { class: "number" } : {}) }, heading));
  return make("table", { class: kind }, make("caption", {}, caption), make("thead", {}, make("tr", {}, ...cells)), make("tbody", {}, ...rows));
};

// Probabilities

const barRow = (label, share, chosen) => {
  const bar = make("i");
  bar.style.width = `${100 * share}%`;
  const cells = [
    make("td", { dir: "auto" }, label, ...(chosen ? [" ✓"] : [])),
    make("td", { class: "track", "aria-hidden": "true" }, make("div", {}, bar)),
    make("td", { class: "number", "data-value": share }, percent(share)),
  ];
  return make("tr", { "data-label": label, ...(chosen ? { class: "chosen" } : {}) }, ...cells);
};

const showLabels = (answer) => {
  const chosen = "label" in answer ? [answer.label] : answer.labels;
  const listed = Object.entries(answer.probabilities).sort((one, other) => other[1] - one[1]);
  const rows = listed.slice(0, MOST).map(([label, share]) => barRow(label, share, chosen.includes(label)));
  const headings = ["label", "", "probability"];
  const parts = [
    make("p", { class: "answer", dir: "auto" }, chosen.join(", ") || "no label"),
    table("bars", "Probability of each label, the largest first", headings, rows.slice(0, FIRST)),
  ];
  if (rows.length > FIRST) {
    const rest = table("bars", "Further labels", headings, rows.slice(FIRST));
    parts.push(make("details", {}, make("summary", {}, `${rows.length - FIRST} more labels`), rest));
  }
  return parts;
};

// Numbers

const isNested = (found) => typeof Object.values(found)[0] === "object";

const showNumbers = (answer, model) => {
  const single = typeof answer.value === "number";
  const values = single ? { [model.labels?.[0] ?? "value"]: answer.value } : answer.value;
  const quantiles = answer.quantiles && (isNested(answer.quantiles) ? answer.quantiles : { [Object.keys(values)[0]]: answer.quantiles });
  const levels = quantiles ? Object.keys(Object.values(quantiles)[0]).sort((one, other) => one - other) : [];
  const parts = [];
  if (single) {
    const [name] = Object.keys(values);
    const ends = levels.length ? [levels[0], levels.at(-1)].map((level) => number(quantiles[name][level])) : [];
    const interval = ends.length ? [make("small", {}, `between ${ends[0]} and ${ends[1]}, quantiles ${levels[0]} and ${levels.at(-1)}`)] : [];
    parts.push(make("p", { class: "answer" }, number(answer.value), ...interval));
  }
  const cell = (value) => make("td", { class: "number" }, number(value));
  const rows = Object.entries(values).map(([name, value]) =>
    make("tr", {}, make("td", { dir: "auto" }, name), cell(value), ...levels.map((level) => cell(quantiles[name][level]))));
  parts.push(table("numbers", "Predicted values", ["", "value", ...levels.map((level) => `quantile ${level}`)], rows));
  return parts;
};

// Masks: runs of equal pixels, row after row, over the picture

const colourOf = (id) => {
  const [hue, out] = [(id * 137.5 + 215) % 360, []];
  for (const offset of [0, 8, 4]) {
    const k = (offset + hue / 30) % 12;
    out.push(Math.round(255 * (0.55 - 0.35 * Math.max(-1, Math.min(k - 3, 9 - k, 1)))));
  }
  return out;
};

const maskLayer = ({ size: [height, width], ids, lengths }) => {
  const pixels = new ImageData(width, height);
  const words = new Uint32Array(pixels.data.buffer); // a pixel each, red in the lowest byte
  const counts = new Map();
  let at = 0;
  ids.forEach((id, run) => {
    counts.set(id, (counts.get(id) ?? 0) + lengths[run]);
    const [red, green, blue] = colourOf(id);
    words.fill(((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0, at, at + lengths[run]);
    at += lengths[run];
  });
  const layer = make("canvas", { width, height });
  layer.getContext("2d").putImageData(pixels, 0, 0);
  return { layer, counts };
};

const showMask = async (answer, model, picture) => {
  const { layer, counts } = maskLayer(answer.mask);
  const [height, width] = answer.mask.size;
  const image = picture ? await createImageBitmap(picture) : null;
  const listed = [...counts].sort((one, other) => other[1] - one[1]);
  const names = listed.map(([id, count]) => [id, model.labels?.[id] ?? `class ${id}`, count / (width * height)]);
  const about = names.map(([, name, share]) => `${readable(name)} ${percent(share)}`).join(", ");
  const canvas = make("canvas", { id: "overlay", width, height, role: "img", "aria-label": `predicted classes: ${about}` });
  if (Math.max(width, height) < 200) canvas.classList.add("enlarged");
  const slider = make("input", { type: "range", id: "opacity", min: 0, max: 100, value: 50 });
  const draw = () => {
    const context = canvas.getContext("2d");
    context.globalAlpha = 1;
    context.clearRect(0, 0, width, height);
    if (image) context.drawImage(image, 0, 0, width, height);
    context.globalAlpha = slider.value / 100;
    context.drawImage(layer, 0, 0);
  };
  slider.addEventListener("input", draw);
  draw();
  const rows = names.map(([id, name, share]) => {
    const swatch = make("i");
    swatch.style.background = `rgb(${colourOf(id).join(" ")})`;
    return make("tr", {}, make("td", { dir: "auto" }, swatch, name), make("td", { class: "number" }, percent(share)));
  });
  const label = make("label", { for: "opacity" }, "Opacity of the mask");
  return [canvas, label, slider, table("legend", "Classes in the mask", ["class", "share of pixels"], rows)];
};

// Pairs

const showPair = ({ main, comp }) => {
  const score = main.reduce((sum, value, place) => sum + value * comp[place], 0);
  return [make("p", { class: "answer" }, number(score), make("small", {}, "score of this pair: the cosine of the angle between its two embeddings"))];
};

// Experts

const showExperts = (weights) => {
  const mean = weights[0].map((_, expert) => weights.reduce((sum, layer) => sum + layer[expert], 0) / weights.length);
  const most = mean.indexOf(Math.max(...mean));
  const rows = weights.map((layer, place) => {
    const largest = Math.max(...layer);
    const cells = layer.map((weight) => {
      const cell = make("td", weight === largest ? { class: "most" } : {}, weight.toFixed(2));
      cell.style.setProperty("--share", weight);
      return cell;
    });
    return make("tr", {}, make("th", { scope: "row" }, String(place + 1)), ...cells);
  });
  const headings = ["layer", ...mean.map((_, expert) => String(expert + 1))];
  const heat = table("heat", "Weight of each expert (column) in each prompted layer (row); the largest is bold", headings, rows);
  heat.id = "experts";
  const text = `Expert ${most + 1} has the largest mean weight, ${percent(mean[most])}.`;
  return [make("h3", {}, "Prompt experts that answered"), make("p", { class: "small" }, text), make("div", { class: "scroll", tabindex: "0" }, heat)];
};

// An answer, an error

const showAnswer = async (answer, model, picture) => {
  const parts = [];
  if ("probabilities" in answer) parts.push(...showLabels(answer));
  else if ("value" in answer) parts.push(...showNumbers(answer, model));
  else if ("mask" in answer) parts.push(...(await showMask(answer, model, picture)));
  else if (Array.isArray(answer.main) && Array.isArray(answer.comp)) parts.push(...showPair(answer));
  else parts.push(make("pre", {}, JSON.stringify(answer, null, 2)));
  if (answer.routing?.length) parts.push(...showExperts(answer.routing));
  return parts;
};

const showError = ({ code, message, where, hint }) => {
  const lines = [["where", where], ["fix", hint], ["code", code]].filter(([, text]) => text);
  const facts = lines.flatMap(([name, text]) => [make("dt", {}, name), make("dd", {}, text)]);
  return [make("p", {}, make("b", {}, message)), make("dl", {}, ...facts)];
};
