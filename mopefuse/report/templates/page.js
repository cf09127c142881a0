"use strict";
(() => {
  // Charts: drawn where they have a width; in a closed <details> once it is opened; anew when light and dark change.
  const block = document.getElementById("charts");
  const { charts, themes } = JSON.parse(block.textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const drawn = new Map();

  const draw = async (place) => {
    const theme = dark.matches ? "dark" : "light";
    drawn.get(place)?.finalize?.();
    drawn.set(place, {});
    const options = { mode: "vega-lite", ast: true, actions: false, renderer: "svg", config: themes[theme], tooltip: { theme } };
    try {
      drawn.set(place, await vegaEmbed(place, structuredClone(charts[place.dataset.chart]), options));
    } catch (error) {
      place.textContent = "This chart could not be drawn; its numbers are below.";
      console.error(error);
    }
  };

  const drawMissing = async () => {
    for (const place of document.querySelectorAll("[data-chart]")) {
      if (place.clientWidth > 0 && !drawn.has(place)) await draw(place);
    }
    document.documentElement.dataset.charts = "drawn";
  };

  document.addEventListener("toggle", drawMissing, true);
  dark.addEventListener("change", () => [...drawn.keys()].forEach(draw));
  drawMissing();

  // Tables: a button in each heading sorts; the controls above show only the rows that match.
  const value = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? cell.textContent.trim() : Number(cell.dataset.value);
  };

  const compare = (one, other) =>
    typeof one === "number" ? one - other : one.localeCompare(other, undefined, { numeric: true });

  const makeSortable = (table) => {
    const body = table.tBodies[0];
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...heading.childNodes);
      heading.append(button);
      button.addEventListener("click", () => {
        const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
        headings.forEach((other) => other.removeAttribute("aria-sort"));
        heading.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
        const rows = [...body.rows].sort((a, b) => sign * compare(value(a, column), value(b, column)));
        body.append(...rows);
      });
    });
  };

  const makeFilterable = (finder) => {
    const controls = finder.querySelector(".controls");
    const status = controls.querySelector("[role=status]");
    const search = controls.querySelector("input");
    const selects = [...controls.querySelectorAll("select")];
    const items = [...finder.querySelectorAll("[data-item]")];
    const rows = items.filter((item) => item.localName === "tr");
    const matches = (item) =>
      item.textContent.toLowerCase().includes(search.value.trim().toLowerCase()) &&
      selects.every((select) => !select.value || JSON.parse(item.dataset[select.name]).includes(select.value));
    const update = () => {
      items.forEach((item) => { item.hidden = !matches(item); });
      status.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} shown`;
    };
    controls.addEventListener("input", update);
    controls.hidden = false;
    update();
  };

  document.querySelectorAll("table.sortable").forEach(makeSortable);
  document.querySelectorAll("[data-finder]").forEach(makeFilterable);
})();
